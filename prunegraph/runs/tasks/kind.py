"""What a task says of itself to the commands."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from prunegraph.artefacts.pruned import PrunedInfo
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from prunegraph.graph import ExampleInputs
from prunegraph.runs.options.config import NetworkConfig
from prunegraph.runs.target import Target
from prunegraph.training.loop import FinetuneConfig


def random_numbers(info: PrunedInfo, seed: int) -> ExampleInputs:
    """Return random numbers of the shape that a saved network was analysed on."""
    return torch.randn(info.example_shape, generator=torch.Generator().manual_seed(seed))


def token_numbers(info: PrunedInfo, _seed: int) -> ExampleInputs:
    """Return tokens of the shape that a saved network was analysed on."""
    return torch.zeros(info.example_shape, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """A kind of task.

    Attributes:
        load: loads a network with its data, as the options say, for a budget or None.
        arch: returns the network's name without loading it.
        options: those that it takes and not all tasks do.
        build: makes the dense network of a saved one; of what lies in a folder of its own, by that
            folder, None where the run's options name none.
        example: inputs of a saved network, with random numbers of a seed.
    """

    load: Callable[[NetworkConfig, Budget | None], Target]
    arch: Callable[[NetworkConfig], str]
    options: frozenset[str]
    build: Callable[[Path | None, PrunedInfo], nn.Module]
    example: Callable[[PrunedInfo, int], ExampleInputs]


def pretraining_of(config: NetworkConfig, recipe: FinetuneConfig) -> FinetuneConfig | None:
    """Return how a network without weights is trained first; None: it is taken as it is.

    Raises:
        ConfigError: epochs are asked for beside weights.
    """
    epochs = config.pretrain_epochs
    if config.weights is not None:
        if epochs:
            msg = (
                "--weights and --pretrain-epochs exclude each other: a network is trained or loaded"
            )
            raise ConfigError(msg)
        return None
    epochs = recipe.epochs if epochs is None else epochs
    warmup = min(recipe.warmup_epochs, epochs / 2)
    return dataclasses.replace(recipe, epochs=epochs, warmup_epochs=warmup) if epochs else None


def folder_name(config: NetworkConfig) -> str:
    """Return the name of a network of transformers: its folder's."""
    return "embedded" if config.weights is None else config.weights.resolve().name
