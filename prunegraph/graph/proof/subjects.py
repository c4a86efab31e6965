"""The networks that a trial prunes: the model, with weights in which mistakes show."""

import math
from typing import Any, Protocol

import torch
from torch import nn

from prunegraph.graph.copying import copy_network
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
        scale = math.prod(parameter.shape[1:]) == 1
        most = _even(parameter)
        _draw(parameter, (0.5, 1.5) if scale else (-most, most), generator)
    return network


def _even(parameter: nn.Parameter) -> float:
    """Return up to which values weights are drawn that keep the size of their inputs."""
    most: float = (3 / math.prod(parameter.shape[1:])) ** 0.5
    return most


def _draw(
    parameter: nn.Parameter, between: tuple[float, float], generator: torch.Generator
) -> None:
    """Draw the values of a parameter; on the CPU, so that they are the same on each device."""
    parameter.data.copy_(torch.empty(parameter.shape).uniform_(*between, generator=generator))


def is_sound(model: nn.Module, run: Forward) -> bool:
    """Return whether a forward runs, and gives finite outputs."""
    try:
        outputs = tensors_in(run(model, None))
    except ERRORS:
        return False
    return all(bool(torch.isfinite(t).all()) for t in outputs if t.is_floating_point())


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


class Bold:
    """Makes weights larger, and each row and column another size, as training might.

    Before training attention is nearly even: what does its scores wrong hardly shows.

    Args:
        model: the network that is tried; see ``awake``.
        run: calls a network of its type on the example inputs.
        lately: weights of copies can be made when they are read.

    Attributes:
        factors: what to multiply by; None where the whole network is then found to give no
            finite outputs.
    """

    def __init__(self, model: nn.Module, run: Forward, *, lately: bool) -> None:
        self._model, self._run, self._lately = model, run, lately
        self._is_sound: bool | None = None
        generator = torch.Generator().manual_seed(1)
        self.factors: Factors | None = {
            id(parameter): _uneven(parameter, generator)
            for parameter in model.parameters()
            if parameter.is_floating_point() and parameter.ndim > 1 and parameter.numel()
        }

    def is_sound(self) -> bool:
        """Return whether the whole network gives finite outputs; drop the factors if not."""
        if self._is_sound is None:
            memo: dict[int, torch.Tensor] = {}
            multiply(self._model, memo, self.factors or {}, lately=self._lately)
            copied = copy_network(self._model, memo, share=self._lately)
            self._is_sound = is_sound(copied, self._run)
            if not self._is_sound:
                self.factors = None
        return self._is_sound


def _uneven(parameter: nn.Parameter, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Return what to multiply the rows of a weight by, and its columns."""
    gain = max(1.0, BOLD_GAIN / max(_gain(parameter), SILENT))
    rows, columns = (
        torch.empty(size).uniform_(*UNEVEN, generator=generator) for size in parameter.shape[:2]
    )
    return tuple(item.to(parameter.device, parameter.dtype) for item in (rows * gain, columns))
