"""A mask improved by the model of the outcomes before it is run.

The masks that a policy draws scatter about what it knows, and it follows the model of the outcomes
slowly. Swaps climb that model at once: each drops a channel, keeps another one, or both, within
the budget. Local search on a model improves the policy's actions, from which it then learns: expert
iteration (Anthony et al. 2017, arXiv 1705.08439).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from prunegraph.agent.threshold import OTHERS, expected_cost_ratios
from prunegraph.core.masks import BoolArray, Float64Array, IntArray
from prunegraph.graph.costs.macs import CostFunction
from prunegraph.graph.graph import StructureGraph

TRIED = 8
"""Swaps of a step, the best by the slope, whose outcome is predicted exactly."""

FINEST = 128
"""A swap moves a unit of a group, or of a wider one as many as make so many steps of it: to move a
layer of thousands by single ones would take as many swaps."""

NONE = -1

NOTHING = np.array([], dtype=np.int64)


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
            worst = zip(self._worst(keep, slope), self._spare(keep), strict=True)
            drops = _firsts([units for units, spare in worst if spare and len(units)])
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

    @cached_property
    def others(self) -> list[tuple[CostFunction, float]]:
        """Memory and latency, with the most that may remain, as far as they are limited."""
        pairs = zip(self.graph.others, self.limits[OTHERS:], strict=True)
        return [(other, most) for other, most in pairs if other is not None and np.isfinite(most)]

    @cached_property
    def steps(self) -> list[int]:
        """How many units of each group a swap moves: one, or a share of a wide group."""
        if self.others:  # which are told of one swapped unit
            return [1] * len(self.members)
        return [max(1, len(units) // FINEST) for units in self.members]

    def best(self, keep: BoolArray, slope: Float64Array) -> BoolArray:
        """Return what the most promising swaps make of a mask ``[K, N]``, K <= ``TRIED``."""
        model, within = self.graph.cost_model, np.arange(len(self.members))
        worst, adds = self._worst(keep, slope), self._adds(keep, slope)
        inside = [_as_many(*pair) for pair in zip(worst, adds, strict=True)]  # the width stays
        drops = [units[:spare] for units, spare in zip(worst, self._spare(keep), strict=True)]
        drops, adds = [*drops, NOTHING], [*adds, NOTHING]
        may_drop, may_add = (np.array([len(units) > 0 for units in some]) for some in (drops, adds))
        may_drop[-1] = may_add[-1] = True
        allowed = may_drop[:, None] & may_add[None, :]
        allowed[within, within] = [len(lost) > 0 for lost, _ in inside]
        gain = _sums(slope[None], adds)[0] - _sums(slope[None], drops)[0][:, None]
        gain[within, within] = [slope[won].sum() - slope[lost].sum() for lost, won in inside]
        freed, added = model.freed_by_each(keep), model.added_by_each(keep)
        slack = self.limits[:OTHERS] - model.totals(keep.astype(np.float64))
        excess = _sums(added, adds)[:, None, :] - _sums(freed, drops)[:, :, None]
        excess = excess - slack[:, None, None]  # nearly: what leaves and what joins share some
        excess[:, within, within] = 0.0  # exactly: a group's units cost alike
        for other, limit in self.others:
            allowed &= other.swapped(keep, _firsts(drops), _firsts(adds)) <= limit
        rows, columns = np.nonzero(allowed & (gain > 0) & (excess <= 0).all(axis=0))
        order = np.argsort(-gain[rows, columns], kind="stable")[:TRIED]
        tried = np.repeat(keep[None], len(order), axis=0)
        for number, (row, column) in enumerate(zip(rows[order], columns[order], strict=True)):
            same = row == column < len(inside)
            lost, won = inside[row] if same else (drops[row], adds[column])
            tried[number, lost], tried[number, won] = False, True
        fits = self._ratios(tried).max(axis=1) <= 1.0
        return np.asarray(tried[fits])

    def _worst(self, keep: BoolArray, slope: Float64Array) -> list[IntArray]:
        """Return of each group the kept units that add least, the least first."""
        return self._first(keep, slope)

    def _adds(self, keep: BoolArray, slope: Float64Array) -> list[IntArray]:
        """Return of each group the removed units that would add most, the most first."""
        return self._first(~keep, -slope)

    def _first(self, among: BoolArray, values: Float64Array) -> list[IntArray]:
        found = []
        for units, step in zip(self.members, self.steps, strict=True):
            own = units[among[units]]
            found.append(own[np.argsort(values[own], kind="stable")[:step]])
        return found

    def _spare(self, keep: BoolArray) -> list[int]:
        """Return how many units each group keeps above its minimum."""
        graph = self.graph
        kept = np.bincount(graph.group_of[keep], minlength=len(graph.groups))
        spare = np.maximum(kept - graph.min_keep, 0)
        return [int(spare[graph.group_of[units[0]]]) for units in self.members]

    def _ratios(self, keep: BoolArray) -> Float64Array:
        """Return the costs over what may remain ``[K, 4]``."""
        rows = np.atleast_2d(keep).astype(np.float64)
        return expected_cost_ratios(self.graph, rows, self.limits[None])


def _as_many(worst: IntArray, adds: IntArray) -> tuple[IntArray, IntArray]:
    """Return the first units of both, as many of one as of the other."""
    count = min(len(worst), len(adds))
    return worst[:count], adds[:count]


def _sums(values: Float64Array, units: Sequence[IntArray]) -> Float64Array:
    """Return the sums of values ``[K, N]`` over units of each of G groups ``[K, G]``."""
    return np.stack([values[:, some].sum(axis=1) for some in units], axis=1)


def _firsts(units: Sequence[IntArray]) -> IntArray:
    """Return the first unit of each group, or NONE."""
    return np.array([some[0] if len(some) else NONE for some in units], dtype=np.int64)
