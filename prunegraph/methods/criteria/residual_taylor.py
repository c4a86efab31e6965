"""Taylor importance of what a channel gives beyond what the others make up for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prunegraph.core.masks import Float64Array, IntArray
from prunegraph.layerwise.capture import Read
from prunegraph.layerwise.sampling import POSITIONS, input_axis
from prunegraph.layerwise.statistics import MOST_INPUTS, RIDGE, TINY, InputSums
from prunegraph.methods.criteria.dense import Dense
from prunegraph.methods.criteria.registry import measured_criterion
from prunegraph.methods.criteria.taylor import Effects
from prunegraph.methods.criteria.thinet import TIE_BREAK

BATCH_SIZE = 64

STEPS = 64
"""A group's units go in so many steps at the most; in each, several that are seen one by one."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads units of a group.

    Attributes:
        inverse: ``[U, U]`` of the correlations of all U units that it reads and are left, with
            ``RIDGE`` on the diagonal; changed when a unit goes.
        places: ``[k]`` of the group's units in it.
        effects: ``[k]`` their Taylor importance in this layer alone, float64.
    """

    inverse: Tensor
    places: Tensor
    effects: Tensor


@measured_criterion("residual_taylor", num_samples=512)
def residual_taylor(dense: Dense) -> Float64Array:
    """Return what the loss gains when a unit goes and the others make up for what they can.

    For each layer that reads a unit the Taylor importance (see ``statistics.measure``) times the
    unit's *tolerance*, ``1 - R^2``: the share of its variance that the other units which
    the layer reads do not explain, by ridge regression. What they do explain, ``Reconstruction``
    adds to their weights. The units of a group go one after another, the least first, and explain
    nothing from then on; each has the value at which it goes, or that of the one before if that is
    higher.

    Where nothing is reconstructed, by groups, or from rows alone (layers that read more than
    ``MOST_INPUTS`` values) the tolerance is 1. Depthwise convolutions pass a unit on to the layer
    that reads it next, and do not count.

    Returns:
        ``[N]`` from 0 up, rising in the order in which a group's units go; NaN where a unit is
        not read.
    """
    graph, effects = dense.graph, dict[str, Effects]()
    sums: dict[str, InputSums] = {}
    units: dict[str, IntArray] = {}
    reconstructed: dict[str, bool] = {}
    generator = torch.Generator().manual_seed(dense.seed)

    def visit(read: Read) -> None:
        name = str(read.op.param)
        if read.op.depthwise or not read.activation.requires_grad:
            return
        effects.setdefault(name, Effects(graph.num_units)).visit(read)
        units[name] = read.unique
        if name not in reconstructed:
            reconstructed[name] = _is_reconstructed(read)
        if reconstructed[name]:
            rows = _class_rows(read, generator)
            sums.setdefault(name, InputSums(rows)).add(rows)

    dense.show_gradients(visit, BATCH_SIZE)
    inverses = {
        name: _inverse(found.statistics(name, centred=True).products)
        for name, found in sums.items()
    }
    values = np.full(graph.num_units, np.nan)
    for group in graph.groups:
        names = [name for name, unique in units.items() if np.isin(group.units, unique).any()]
        if not names:
            continue
        own = np.intersect1d(group.units, np.concatenate([units[name] for name in names]))
        readers = [
            _reader(own, units[name], inverses.get(name), effects[name].squared_effect)
            for name in names
        ]
        values[own] = greedy_values(readers) / max(dense.num_samples, 1)
    return values


def _reader(
    own: IntArray, unique: IntArray, inverse: Tensor | None, effects: Float64Array
) -> Reader:
    """Return a layer that reads ``unique`` as it sees ``own``; what it does not read is apart."""
    if inverse is None:  # nothing explains anything
        places = np.arange(own.size)
        inverse = torch.eye(own.size, dtype=torch.float64) / (1.0 + RIDGE)
    else:
        unread = ~np.isin(own, unique)
        places = np.searchsorted(unique, own)
        places[unread] = unique.size + np.arange(unread.sum())
        apart = torch.eye(int(unread.sum()), dtype=torch.float64)
        inverse = torch.block_diag(inverse, apart)
    return Reader(inverse, torch.from_numpy(places), torch.from_numpy(effects[own]))


def greedy_values(readers: Sequence[Reader]) -> Float64Array:
    """Return the highest value so far when each unit goes, in the greedy order.

    Args:
        readers: the layers that read the same k units; their inverses are used up.

    Returns:
        ``[k]``, rising in the order of removal.
    """
    count = len(readers[0].places)
    values, left = np.zeros(count), torch.ones(count, dtype=torch.bool)
    step, highest = max(1, count // STEPS), 0.0
    while bool(left.any()):
        every = torch.stack([_left_values(r.effects, r.inverse, r.places) for r in readers]).sum(0)
        every[~left] = torch.inf
        near = every.argsort(stable=True)[: min(2 * step, int(left.sum()))]
        parts = [r.inverse[r.places[near]][:, r.places[near]] for r in readers]
        own, gone = [r.effects[near] for r in readers], torch.zeros(len(near), dtype=torch.bool)
        for _ in range(min(step, len(near))):
            now = torch.stack([_left_values(e, p) for e, p in zip(own, parts, strict=True)]).sum(0)
            now[gone] = torch.inf
            chosen = int(now.argmin())
            highest = max(float(now[chosen]), highest * (1.0 + TIE_BREAK))
            values[int(near[chosen])] = highest
            gone[chosen] = True
            for part in parts:
                _remove(part, torch.tensor([chosen]))
        left[near[gone]] = False
        for reader in readers:
            _remove(reader.inverse, reader.places[near[gone]])
    return values


def _left_values(effects: Tensor, inverse: Tensor, places: Tensor | None = None) -> Tensor:
    """Return effects times tolerances."""
    diagonal = inverse.diagonal()
    return effects / ((1.0 + RIDGE) * (diagonal if places is None else diagonal[places]))


def _remove(inverse: Tensor, places: Tensor) -> None:
    """Make an inverse that of the matrix without some rows and columns, which become the unit's."""
    rows = inverse[places]
    inverse -= rows.T @ torch.linalg.solve(rows[:, places], rows)
    inverse[places] = 0.0
    inverse[:, places] = 0.0
    inverse[places, places] = 1.0


def _inverse(covariance: Tensor) -> Tensor:
    """Return the inverse of the correlations with ``RIDGE`` on the diagonal, on the CPU."""
    covariance = covariance.double().cpu()
    scale = covariance.diagonal().clamp_min(TINY).rsqrt()
    system = scale[:, None] * covariance * scale
    system.fill_diagonal_(1.0 + RIDGE)
    inverse: Tensor = torch.linalg.inv(system)
    return inverse


def _is_reconstructed(read: Read) -> bool:
    """Return whether ``Reconstruction`` changes layers of this kind, all inputs at once."""
    few = read.op.kernel_size * len(read.units) <= MOST_INPUTS
    grouped = getattr(read.module, "groups", 1) > 1
    return few and not grouped and input_axis(read.module) is not None


def _class_rows(read: Read, generator: torch.Generator) -> Tensor:
    """Return ``[S, U]`` values at sampled positions, means over the channels of a class."""
    values = read.activation.detach().movedim(read.axis, -1)
    values = values.reshape(len(values), -1, values.shape[-1]).movedim(1, 2)  # [B, C, L]
    drawn = torch.randperm(values.shape[2], generator=generator)[:POSITIONS]
    rows = values[:, :, drawn.to(values.device)].movedim(2, 1).flatten(0, 1).float()  # [S, C]
    counts = torch.bincount(read.column, minlength=len(read.unique))
    return read.by_class(rows) / counts
