"""The networks that a trial prunes: the model, with weights in which mistakes show."""

import math
import warnings
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunegraph.graph.copying import copy_network
from prunegraph.graph.late_weights import draw
from prunegraph.graph.surgery import Factors, multiply
from prunegraph.graph.trace.calls import tensors_in

SILENT = 1e-3
"""A parameter with no larger value, or one value throughout, is drawn anew for the trials."""

QUIET = 0.2
"""So is a weight that shrinks what it reads to less of it: scores of tokens would hardly differ."""

BOLD_GAIN = 1.5
"""What bold weights multiply the size of their inputs by, at least."""

UNEVEN = (0.5, 1.5)
"""Between these lie the numbers by which rows and columns of bold weights are multiplied."""

ERRORS = (Exception,)
"""What a forward may raise that cannot follow."""


class Forward(Protocol):
    """Calls a network of the model's type on the example inputs, cast if a type is given."""

    def __call__(self, network: nn.Module, dtype: torch.dtype | None, *, seed: int = 0) -> Any:
        """Return its outputs."""


def awake(model: nn.Module) -> nn.Module:
    """Return a network for trials in which no parameter is silent, so that mistakes show.

    A last layer of zeros or a layer scale of 1e-6, as networks have before training, would hide
    whatever comes before it. The model itself, if nothing in it is silent.
    """
    silent = {id(parameter) for parameter in model.parameters() if _is_silent(parameter)}
    if not silent:
        return model
    shared = {id(p): p for p in model.parameters() if id(p) not in silent}
    network = copy_network(model, shared)
    generator = torch.Generator().manual_seed(0)
    for parameter in (item for item in network.parameters() if id(item) not in shared):
        drawn = draw(torch.empty(parameter.shape), generator)  # on the CPU: the same everywhere
        parameter.data.copy_(drawn)
    return network


def is_sound(model: nn.Module, run: Forward) -> bool:
    """Return whether a forward runs, and gives finite outputs."""
    try:
        outputs = tensors_in(run(model, None))
    except ERRORS:
        return False
    return all(bool(torch.isfinite(t).all()) for t in outputs if t.is_floating_point())


def run_in_training(network: nn.Module, run: Forward) -> None:
    """Put a network in training mode, and run it."""
    with warnings.catch_warnings(action="ignore"):  # of checkpoints without gradients, say
        network.train()
        run(network, None)


def _is_silent(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is tiny, the same everywhere, or hardly passes anything on."""
    if not parameter.is_floating_point() or not parameter.numel():
        return False
    least, most = (float(value) for value in parameter.detach().aminmax())
    fan_in = math.prod(parameter.shape[1:])
    return least == most or max(-least, most) < SILENT or (fan_in > 1 and _gain(parameter) < QUIET)


def _gain(parameter: nn.Parameter) -> float:
    """Return what a weight multiplies the size of its inputs by."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    norm = float(torch.linalg.vector_norm(parameter.detach(), dtype=dtype))
    return norm * math.sqrt(math.prod(parameter.shape[1:]) / parameter.numel())


class Subject:
    """A network that trials prune.

    Args:
        model: in eval mode; see ``awake``.
        run: calls a network of its type on the example inputs.
        lately: weights of copies can be made when they are read.
        bold: a round makes weights larger, and each row and column another size, as training might.
            Before training attention is nearly even: what does its scores wrong hardly shows.

    Attributes:
        factors: what that round multiplies by; None where the whole network is then found to give
            no finite outputs.
    """

    def __init__(
        self, model: nn.Module, run: Forward, *, lately: bool = False, bold: bool = False
    ) -> None:
        self.model, self.run, self.lately = model, run, lately
        generator = torch.Generator().manual_seed(1)
        self.factors: Factors | None = {
            id(parameter): _uneven(parameter, generator)
            for parameter in (model.parameters() if bold else ())
            if parameter.is_floating_point() and parameter.ndim > 1 and parameter.numel()
        }

    def outputs(self, seed: int = 0) -> list[Tensor]:
        """Return what the whole network gives."""
        return tensors_in(self.run(self.model, None, seed=seed))

    @cached_property
    def is_sound_if_bold(self) -> bool:
        """Whether the whole network gives finite outputs so; the factors are dropped if not."""
        memo: dict[int, Tensor] = {}
        multiply(self.model, memo, self.factors or {}, {}, lately=self.lately)
        sound = is_sound(copy_network(self.model, memo, share=self.lately), self.run)
        self.factors = self.factors if sound else None
        return sound

    @cached_property
    def can_train(self) -> bool:
        """Whether the whole network runs in training mode: it may need targets."""
        copied = copy_network(self.model)
        try:
            run_in_training(copied, self.run)
        except ERRORS:
            return False
        return True


def _uneven(parameter: nn.Parameter, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return what to multiply the rows of a weight by, and its columns."""
    gain = max(1.0, BOLD_GAIN / max(_gain(parameter), SILENT))
    rows, columns = (
        torch.empty(size).uniform_(*UNEVEN, generator=generator) for size in parameter.shape[:2]
    )
    return tuple(item.to(parameter.device, parameter.dtype) for item in (rows * gain, columns))
