"""Two made-up languages of four words each, whose clips are patterns with noise."""

from collections.abc import Mapping
from pathlib import Path
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
from prunegraph.models.embedded_language import byte_tokenizer
from prunegraph.models.pretrained import save_pretrained_layout, transformers
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


def save_whisper(folder: Path, bands: int = FEATURES) -> Path:
    """Write a tiny Whisper with random weights, and a tokenizer of bytes."""
    torch.manual_seed(0)
    library = transformers()
    config = library.WhisperConfig(
        vocab_size=260,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=bands,
        max_source_positions=40,
        max_target_positions=32,
        decoder_start_token_id=256,
        bos_token_id=257,
        eos_token_id=257,
        pad_token_id=257,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    save_pretrained_layout(
        library.WhisperForConditionalGeneration(config), byte_tokenizer(), folder
    )
    return folder
