"""A mask improved by the model of the outcomes before it is run.

The masks that a policy draws scatter about what it knows, and it follows the model of the outcomes
slowly. Swaps climb that model at once: each drops a channel, keeps another one, or both, within
the budget. Local search on a model improves the policy's actions, from which it then learns: expert
iteration (Anthony et al. 2017, arXiv 1705.08439).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from prunegraph.agent.threshold import OTHERS, expected_cost_ratios
from prunegraph.core.masks import BoolArray, Float64Array, IntArray
from prunegraph.graph.graph import StructureGraph

TRIED = 8
"""Swaps of a step, the best by the slope, whose outcome is predicted exactly."""

NONE = -1


def plan(
    predict: Callable[[Tensor], Tensor],
    graph: StructureGraph,
    keep: BoolArray,
    limits: Float64Array,
    *,
    most: int,
) -> BoolArray:
    """Return a mask ``[N]`` near ``keep`` that is predicted to be better.

    Args:
        predict: float64 masks ``[K, N]`` to what they reach ``[K]``, with a gradient.
        graph: the network.
        keep: ``[N]`` what the policy wants; what does not fit is dropped first.
        limits: ``[4]`` the most MACs, params, bytes and ms that may remain.
        most: swaps at the most.
    """
    swaps = _Swaps(graph, limits)
    keep = swaps.made_to_fit(keep, _slope(predict, keep))
    with torch.no_grad():
        value = float(predict(_row(keep)))
    for _ in range(most):
        tried = swaps.best(keep, _slope(predict, keep))
        if not len(tried):
            break
        with torch.no_grad():
            values = predict(torch.from_numpy(tried).double())
        best = int(values.argmax())
        if float(values[best]) <= value:
            break
        keep, value = tried[best], float(values[best])
    return keep


def _slope(predict: Callable[[Tensor], Tensor], keep: BoolArray) -> Float64Array:
    """Return what each bit ``[N]`` adds, to first order."""
    with torch.enable_grad():  # a rollout goes without
        bits = _row(keep).requires_grad_(True)
        (slope,) = torch.autograd.grad(predict(bits).sum(), bits)
    return np.asarray(slope[0])


def _row(keep: BoolArray) -> Tensor:
    return torch.from_numpy(keep[None].astype(np.float64))


@dataclass(frozen=True, eq=False)
class _Swaps:
    """Swaps within a budget: units of a group cost alike, so its best ones are enough.

    Args:
        graph: the network.
        limits: ``[4]`` the most MACs, params, bytes and ms that may remain.
    """

    graph: StructureGraph
    limits: Float64Array

    @cached_property
    def members(self) -> list[IntArray]:
        """Free units of each group that has some."""
        free, groups = self.graph.free, self.graph.groups
        found = [group.units[free[group.units]] for group in groups]
        return [units for units in found if len(units)]

    def made_to_fit(self, keep: BoolArray, slope: Float64Array) -> BoolArray:
        """Return a mask without the units that cost least for what they free, until it fits."""
        keep = keep.copy()
        while (ratios := self._ratios(keep))[0].max() > 1.0:
            freed = self._freed(keep, int(ratios[0].argmax()))
            drops = self._drops(keep, slope)
            drops = drops[(drops != NONE) & self._above_minimum(keep)]
            drops = drops[freed[drops] > 0]
            if not len(drops):
                break
            loss, gain = slope[drops], freed[drops]
            worth = np.where(loss > 0, -loss / gain, -loss * gain)
            keep[drops[worth.argmax()]] = False
        return keep

    def _freed(self, keep: BoolArray, limit: int) -> Float64Array:
        """Return what each kept unit ``[N]`` frees of one of the limits."""
        if limit < OTHERS:
            freed = self.graph.cost_model.freed_by_each(keep)[limit]
        else:
            model = self.graph.others[limit - OTHERS]
            assert model is not None
            freed = model.slopes(keep[None].astype(np.float64))[0]
        return np.asarray(freed / self.limits[limit])

    def best(self, keep: BoolArray, slope: Float64Array) -> BoolArray:
        """Return what the most promising swaps make of a mask ``[K, N]``, K <= ``TRIED``."""
        model = self.graph.cost_model
        drops, adds = self._drops(keep, slope), self._adds(keep, slope)
        may_drop = np.append((drops != NONE) & self._above_minimum(keep), True)
        may_add = np.append(adds != NONE, True)
        allowed = may_drop[:, None] & may_add[None, :]
        within = np.arange(len(self.members))  # a group's width stays
        allowed[within, within] = (drops != NONE) & (adds != NONE)
        drops, adds = np.append(drops, NONE), np.append(adds, NONE)  # the last: nothing
        gain = (
            np.where(adds == NONE, 0.0, slope[adds])
            - np.where(drops == NONE, 0.0, slope[drops])[:, None]
        )
        freed = np.where(drops == NONE, 0.0, model.freed_by_each(keep)[:, drops])
        added = np.where(adds == NONE, 0.0, model.added_by_each(keep)[:, adds])
        slack = self.limits[:OTHERS] - model.totals(keep.astype(np.float64))
        excess = added[:, None, :] - freed[:, :, None] - slack[:, None, None]  # nearly: both share
        excess[:, within, within] = 0.0  # exactly: a group's units cost alike
        for other, limit in zip(self.graph.others, self.limits[OTHERS:], strict=True):
            if other is not None and np.isfinite(limit):
                allowed &= other.swapped(keep, drops, adds) <= limit
        rows, columns = np.nonzero(allowed & (gain > 0) & (excess <= 0).all(axis=0))
        order = np.argsort(-gain[rows, columns], kind="stable")[:TRIED]
        tried = np.repeat(keep[None], len(order), axis=0)
        for number, (row, column) in enumerate(zip(rows[order], columns[order], strict=True)):
            tried[number, [item for item in (drops[row], adds[column]) if item != NONE]] ^= True
        fits = self._ratios(tried).max(axis=1) <= 1.0
        return np.asarray(tried[fits])

    def _drops(self, keep: BoolArray, slope: Float64Array) -> IntArray:
        """Return of each group ``[G]`` the kept unit that adds least, or NONE."""
        return self._first(np.where(keep, slope, np.inf))

    def _adds(self, keep: BoolArray, slope: Float64Array) -> IntArray:
        """Return of each group ``[G]`` the removed unit that would add most, or NONE."""
        return self._first(np.where(keep, np.inf, -slope))

    def _first(self, values: Float64Array) -> IntArray:
        least = np.array([units[values[units].argmin()] for units in self.members])
        return np.where(np.isfinite(values[least]), least, NONE)

    def _above_minimum(self, keep: BoolArray) -> BoolArray:
        """Return whether each group ``[G]`` keeps more than it must."""
        graph = self.graph
        kept = np.bincount(graph.group_of[keep], minlength=len(graph.groups))
        spare = kept > graph.min_keep
        return np.array([spare[graph.group_of[units[0]]] for units in self.members])

    def _ratios(self, keep: BoolArray) -> Float64Array:
        """Return the costs over what may remain ``[K, 4]``."""
        rows = np.atleast_2d(keep).astype(np.float64)
        return expected_cost_ratios(self.graph, rows, self.limits[None])
