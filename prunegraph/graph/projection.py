"""From scores or raw bits to a mask that meets a budget exactly."""

from typing import TYPE_CHECKING

import numpy as np

from prunegraph.errors import BudgetError, MaskError
from prunegraph.types import BoolArray, Budget, Float64Array, FloatArray, IntArray, KeepMask

if TYPE_CHECKING:  # the graph's methods call these functions
    from prunegraph.graph.structure import StructureGraph


def _minimal_keep(graph: "StructureGraph", order: IntArray) -> BoolArray:
    """Keep the frozen classes and each group's ``min_keep`` first classes of ``order``."""
    keep = graph.frozen.copy()
    groups = graph.group_of[order]
    by_group = np.argsort(groups, kind="stable")
    sorted_groups = groups[by_group]
    first = np.searchsorted(sorted_groups, sorted_groups, side="left")
    rank = np.empty(len(order), dtype=np.int64)
    rank[by_group] = np.arange(len(order)) - first
    keep[order[rank < graph.min_keep[groups]]] = True
    return keep


def _check_reachable(graph: "StructureGraph", keep: BoolArray, limits: Float64Array) -> None:
    totals = graph.cost_model.totals(keep.astype(np.float64))
    dense = graph.cost_model.totals(np.ones(graph.num_classes))
    for name, total, limit, whole in zip(
        ("keep_macs", "keep_params"), totals, limits, dense, strict=True
    ):
        if total > limit:
            least = np.ceil(total / whole * 1e4) / 1e4
            reasons = sorted({group.frozen for group in graph.groups if group.frozen})
            msg = (
                f"{name}={limit / whole:.4g} cannot be met: the least that can is {least:.4f} "
                f"(each group keeps its minimum; frozen: {'; '.join(reasons) or 'nothing'})"
            )
            raise BudgetError(msg)


def project(graph: "StructureGraph", scores: FloatArray, budget: Budget) -> KeepMask:
    """Keep classes in descending score, each if it still fits; ties go by index.

    The result is maximal: no removed class fits any more, so the realised cost lies nearer to the
    budget than the cheapest class that could still be added.

    Args:
        graph: the structure.
        scores: ``[N]`` finite scores, higher = keep first; frozen classes' are ignored.
        budget: what may remain.

    Raises:
        BudgetError: the budget is below what must stay; the message says the least.
        MaskError: scores of another shape, or not finite.
    """
    if scores.shape != (graph.num_classes,):
        msg = (
            f"scores of shape {scores.shape} do not fit: this graph has {graph.num_classes} classes"
        )
        raise MaskError(msg)
    if not np.isfinite(scores[graph.free]).all():
        msg = "scores hold NaN or infinite values; every free class needs a finite score"
        raise MaskError(msg)
    free = np.flatnonzero(graph.free)
    order = free[np.argsort(-scores[free].astype(np.float64), kind="stable")]
    keep = _minimal_keep(graph, order)
    limits = graph.limits(budget)
    _check_reachable(graph, keep, limits)
    order = order[~keep[order]]
    taken = _longest_prefix(graph, keep, order, limits)
    keep[order[:taken]] = True
    _fill(graph, keep, order[taken:], limits)
    return graph.mask(keep)


def _fits(graph: "StructureGraph", keep: BoolArray, limits: Float64Array) -> bool:
    totals = graph.cost_model.totals(keep.astype(np.float64))
    return all(np.round(totals) <= limits)


def _longest_prefix(
    graph: "StructureGraph", keep: BoolArray, order: IntArray, limits: Float64Array
) -> int:
    """Return how many classes of ``order`` fit on top of ``keep`` before one does not."""
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        trial = keep.copy()
        trial[order[:middle]] = True
        if _fits(graph, trial, limits):
            low = middle
        else:
            high = middle - 1
    return low


def _fill(graph: "StructureGraph", keep: BoolArray, order: IntArray, limits: Float64Array) -> None:
    """Add classes of ``order`` to ``keep`` in place, each if it still fits.

    What a class costs only grows as others join, so one that does not fit never fits later; and as
    long as the sum of all that are asked for fits, none of them needs to be asked alone.
    """
    while len(order):
        totals = np.array(graph.cost_model.totals(keep.astype(np.float64)))
        added = graph.cost_model.added_by_each(keep)[:, order]
        fitting = (np.round(totals[:, None] + added) <= limits[:, None]).all(axis=0)
        order = order[fitting]
        taken = _longest_prefix(graph, keep, order, limits)
        keep[order[:taken]] = True
        order = order[taken:]


def repair(
    graph: "StructureGraph", keep: BoolArray, budget: Budget, rng: np.random.Generator
) -> tuple[KeepMask, float]:
    """Flip bits in an order drawn from ``rng`` until the mask is legal and meets the budget.

    Never by an importance score: else a constant agent would equal the heuristic that breaks ties.

    Args:
        graph: the structure.
        keep: ``[N]`` raw bits; frozen classes' bits are ignored.
        budget: what may remain; the repaired mask is maximal as in ``project``.
        rng: the source of the order.

    Returns:
        The mask, and the share of free bits that were flipped.
    """
    order = rng.random(graph.num_classes)  # in [0, 1): kept bits come before all removed ones
    mask = project(graph, (keep.astype(np.float64) + order).astype(np.float32), budget)
    flipped = (mask.keep != keep) & graph.free
    return mask, float(flipped.sum() / max(int(graph.free.sum()), 1))
