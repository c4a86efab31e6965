"""What networks are for: each kind of task is a function that makes one."""

from prunegraph.tasks.causal_lm import causal_lm
from prunegraph.tasks.custom import custom
from prunegraph.tasks.image_classification import image_classification
from prunegraph.tasks.speech_recognition import speech_recognition
from prunegraph.tasks.text_classification import text_classification
from prunegraph.tasks.whisper import whisper_recognition

__all__ = [
    "causal_lm",
    "custom",
    "image_classification",
    "speech_recognition",
    "text_classification",
    "whisper_recognition",
]
