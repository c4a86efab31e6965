"""The optimal brain surgeon for units: what layers lose when the weights that stay make up for it.

Sums over what layers read are those of one block at a time (``BlockWalk``); those of a residual
stream, which layers of all blocks read, are kept until the last one.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from prunegraph.core.masks import Float64Array, IntArray
from prunegraph.layerwise.blocks import BlockWalk, Matrix
from prunegraph.layerwise.solve import Hessian
from prunegraph.layerwise.statistics import MOST_INPUTS
from prunegraph.layerwise.weights import prunable_weights
from prunegraph.methods.criteria.dense import Dense, add_seen
from prunegraph.methods.criteria.registry import measured_criterion
from prunegraph.methods.criteria.thinet import TIE_BREAK

BATCH_SIZE = 8

STEPS = 32
"""The units of a layer go in so many steps, at most; each unit is scored anew in each."""


@measured_criterion("obs", num_samples=128, of_the_layer=True)
def surgeon_errors(dense: Dense) -> Float64Array:
    """Return the error of the next layers' outputs when a unit goes and the others make up for it.

    ``W_J ([H^-1]_JJ)^-1 W_J^T``, summed over the outputs, with J the inputs of the unit and H the
    damped mean product of what a layer reads (Hassibi and Stork 1993; of one input it is
    ``||W_j||^2 / [H^-1]_jj``). Errors are summed over the layers that read the same units. The
    units go one after the other, the least first; W and the inverse of H follow. Each has the error
    at which it goes, or that of the one before if that is higher. Layers that read more than
    ``MOST_INPUTS`` values do not count.

    Returns:
        ``[N]`` from 0 up, summed over the layers that read; NaN where a unit is not read.
    """
    graph, model = dense.graph, dense.model
    units = {
        str(op.param): np.repeat(op.in_units, op.kernel_size)
        for op in graph.ops
        if not op.depthwise and not op.computed and graph.free[op.in_units].any()
    }
    weights = {
        name: layout
        for name, layout in prunable_weights(model).items()
        if name in units and layout.num_inputs == len(units[name]) <= MOST_INPUTS
    }
    waiting = Counter(units[name].tobytes() for name in weights)
    readers: dict[bytes, dict[Hessian, Reader]] = {}
    values = np.full(graph.num_units, np.nan)

    def note(matrix: Matrix) -> None:
        own = units[matrix.name]
        known = readers.setdefault(own.tobytes(), {})
        parts = matrix.weight.chunk(len(matrix.hessians))
        for part, hessian in zip(parts, matrix.hessians if matrix.seen else (), strict=False):
            before = known.get(hessian)  # query, key and value read the same
            known[hessian] = Reader.of(part, hessian) if before is None else before.with_(part)
        waiting[own.tobytes()] -= 1
        if not waiting[own.tobytes()] and known:
            unique, column = np.unique(own, return_inverse=True)
            found = greedy_errors(list(readers.pop(own.tobytes()).values()), column)
            add_seen(values, unique, found)

    batches = list(dense.train.batches(BATCH_SIZE))
    BlockWalk(model, weights, batches, dense.task.forward).run(note)
    return values


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer, or several that read the same.

    Attributes:
        weight: ``[C, B]`` float64.
        inverse: ``[B, B]`` float64, of H.
    """

    weight: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, weight: Tensor, hessian: Hessian) -> Self:
        """Return the reader of a weight."""
        both = (weight, hessian.inverse)
        return cls(*(each.to(torch.float64, copy=True) for each in both))

    def with_(self, weight: Tensor) -> Self:
        """Return it with the rows of another weight."""
        return replace(self, weight=torch.cat([self.weight, weight.double()]))

    def errors(self, places: Sequence[Tensor]) -> Tensor:
        """Return ``[U]`` the errors of units, each removed alone."""
        if all(len(own) == 1 for own in places):
            index = torch.cat(list(places))
            found = self.weight[:, index].square().sum(0) / self.inverse.diagonal()[index]
            return found.cpu()
        return torch.stack([self._error(own) for own in places]).cpu()

    def _error(self, own: Tensor) -> Tensor:
        columns = self.weight[:, own].T
        error: Tensor = (torch.linalg.solve(self.inverse[own][:, own], columns) * columns).sum()
        return error

    def remove(self, gone: Tensor) -> None:
        """Remove inputs, in place: the weights that stay make up for them, the inverse follows."""
        rows = self.inverse[gone]  # [Q, B]
        factors = torch.linalg.solve(rows[:, gone], rows)
        self.weight.sub_(self.weight[:, gone] @ factors)
        self.inverse.sub_(rows.T @ factors)
        self.weight[:, gone] = 0.0
        self.inverse[gone], self.inverse[:, gone] = 0.0, 0.0
        self.inverse[gone, gone] = 1.0


def greedy_errors(readers: Sequence[Reader], column: IntArray) -> Float64Array:
    """Return the highest error so far when each unit goes, in the greedy order.

    Args:
        readers: the layers that read the units; they are used up.
        column: ``[B]`` the unit of each input, 0 to U - 1.

    Returns:
        ``[U]``, rising in the order of removal.
    """
    places = [torch.from_numpy(np.flatnonzero(column == unit)) for unit in range(max(column) + 1)]
    errors, left = np.zeros(len(places)), np.arange(len(places))
    step, highest = -(-len(places) // STEPS), 0.0
    while left.size:
        own = [places[unit] for unit in left]
        found = torch.stack([reader.errors(own) for reader in readers]).sum(0)
        order = found.argsort(stable=True)[:step]
        for position in order.tolist():
            highest = max(float(found[position]), highest * (1.0 + TIE_BREAK))
            errors[left[position]] = highest
        for reader in readers:
            reader.remove(torch.cat([own[position] for position in order.tolist()]))
        left = np.delete(left, order.numpy())
    return errors
