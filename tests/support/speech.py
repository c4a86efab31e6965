"""Two made-up languages of four words each, whose clips are patterns with noise."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prunegraph.data.speech import (
    Alphabet,
    Clips,
    SpeechData,
    drawn_utterances,
    make_speech_data,
)
from prunegraph.models.recogniser import Recogniser, build_recogniser
from prunegraph.tasks.speech_recognition import SpeechRecognition, speech_recognition

WORDS: Mapping[str, tuple[str, ...]] = {"ab": ("a", "b", "ab", "ba"), "xy": ("x", "y", "xy", "yx")}
FEATURES, CLIPS = 6, {"train": 40, "val": 12, "test": 12}


def tiny_speech() -> SpeechData:
    """Return utterances of one or two words."""
    generator = torch.Generator().manual_seed(0)
    patterns = {
        word: torch.randn(6, FEATURES, generator=generator) for w in WORDS.values() for word in w
    }

    def clip(word: str) -> Tensor:
        return patterns[word] + 0.1 * torch.randn(6, FEATURES, generator=generator)

    clips, utterances = {}, {}
    for seed, (split, count) in enumerate(CLIPS.items()):
        texts = [words[n % 4] for words in WORDS.values() for n in range(count)]
        clips[split] = Clips(
            features=[clip(text) for text in texts],
            texts=texts,
            languages=[number for number in range(len(WORDS)) for _ in range(count)],
            speakers=[f"{split}{n % 2}" for n in range(len(texts))],
            names=tuple(WORDS),
            alphabet=Alphabet(tokens=(" ", "a", "b", "x", "y")),
        )
        utterances[split] = drawn_utterances(clips[split], count, (1, 2), seed)
    return make_speech_data("tiny", clips, utterances, distort=False)


def tiny_recogniser(**sizes: int) -> Recogniser:
    """Return a network for ``tiny_speech`` with fresh weights."""
    given: dict[str, Any] = {"width": 16, "convolutions": 2, "stride": 1, "attentions": 1}
    return build_recogniser(features=FEATURES, tokens=6, **{**given, **sizes})


def tiny_task() -> SpeechRecognition:
    """Return the task of both."""
    return speech_recognition(tiny_recogniser(), tiny_speech())
