"""A layer of neurons with fewer of them: all its weights change so that it gives what is wanted.

``f(x) = W2 (phi(Wg x) * (Wu x))``, or ``W2 phi(Wg x)`` of a layer without gate. Least squares
changes W2 alone. ADMM splits the layer at ``s = Wg x``, ``z = Wu x`` and ``p = phi(s) * z`` and
changes one after the other by least squares, as SparseLLM does for single weights (Bai et al. 2024,
arXiv 2402.17946); columns in place of single weights, constants and stop are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunegraph.layerwise.statistics import fitted_change

Activation = Callable[[Tensor], Tensor]

FAITH = 10.0
"""Weight of the layer's outputs against that of its parts, both of mean scale 1."""

NEWTON_STEPS = 3
"""Of Gauss and Newton, for what goes into the activation."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Neurons:
    """The weights of a layer of k neurons; biases are a last column, by an input that is 1.

    Attributes:
        gate: ``[k, D]`` into the activation.
        up: ``[k, D]`` what the activation is multiplied by, or None.
        down: ``[out, k]``, or ``[out, k + 1]`` with a bias.
        activation: phi.
    """

    gate: Tensor
    up: Tensor | None
    down: Tensor
    activation: Activation

    def hidden(self, inputs: Tensor) -> Tensor:
        """Return ``[S, k]`` what the last weight reads."""
        values = self.activation(inputs @ self.gate.T)
        return values if self.up is None else values * (inputs @ self.up.T)


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """What a layer is fitted on.

    Attributes:
        inputs: ``[S, D]`` what it reads.
        wanted: ``[S, out]`` what it should give.
        scale: ``[S, 1]`` root of the weight of each row's squared error.
    """

    inputs: Tensor
    wanted: Tensor
    scale: Tensor

    def __getitem__(self, part: slice) -> "Rows":
        """Return some of the rows."""
        return Rows(inputs=self.inputs[part], wanted=self.wanted[part], scale=self.scale[part])

    def parted(self, share: float) -> tuple["Rows", "Rows"]:
        """Return a first share of the rows, and the others; all twice if there are no others."""
        count = round(share * len(self.wanted))
        if count == len(self.wanted):
            return self, self
        return self[:count], self[count:]

    def error(self, weight: Tensor, hidden: Tensor) -> float:
        """Return the weighted mean squared error of what a last weight makes of ``[S, k]``."""
        missing = (self.wanted - biased(hidden, weight) @ weight.T) * self.scale
        return float(missing.square().sum(1).mean())

    def refitted(self, weight: Tensor, hidden: Tensor) -> Tensor:
        """Return a last weight, changed by least squares with a ridge around what it is."""
        hidden = biased(hidden, weight)
        missing = (self.wanted - hidden @ weight.T) * self.scale
        return weight + fitted_change(hidden * self.scale, missing)


def biased(values: Tensor, weight: Tensor) -> Tensor:
    """Return rows ``[S, k]`` with a 1 at the end of each, if a weight has a column for it."""
    if values.shape[1] == weight.shape[1]:
        return values
    return torch.cat([values, torch.ones_like(values[:, :1])], dim=1)


def fit_neurons(
    own: Neurons, rows: Rows, held_out: Rows, rounds: int
) -> tuple[Neurons, list[float]]:
    """Return the neurons of least error on held-out rows, and the errors of all rounds.

    The first error is that of least squares alone. It stops at the first round that is no better.

    Args:
        own: the neurons that stay, with their dense weights.
        rows: to fit on.
        held_out: to stop by.
        rounds: of ADMM, at most.
    """
    own = replace(own, down=rows.refitted(own.down, own.hidden(rows.inputs)))
    errors = [held_out.error(own.down, own.hidden(held_out.inputs))]
    for _ in range(rounds):
        tried = admm_round(own, rows)
        errors.append(held_out.error(tried.down, tried.hidden(held_out.inputs)))
        if not errors[-1] < errors[-2]:
            break
        own = tried
    return own, errors


def admm_round(own: Neurons, rows: Rows) -> Neurons:
    """Return neurons after one round: p, z, s, then the weights that make them, then the last."""
    inputs, size = rows.inputs, own.gate.shape[0]
    start = inputs @ own.gate.T  # [S, k]
    factor = None if own.up is None else inputs @ own.up.T
    value = own.activation(start)
    down, wanted = own.down[:, :size], rows.wanted - own.down[:, size:].sum(1)
    weight = FAITH * size / down.square().sum()
    system = weight * down.T @ down
    system.diagonal().add_(1.0)
    pulled = weight * wanted @ down + (value if factor is None else value * factor)
    hidden = torch.linalg.solve(system, pulled, left=False)  # [S, k]
    other = factor if factor is None else (factor + value * hidden) / (1.0 + value.square())
    inner = _inner(own.activation, start, other, hidden)
    missing = inner - start
    if factor is None or other is None or own.up is None:
        gate, up = own.gate + fitted_change(inputs * rows.scale, missing * rows.scale), None
    else:
        missing = torch.cat([missing, other - factor], dim=1)
        change = fitted_change(inputs * rows.scale, missing * rows.scale)
        gate, up = own.gate + change[:size], own.up + change[size:]
    changed = replace(own, gate=gate, up=up)
    return replace(changed, down=rows.refitted(own.down, changed.hidden(inputs)))


def _inner(activation: Activation, start: Tensor, factor: Tensor | None, hidden: Tensor) -> Tensor:
    """Return what goes into the activation: near ``start``, and so that it gives ``hidden``."""
    inner = start
    for _ in range(NEWTON_STEPS):
        with torch.enable_grad():
            given = inner.detach().requires_grad_()
            value = activation(given)
            (slope,) = torch.autograd.grad(value.sum(), given)
        value = value.detach()
        if factor is not None:
            value, slope = value * factor, slope * factor
        step = inner - start + (value - hidden) * slope
        inner = inner - step / (1.0 + slope.square())
    return inner
