"""How far a training is: written to a file, and read back by the same training."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunegraph.core.errors import ArtefactError
from prunegraph.core.reading import checked, parse_json
from prunegraph.core.tensors import (
    holds_numbers,
    load_state,
    read_safetensors,
    state_tensors,
    to_safetensors,
)
from prunegraph.training.masked import MaskedWeights

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

    def to_bytes(self, generators: Mapping[str, Tensor]) -> bytes:
        """Return the whole state as a safetensors file.

        Args:
            generators: states of the random generators, within an epoch.
        """
        tensors = {f"model.{n}": t for n, t in state_tensors(self.model).items()}
        tensors |= {f"random.{n}": t for n, t in generators.items()}
        for name, parameter in self.trainable.items():
            averages = self.optimizer.state[parameter]
            tensors |= {f"optimizer.{key}.{name}": value for key, value in averages.items()}
        if self.masked is not None:
            tensors |= {f"masked.{n}": t for n, t in self.masked.tensors().items()}
        record = {"identity": self.identity, **asdict(self.done)}
        return to_safetensors(tensors, {"training": json.dumps(record)})

    def restore(self, path: Path) -> None:
        """Continue from a file.

        Raises:
            ArtefactError: it is damaged or of another training.
        """
        tensors, metadata = read_safetensors(path)
        done = self._done(path, metadata)
        generators = _of(tensors, "random.")
        whole = done.step == 0 or all(map(_is_cpu_state, map(generators.get, CPU_GENERATORS)))
        if not (whole and 0 <= done.step < self.steps_per_epoch):
            msg = f"{path}: the state within an epoch is damaged: delete the file to start over"
            raise ArtefactError(msg)
        load_state(self.model, _of(tensors, "model."), path)
        if self.masked is not None:
            self.masked.restore(_of(tensors, "masked."), path)
        for place, average in _of(tensors, "optimizer.").items():
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

    def _done(self, path: Path, metadata: Mapping[str, str]) -> Done:
        """Return what the file says was done, if it is of this training."""
        if "training" not in metadata:
            msg = f"{path} is no training checkpoint of prunegraph: choose another file name"
            raise ArtefactError(msg)
        shape = {"identity": dict[str, Any]}
        record = checked(parse_json(metadata["training"], path), shape, str(path))
        theirs = record.pop("identity")
        differing = [key for key, value in self.identity.items() if theirs.get(key) != value]
        if differing:
            msg = (
                f"{path} is the checkpoint of another training (different {', '.join(differing)}): "
                "delete it, or choose another output folder"
            )
            raise ArtefactError(msg)
        done: Done = checked(record, Done, str(path))
        return done


def _of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _is_cpu_state(state: Tensor | None) -> bool:
    try:
        torch.Generator().set_state(state)  # type: ignore[arg-type]  # None is refused, too
    except (RuntimeError, TypeError):
        return False
    return True
