"""Recognisers of speech on the command line."""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from prunegraph.artefacts.pruned import PrunedInfo
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ArtefactError
from prunegraph.core.reading import checked
from prunegraph.data.speech import SpeechData
from prunegraph.graph import ExampleInputs, copy_network
from prunegraph.models import load_pretrained, load_weights
from prunegraph.models.recogniser import HEADS, Recogniser, build_recogniser
from prunegraph.runs.options.config import NetworkConfig
from prunegraph.runs.options.tasks import TaskOptions
from prunegraph.runs.parallel.machine import resolve_device
from prunegraph.runs.prepare import structure_of
from prunegraph.runs.target import LANGUAGE_RECIPE, Target
from prunegraph.runs.tasks.kind import (
    TaskKind,
    pretraining_of,
    random_numbers,
)
from prunegraph.tasks.speech_recognition import load_speech_data, speech_recognition
from prunegraph.tasks.whisper import whisper_recognition
from prunegraph.training.loop import FinetuneConfig

PROXY_RECIPE = FinetuneConfig(
    epochs=8,
    batch_size=32,
    peak_lr=3e-3,
    warmup_epochs=0.5,
    optimizer="adamw",
    autocast=False,
)
"""Of the recogniser on the embedded proxy: 15 seconds of a core."""

SPEECH_RECIPE = dataclasses.replace(PROXY_RECIPE, epochs=60, peak_lr=2e-3, warmup_epochs=2.0)
"""Of the recogniser on recordings of digits: half an hour of a core."""

SIZES = {
    "features": (1, 1024),
    "tokens": (2, 100_000),
    "width": (HEADS, 4096),
    "convolutions": (2, 64),
    "stride": (1, 4),
    "attentions": (0, 64),
}
"""Smallest and largest sizes of a recogniser that a file may ask to be built."""


def load(config: NetworkConfig, budget: Budget | None = None) -> Target:
    """Load a recogniser of speech with its utterances."""
    assert isinstance(config, TaskOptions)
    device = resolve_device(config.device)
    data = load_speech_data(config.data_dir, config.languages)
    if config.weights is not None and config.weights.is_dir():
        return _whisper(config.weights, data, device)
    task = speech_recognition(data=data, seed=config.seed, name=_name(config))
    if config.weights is not None:
        load_weights(task.model, config.weights)
    task.place_model(task.model, device)
    structure = structure_of(task.name, task.model, task.example_inputs, config, budget)
    assert isinstance(task.model, Recogniser)
    sizes = task.model.sizes
    recipe = PROXY_RECIPE if data.proxy else SPEECH_RECIPE
    return Target(
        task=task,
        data_name=data.name,
        saved=PrunedInfo(
            arch=task.name,
            num_classes=len(data.alphabet),
            example_shape=tuple(next(iter(task.train.batches(1)))["features"].shape),
            extra={"task": task.kind, "sizes": sizes, "tokens": list(data.alphabet.tokens)},
        ),
        build=lambda: build_recogniser(**sizes),
        structure=structure,
        pretraining=pretraining_of(config, recipe),
        recipe=dataclasses.replace(recipe, epochs=0),
    )


def _whisper(folder: Path, data: SpeechData, device: torch.device) -> Target:
    """Return what a folder of Whisper needs; its single weights become zero."""
    task = whisper_recognition(folder, data)
    task.place_model(task.model, device)
    return Target(
        task=task,
        data_name=data.name,
        saved=PrunedInfo(
            arch=task.name, example_shape=(1, task.bands, task.window), extra={"task": task.kind}
        ),
        build=lambda: copy_network(task.model).cpu(),
        tokenizer=task.tokenizer_folder,
        recipe=LANGUAGE_RECIPE,
    )


def _name(config: NetworkConfig) -> str:
    return "recogniser" if config.weights is None else config.weights.resolve().stem


def build(folder: Path | None, info: PrunedInfo) -> nn.Module:
    """Return the network of a folder of Whisper, else a small recogniser with fresh weights.

    Raises:
        ArtefactError: its sizes are damaged, or too large.
    """
    if folder is not None and "sizes" not in info.extra:
        return load_pretrained(folder, kind="AutoModelForSpeechSeq2Seq")
    sizes = checked(info.extra.get("sizes"), dict[str, int], f"the sizes of {info.arch}")
    if sizes.keys() != SIZES.keys() or not all(
        low <= sizes[name] <= high for name, (low, high) in SIZES.items()
    ):
        msg = f"the sizes of {info.arch} are damaged: {sizes}"
        raise ArtefactError(msg)
    return build_recogniser(**sizes)


def example(info: PrunedInfo, seed: int) -> ExampleInputs:
    """Return features of a saved recogniser, and their length."""
    return random_numbers(info, seed), torch.tensor([info.example_shape[1]])


KIND = TaskKind(
    load=load,
    arch=_name,
    options=frozenset({"data_dir", "languages", "pretrain_epochs"}),
    build=build,
    example=example,
)
"""The task's entry."""
