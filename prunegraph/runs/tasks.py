"""What networks of a run may be for: each task is an entry of ``TASKS``."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunegraph.artefacts.pruned import PrunedInfo
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ArtefactError, ConfigError, DataError, suggest
from prunegraph.core.reading import checked
from prunegraph.core.task import Task
from prunegraph.core.user_code import HF_PREFIX
from prunegraph.data.sentences import find_table
from prunegraph.data.speech import SpeechData
from prunegraph.graph import StructureGraph, copy_network
from prunegraph.models import load_weights, pretrained_folder, weights_info
from prunegraph.models.embedded_language import build_embedded, byte_tokenizer
from prunegraph.models.recogniser import HEADS, Recogniser, build_recogniser
from prunegraph.runs.options.config import CommonConfig, NetworkConfig, NetworksConfig
from prunegraph.runs.options.tasks import IMAGES, TaskOptions
from prunegraph.runs.parallel.machine import resolve_device
from prunegraph.runs.prepare import check_network, load_classifier, resolve_arch, structure_of
from prunegraph.runs.target import Target
from prunegraph.tasks.causal_lm import causal_lm
from prunegraph.tasks.speech_recognition import load_speech_data, speech_recognition
from prunegraph.tasks.text_classification import text_classification
from prunegraph.tasks.whisper import whisper_recognition
from prunegraph.training.embedded import RECIPE as EMBEDDED_RECIPE
from prunegraph.training.loop import FinetuneConfig

LANGUAGE_RECIPE = FinetuneConfig(epochs=0, batch_size=8, peak_lr=1e-4, optimizer="adamw")
"""Of a fine-tune of a language model: none, unless epochs are asked for."""

SENTENCES_RECIPE = FinetuneConfig(epochs=0, batch_size=32, peak_lr=1e-4, optimizer="adamw")
"""The same of a classifier of sentences."""

ENCODER_EPOCHS, ENCODER_WARMUP = 3, 0.1
"""Of the training of a head with fresh weights and its encoder, before anything is pruned."""

NUM_CALIBRATION = 256
"""Rows of sentences by which weights are chosen and changed."""

CALIBRATION_TOKENS = 16_384
"""Without ``--calibration-tokens``, so many are drawn of the calibration text, by each seed."""


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


RECOGNISER_SIZES = {
    "features": (1, 1024),
    "tokens": (2, 100_000),
    "width": (HEADS, 4096),
    "convolutions": (2, 64),
    "stride": (1, 4),
    "attentions": (0, 64),
}
"""Smallest and largest sizes of a recogniser that a file may ask to be built."""


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """A kind of task.

    Attributes:
        load: loads a network with its data, as the options say, for a budget or None.
        arch: returns the network's name without loading it.
        options: those that it takes and not all tasks do.
    """

    load: Callable[[NetworkConfig, Budget | None], Target]
    arch: Callable[[NetworkConfig], str]
    options: frozenset[str]


def load_target(config: NetworkConfig, budget: Budget | None = None) -> Target:
    """Load everything that a network needs, and check it before anything long starts.

    Args:
        config: which network, weights and data.
        budget: if given, checked to be within reach.

    Raises:
        PruneGraphError: something is missing, damaged, contradictory, or cannot be met.
    """
    return _kind(config).load(with_folder(config), budget)


def with_folder(config: NetworkConfig) -> NetworkConfig:
    """Return the options with the folder that ``--weights hf:FOLDER_OR_NAME`` stands for.

    Raises:
        ModelError: it is no folder, not in the cache of transformers, and cannot be fetched.
    """
    if not str(config.weights).startswith(HF_PREFIX):
        return config
    return dataclasses.replace(config, weights=pretrained_folder(str(config.weights)))


def arch_of(config: NetworkConfig) -> str:
    """Return the name of the network that options ask for."""
    return _kind(config).arch(with_folder(config))


def load_begun(run: CommonConfig, name: str, dense: Path, budget: Budget, **given: Any) -> Target:
    """Load the network of a run folder, with its own dense weights.

    Args:
        run: the run's options.
        name: of the network, as the report has it: a run may be of several.
        dense: the weights file in the folder.
        budget: the run's.
        given: options that stand in place of the run's.
    """
    if task_name(run) == IMAGES:
        names = {field.name for field in dataclasses.fields(NetworkConfig)} - {"pretrain_epochs"}
        values = {name: getattr(run, name) for name in names}
        return load_classifier(NetworkConfig(**values | given | {"weights": dense}), budget)
    networks = run.network_configs() if isinstance(run, NetworksConfig) else [run]
    own = next(
        each for each in networks if isinstance(each, NetworkConfig) and arch_of(each) == name
    )
    target = load_target(dataclasses.replace(own, device=given["device"]), budget)
    load_weights(target.model, dense)
    return target


def task_name(config: object) -> str:
    """Return the name of the task that options ask for."""
    return config.task if isinstance(config, TaskOptions) else IMAGES


def _kind(config: NetworkConfig) -> TaskKind:
    """Return the kind of task that options ask for, if they fit it.

    Raises:
        ConfigError: there is none of that name, or an option is of another one.
    """
    name = task_name(config)
    if name not in TASKS:
        msg = f"unknown task {name!r}{suggest(name, TASKS)}; known: {', '.join(TASKS)}"
        raise ConfigError(msg)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for other, kind in TASKS.items():
        odd = sorted(kind.options - TASKS[name].options)
        given = [each for each in odd if getattr(config, each, None) != defaults.get(each)]
        if given:
            msg = f"--{given[0].replace('_', '-')} is of --task {other}, not of {name}: drop it"
            raise ConfigError(msg)
    return TASKS[name]


def _classifier_arch(config: NetworkConfig) -> str:
    info = weights_info(config.weights) if config.weights else None
    return resolve_arch(config.arch, config.weights, info)


def load_language_model(config: NetworkConfig, budget: Budget | None = None) -> Target:
    """Load a causal language model of transformers with its texts."""
    assert isinstance(config, TaskOptions)
    device = resolve_device(config.device)
    task = causal_lm(
        build_embedded(config.seed) if config.weights is None else config.weights,
        byte_tokenizer() if config.weights is None else None,
        calibration=config.calibration_text,
        test=config.test_text,
        window=config.window,
        seed=config.seed,
        calibration_tokens=None,
        name=_language_model(config),
    )
    window = task.train.source.load(task.train.index[:1])["input_ids"]
    num_windows = max((config.calibration_tokens or CALIBRATION_TOKENS) // window.shape[1], 1)
    if config.calibration_tokens is not None and num_windows > len(task.train):
        msg = (
            f"--calibration-tokens {config.calibration_tokens} asks for {num_windows} windows of "
            f"{window.shape[1]} tokens, the calibration text has {len(task.train)}: give more text"
        )
        raise DataError(msg)
    task = dataclasses.replace(task, search=task.search.sample(num_windows, config.seed))
    task.place_model(task.model, device)
    return Target(
        task=task,
        data_name="text" if config.test_text is None else config.test_text.name,
        saved=PrunedInfo(
            arch=task.name,
            num_classes=1,
            example_shape=tuple(window.shape),
            extra={"task": "causal_lm"},
        ),
        build=lambda: copy_network(task.model).cpu(),
        structure=_structure(task, config, budget),
        tokenizer=task.tokenizer_folder or task.tokenizer or False,
        pretraining=EMBEDDED_RECIPE if config.weights is None else None,
        num_calibration=num_windows,
        recipe=LANGUAGE_RECIPE,
    )


def load_sentence_classifier(config: NetworkConfig, budget: Budget | None = None) -> Target:
    """Load a classifier of sentences, or an encoder, of transformers with a table of sentences.

    An encoder alone gets a head, and is trained on the table before anything is pruned.
    """
    assert isinstance(config, TaskOptions)
    if config.weights is None or config.data_dir is None or config.dataset is None:
        msg = (
            "text_classification needs --weights FOLDER of an encoder (save_pretrained of "
            "transformers), and --data-dir FOLDER with the table of --dataset NAME, NAME.tsv.gz"
        )
        raise ConfigError(msg)
    task = text_classification(
        config.weights,
        find_table(config.data_dir, config.dataset),
        test=config.report_on,
        seed=config.seed,
    )
    task.place_model(task.model, resolve_device(config.device))
    epochs = config.pretrain_epochs
    if epochs is None:
        epochs = ENCODER_EPOCHS if task.untrained else 0
    pretraining = dataclasses.replace(
        SENTENCES_RECIPE, epochs=epochs, warmup_epochs=min(ENCODER_WARMUP, epochs / 2)
    )
    inputs: Any = task.example_inputs
    return Target(
        task=task,
        data_name=config.dataset,
        saved=PrunedInfo(
            arch=task.name,
            num_classes=task.num_outputs,
            example_shape=tuple(inputs["input_ids"].shape),
            extra={"task": task.kind},
        ),
        build=lambda: copy_network(task.model).cpu(),
        structure=_structure(task, config, budget),
        tokenizer=config.weights,
        pretraining=pretraining if epochs else None,
        num_calibration=NUM_CALIBRATION,
        recipe=SENTENCES_RECIPE,
    )


def _structure(task: Task, config: NetworkConfig, budget: Budget | None) -> StructureGraph | None:
    """Return the structure of a network where channels are chosen, checked, else None."""
    structure = structure_of(task.model, task.example_inputs, config, budget)
    if structure is not None:
        check_network(task.name, structure)
    return structure


def _language_model(config: NetworkConfig) -> str:
    return "embedded" if config.weights is None else config.weights.resolve().name


def load_recogniser(config: NetworkConfig, budget: Budget | None = None) -> Target:
    """Load a recogniser of speech with its utterances.

    Its structure is analysed where channels are chosen alone.
    """
    assert isinstance(config, TaskOptions)
    device = resolve_device(config.device)
    data = load_speech_data(config.data_dir, config.languages)
    if config.weights is not None and config.weights.is_dir():
        return _whisper(config.weights, data, device)
    task = speech_recognition(data=data, seed=config.seed, name=_recogniser(config))
    if config.weights is not None:
        load_weights(task.model, config.weights)
    task.place_model(task.model, device)
    structure = _structure(task, config, budget)
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
        pretraining=recipe if config.weights is None else None,
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
            arch=task.name,
            num_classes=1,
            example_shape=(1, task.bands, task.window),
            extra={"task": task.kind},
        ),
        build=lambda: copy_network(task.model).cpu(),
        tokenizer=task.tokenizer_folder,
        recipe=LANGUAGE_RECIPE,
    )


def recogniser_of(info: PrunedInfo) -> nn.Module:
    """Return the recogniser of a saved network, with fresh weights.

    Raises:
        ArtefactError: its sizes are damaged, or too large.
    """
    sizes = checked(info.extra.get("sizes"), dict[str, int], f"the sizes of {info.arch}")
    if sizes.keys() != RECOGNISER_SIZES.keys() or not all(
        low <= sizes[name] <= high for name, (low, high) in RECOGNISER_SIZES.items()
    ):
        msg = f"the sizes of {info.arch} are damaged: {sizes}"
        raise ArtefactError(msg)
    return build_recogniser(**sizes)


def _recogniser(config: NetworkConfig) -> str:
    return "recogniser" if config.weights is None else config.weights.resolve().stem


TASKS: Mapping[str, TaskKind] = {
    IMAGES: TaskKind(
        load=load_classifier,
        arch=_classifier_arch,
        options=frozenset(
            {
                *("arch", "dataset", "data_dir", "image_size", "search_share", "split_seed"),
                *("no_flip", "pretrain_epochs"),
            }
        ),
    ),
    "causal_lm": TaskKind(
        load=load_language_model,
        arch=_language_model,
        options=frozenset({"calibration_text", "test_text", "calibration_tokens", "window"}),
    ),
    "text_classification": TaskKind(
        load=load_sentence_classifier,
        arch=_language_model,
        options=frozenset({"dataset", "data_dir", "pretrain_epochs", "report_on"}),
    ),
    "speech_recognition": TaskKind(
        load=load_recogniser,
        arch=_recogniser,
        options=frozenset({"data_dir", "languages"}),
    ),
}
"""Every task by its name on the command line."""
