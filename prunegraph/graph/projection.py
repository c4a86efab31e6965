"""From scores or raw bits to a mask that meets a budget exactly."""

from typing import TYPE_CHECKING

import numpy as np

from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError, MaskError
from prunegraph.core.masks import BoolArray, ChannelMask, Float64Array, FloatArray, IntArray
from prunegraph.graph.rounding import Blocks, minimum_and_blocks, misfit, repeats

if TYPE_CHECKING:  # the graph's methods call these functions
    from prunegraph.graph.graph import StructureGraph


def why_no_less(graph: "StructureGraph", round_to: int | None) -> str:
    """Return what keeps a network from being smaller, for budgets that cannot be met."""
    least = "minimum" if round_to is None else f"least multiple of {round_to}"
    reasons = sorted({group.frozen for group in graph.groups if group.frozen})
    return f"each group keeps its {least}; frozen: {'; '.join(reasons) or 'nothing'}"


def _check_budget(graph: "StructureGraph", budget: object) -> None:
    if not isinstance(budget, Budget):
        msg = f"{budget!r} is no budget: give prunegraph.Budget, such as Budget(keep_macs=0.5)"
        raise BudgetError(msg)
    budget.check_channels()
    if budget.uniform and not repeats(graph):
        msg = (
            "uniform=True gives layers of a kind one width, and here no two that may be pruned are "
            "of a kind, as those of repeated blocks are: leave it out"
        )
        raise BudgetError(msg)
    if budget.depth and graph.min_keep.all():
        msg = "depth=True needs a structure of with_depth, and no sub-layer may leave in this one"
        raise BudgetError(msg)


def _check_reachable(graph: "StructureGraph", keep: BoolArray, budget: Budget) -> None:
    totals = graph.cost_model.totals(keep.astype(np.float64))
    dense = graph.cost_model.totals(np.ones(graph.num_units))
    for name, total, limit, whole in zip(
        ("keep_macs", "keep_params"), totals, graph.limits(budget)[:2], dense, strict=True
    ):
        if total > limit:
            least = np.ceil(total / whole * 1e4) / 1e4
            msg = (
                f"{name}={limit / whole:.4g} cannot be met: the least that can is {least:.4f} "
                f"({why_no_less(graph, budget.round_to)}); give {least:.4f} or more"
            )
            raise BudgetError(msg)
    if budget.max_memory is not None and graph.peak_memory(keep) > budget.max_memory:
        least = graph.peak_memory(keep)
        msg = (
            f"max_memory={budget.max_memory} bytes cannot be met: the least that can is "
            f"{least} ({why_no_less(graph, budget.round_to)}); give {least} or more"
        )
        raise BudgetError(msg)
    if budget.max_latency is not None and graph.latency_model is not None:
        takes = float(graph.latency_model.expected(keep[None].astype(np.float64))[0])
        if takes > budget.max_latency:
            msg = (
                f"max_latency={budget.max_latency:g} ms cannot be met: the least is predicted to "
                f"take {takes:.3g} ({why_no_less(graph, budget.round_to)}); "
                f"give {takes:.3g} or more"
            )
            raise BudgetError(msg)


def project(graph: "StructureGraph", scores: FloatArray, budget: Budget) -> ChannelMask:
    """Keep units in descending score, each if it still fits; ties go by index.

    The result is maximal: no removed unit fits any more, so the repaired cost lies nearer to the
    budget than the cheapest unit that could still be added; but none opens a sub-layer that has
    left wholly. With ``budget.round_to`` units come
    in blocks that take a group from one allowed width to the next, in descending mean score; with
    ``budget.uniform`` in blocks that take all groups of a kind there.

    Args:
        graph: the structure.
        scores: ``[N]`` finite scores, higher = keep first; frozen units' are ignored.
        budget: what may remain.

    Raises:
        BudgetError: the budget is no ``Budget``, below what must stay (the message says the least),
            holds a latency that the structure does not predict, is one of single weights, or asks
            for one width in layers of a kind where there are none.
        MaskError: scores of another shape, or not finite.
    """
    _check_budget(graph, budget)
    if budget.max_latency is not None and graph.latency_model is None:
        msg = (
            "max_latency is met by measuring: use "
            "prunegraph.graph.costs.latency_budget.project_latency"
        )
        raise BudgetError(msg)
    keep, blocks = minimum(graph, np.asarray(scores), budget)
    _check_reachable(graph, keep, budget)
    limits = Limits(graph, budget)
    taken = _longest_prefix(keep, blocks.units, blocks.ends, limits)
    keep[blocks.first(taken)] = True
    if not budget.in_blocks:
        _fill_units(keep, blocks, taken, limits)
    else:
        _fill_blocks(keep, blocks, taken, limits)
    return graph.mask(keep)


def minimum(
    graph: "StructureGraph", scores: FloatArray, budget: Budget
) -> tuple[BoolArray, Blocks]:
    """Return the least that must stay ``[N]``, and the blocks of units that may join, best first.

    Raises:
        MaskError: scores of another shape, or not finite.
    """
    check_scores(graph, scores)
    exact = scores.astype(np.float64)
    free = np.flatnonzero(graph.free)
    order = free[np.argsort(-exact[free], kind="stable")]
    return minimum_and_blocks(graph, order, exact, budget)


def check_scores(graph: "StructureGraph", scores: FloatArray | Float64Array) -> None:
    """Raise MaskError for scores of another shape than ``[N]``, or not finite."""
    if scores.shape != (graph.num_units,):
        msg = f"scores of shape {scores.shape} do not fit: this graph has {graph.num_units} units"
        raise MaskError(msg)
    if not np.isfinite(scores[graph.free]).all():
        msg = "scores hold NaN or infinite values; every free unit needs a finite score"
        raise MaskError(msg)


class Limits:
    """Everything that a mask must meet.

    Args:
        graph: the structure.
        budget: what may remain.
    """

    def __init__(self, graph: "StructureGraph", budget: Budget) -> None:
        self.graph = graph
        self._model = graph.cost_model
        self._limits = graph.limits(budget)[:2]
        self._others = graph.bounded(budget)

    def fits(self, keep: BoolArray) -> bool:
        """Return whether keep bits ``[N]`` are within every limit."""
        bits = keep.astype(np.float64)
        return bool(all(np.round(self._model.totals(bits)) <= self._limits)) and all(
            model.expected(bits[None])[0] <= limit for model, limit in self._others
        )

    def costs_fit_with_each(self, keep: BoolArray) -> BoolArray:
        """Return ``[N]`` where the costs stay within the limits if one removed unit joins."""
        totals: Float64Array = np.array(self._model.totals(keep.astype(np.float64)))
        with_each = np.round(totals[:, None] + self._model.added_by_each(keep))
        fits = np.asarray((with_each <= self._limits[:, None]).all(axis=0))
        for model, limit in self._others:
            fits &= model.fits_with_each(keep, limit)
        return fits


def _longest_prefix(keep: BoolArray, order: IntArray, ends: IntArray, limits: Limits) -> int:
    """Return how many of the first blocks fit on top of ``keep`` before one does not.

    Args:
        keep: ``[N]`` what stays already.
        order: units, block after block.
        ends: end of each block in ``order``.
        limits: what must be met.
    """
    low, high = 0, len(ends)
    while low < high:
        middle = (low + high + 1) // 2
        trial = keep.copy()
        trial[order[: ends[middle - 1]]] = True
        if limits.fits(trial):
            low = middle
        else:
            high = middle - 1
    return low


def _fill_units(keep: BoolArray, blocks: Blocks, taken: int, limits: Limits) -> None:
    """Add units to ``keep`` in place from block ``taken`` on, each if it still fits.

    What a unit costs only grows as others join, so one that does not fit never fits later; and as
    long as the sum of all that are asked for fits, none of them needs to be asked alone.
    """
    order = blocks.units[taken:]
    order = order[~_closed(keep, limits.graph)[limits.graph.group_of[order]]]
    while len(order):
        order = order[limits.costs_fit_with_each(keep)[order]]
        fitting = _longest_prefix(keep, order, np.arange(1, len(order) + 1), limits)
        keep[order[:fitting]] = True
        order = order[fitting + 1 :]


def _closed(keep: BoolArray, graph: "StructureGraph") -> BoolArray:
    """Return ``[G]`` True where a group keeps nothing: what is left of a budget opens none."""
    widths = np.bincount(graph.group_of[keep], minlength=len(graph.groups))
    return np.asarray((widths == 0) & (graph.min_keep == 0))


def _fill_blocks(keep: BoolArray, blocks: Blocks, taken: int, limits: Limits) -> None:
    """Add blocks to ``keep`` in place from block ``taken`` on, each if it still fits.

    A block that does not fit never fits later, and closes its series to the blocks after it.
    """
    closed = set(np.flatnonzero(_closed(keep, limits.graph)).tolist())
    for index in range(taken, len(blocks)):
        series = int(blocks.series[index])
        if series in closed:
            continue
        keep[blocks.block(index)] = True
        if not limits.fits(keep):
            keep[blocks.block(index)] = False
            closed.add(series)


def repair(
    graph: "StructureGraph", keep: BoolArray, budget: Budget, rng: np.random.Generator
) -> tuple[ChannelMask, float]:
    """Flip bits in an order drawn from ``rng`` until the mask is legal and meets the budget.

    Never by an importance score: else a constant agent would equal the heuristic that breaks ties.

    Args:
        graph: the structure.
        keep: ``[N]`` raw bits; frozen units' bits are ignored.
        budget: what may remain; the repaired mask is maximal as in ``project``.
        rng: the source of the order.

    Returns:
        The mask, and the share of free bits that were flipped; flips that rounding the raw widths
        to the nearest allowed ones would take do not count.
    """
    order = rng.random(graph.num_units)  # in [0, 1): kept bits come before all removed ones
    mask = project(graph, (keep.astype(np.float64) + order).astype(np.float32), budget)
    flipped = int(((mask.keep != keep) & graph.free).sum())
    if budget.in_blocks:
        flipped -= int(misfit(graph, keep, budget).sum())
    return mask, max(flipped, 0) / max(int(graph.free.sum()), 1)
