"""What networks of a run may be for: each task by its name on the command line."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunegraph.artefacts.pruned import PrunedInfo
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError, suggest
from prunegraph.core.user_code import HF_PREFIX
from prunegraph.models import load_weights, pretrained_folder
from prunegraph.runs.options.compare import RunConfig
from prunegraph.runs.options.config import NetworkConfig, TrainConfig
from prunegraph.runs.options.tasks import IMAGES, TaskOptions
from prunegraph.runs.target import Target
from prunegraph.runs.tasks import (
    causal_lm,
    image_classification,
    speech_recognition,
    text_classification,
)
from prunegraph.runs.tasks.kind import TaskKind

TASKS: Mapping[str, TaskKind] = {
    IMAGES: image_classification.KIND,
    "causal_lm": causal_lm.KIND,
    "text_classification": text_classification.KIND,
    "speech_recognition": speech_recognition.KIND,
}
"""Every task by its name."""


def kind_of_saved(info: PrunedInfo) -> TaskKind:
    """Return the task of a saved network; of a user's own that of images."""
    return TASKS.get(str(info.extra.get("task")), TASKS[IMAGES])


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


def network_configs(config: RunConfig) -> Sequence[NetworkConfig]:
    """Return the options of each network alone."""
    return config.network_configs() if isinstance(config, TrainConfig) else [config]


def load_begun(run: RunConfig, name: str, dense: Path, budget: Budget, **given: Any) -> Target:
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
        return TASKS[IMAGES].load(NetworkConfig(**values | given | {"weights": dense}), budget)
    own = next(each for each in network_configs(run) if arch_of(each) == name)
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
            flag = "no-" * (defaults[given[0]] is True) + given[0].replace("_", "-")
            msg = f"--{flag} is of --task {other}, not of {name}: drop it"
            raise ConfigError(msg)
    return TASKS[name]
