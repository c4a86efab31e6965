"""How far a training is: written to a file, and read back by the same training."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunegraph.core.errors import ArtefactError
from prunegraph.core.states import part_of, read_state, write_state
from prunegraph.core.tensors import holds_numbers, load_state, state_tensors
from prunegraph.training.masked import MaskedWeights

WHAT = "training"

CPU_GENERATORS = ("augmentation", "cpu")
"""Random generators whose states every checkpoint within an epoch holds."""


@dataclass(kw_only=True)
class Done:
    """What was done of a training.

    Attributes:
        losses: mean training loss of every whole epoch.
        seconds: training time.
        step: steps of the epoch that has begun; 0 between epochs.
        total: sum of their losses.
        notes: what else the training has to know, as JSON values.
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    step: int = 0
    total: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class TrainingState:
    """What a training has to keep to go on to the same result.

    The random state of an epoch begins with (seed, epoch), so it is kept within an epoch only.

    Attributes:
        model: the network, not wrapped.
        trainable: its parameters that are trained, by name.
        optimizer: SGD or AdamW, whose averages are kept.
        identity: what tells this training from others.
        steps_per_epoch: steps that an epoch takes.
        done: what was done.
        generators: states of random generators by name that a file within an epoch held.
        masked: which of its weights are zero; None = nobody asked.
    """

    model: nn.Module
    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    identity: dict[str, Any]
    steps_per_epoch: int
    done: Done = field(default_factory=Done)
    generators: dict[str, Tensor] = field(default_factory=dict)
    masked: MaskedWeights | None = None

    def write(self, path: Path, generators: Mapping[str, Tensor]) -> None:
        """Write the whole state.

        Args:
            path: of the file.
            generators: states of the random generators, within an epoch.
        """
        averages = {
            f"{key}.{name}": value
            for name, parameter in self.trainable.items()
            for key, value in self.optimizer.state[parameter].items()
        }
        parts = {
            "model": state_tensors(self.model),
            "random": generators,
            "optimizer": averages,
            "masked": {} if self.masked is None else self.masked.tensors(),
        }
        write_state(path, WHAT, self.identity, asdict(self.done), parts)

    def restore(self, path: Path) -> None:
        """Continue from a file.

        Raises:
            ArtefactError: it is damaged or of another training.
        """
        done, tensors = read_state(path, WHAT, self.identity, Done)
        generators = part_of(tensors, "random")
        whole = done.step == 0 or all(map(_is_cpu_state, map(generators.get, CPU_GENERATORS)))
        if not (whole and 0 <= done.step < self.steps_per_epoch):
            msg = f"{path}: the state within an epoch is damaged: delete the file to start over"
            raise ArtefactError(msg)
        load_state(self.model, part_of(tensors, "model"), path)
        if self.masked is not None:
            self.masked.restore(part_of(tensors, "masked"), path)
        for place, average in part_of(tensors, "optimizer").items():
            key, _, name = place.partition(".")
            parameter = self.trainable.get(name)
            if parameter is None:
                continue
            counts = key == "step"
            fits = average.shape == (() if counts else parameter.shape)
            if not fits or not holds_numbers(average):
                msg = f"{path}: the {key} of {name} is damaged: delete the file to start over"
                raise ArtefactError(msg)
            value = average if counts else torch.empty_like(parameter).copy_(average)
            self.optimizer.state[parameter][key] = value
        self.done, self.generators = done, generators


def _is_cpu_state(state: Tensor | None) -> bool:
    try:
        torch.Generator().set_state(state)  # type: ignore[arg-type]  # None is refused, too
    except (RuntimeError, TypeError):
        return False
    return True
