"""Width rounding: which widths a group may have, and the blocks in which its units come.

Hardware likes layers whose number of channels is a multiple of 8 or 16. A *block* is what takes a
group from one allowed width to the next; without rounding each unit is a block of its own. Where
layers of a kind have one width a block takes all groups of the kind, its *series*, to the next one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from prunegraph.core.budget import Budget
from prunegraph.core.masks import BoolArray, Float64Array, IntArray

if TYPE_CHECKING:  # the graph's methods call these functions
    from prunegraph.graph.graph import StructureGraph


@dataclass(frozen=True, eq=False, kw_only=True)
class Blocks:
    """The units that are not of a group's minimum, in the order in which they are added.

    Attributes:
        units: ``[R]`` numbers of units, block after block.
        ends: ``[B]`` end of each block in ``units``.
        series: ``[B]`` number of the groups that each block widens; the blocks of a series come in
            the order of their widths.
    """

    units: IntArray
    ends: IntArray
    series: IntArray

    def __len__(self) -> int:
        return len(self.ends)

    def first(self, count: int) -> IntArray:
        """Return the units of the first ``count`` blocks."""
        return self.units[: self.ends[count - 1]] if count else self.units[:0]

    def block(self, index: int) -> IntArray:
        """Return the units of one block."""
        return self.units[self.ends[index - 1] if index else 0 : self.ends[index]]


def kinds_of(graph: "StructureGraph") -> IntArray:
    """Return ``[G]`` the number of each group's kind.

    Groups are of a kind if their members have the same names but for the numbers in them, they are
    equally large, and the same numbers of units may stay.
    """
    keys = [
        (
            tuple(re.sub(r"(?<![^.])\d+(?=\.)", "*", member) for member in group.members),
            len(group.units),
            group.frozen,
            group.min_keep,
            tuple(graph.widths.get(number, ())),
        )
        for number, group in enumerate(graph.groups)
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], dtype=np.int64)


def repeats(graph: "StructureGraph") -> bool:
    """Return whether two groups that may be pruned are of a kind."""
    kinds = graph.kinds[graph.free_groups]
    return len(np.unique(kinds)) < len(kinds)


def restrict(
    graph: "StructureGraph",
    whole: Mapping[int, str],
    widths: Mapping[int, Sequence[int]],
    least: Mapping[int, int] | None = None,
) -> "StructureGraph":
    """Return the structure with less to prune; its fingerprint stays.

    Args:
        graph: the structure.
        whole: number of each group that stays whole, with the reason.
        widths: number of each group in which only so many units may stay, ascending.
        least: number of each group in which more than its minimum must stay, with how many.
    """
    least = least or {}
    groups = tuple(
        replace(
            group,
            frozen=whole.get(number, group.frozen),
            min_keep=least.get(number, group.min_keep),
        )
        for number, group in enumerate(graph.groups)
    )
    frozen = graph.frozen | np.isin(graph.group_of, list(whole))
    origin = graph.fingerprint()
    return replace(graph, groups=groups, frozen=frozen, widths=widths, origin=origin)


def rounding_units(graph: "StructureGraph", round_to: int | None) -> IntArray:
    """Return ``[G]`` the number of units whose channels make a multiple of ``round_to``.

    A unit that takes several positions on every axis (one in each group of a grouped convolution)
    counts as that many channels.

    Args:
        graph: the structure.
        round_to: multiple of channels; None = no rounding, each block is one unit.
    """
    if round_to is None:
        return np.ones(len(graph.groups), dtype=np.int64)
    return round_to // np.gcd(round_to, graph.channels_per_unit)


def least_widths(graph: "StructureGraph", round_to: int | None) -> IntArray:
    """Return ``[G]`` the least allowed width of each group, in units."""
    units, sizes = rounding_units(graph, round_to), graph.group_sizes
    rounded = np.minimum(-(-graph.min_keep // units) * units, sizes)
    least = np.where(sizes < units, graph.min_keep, rounded)
    for group, widths in graph.widths.items():
        least[group] = widths[0]
    return least


def allowed(graph: "StructureGraph", keep: BoolArray, budget: Budget) -> bool:
    """Return whether the width of every free group is one that a budget allows."""
    return not misfit(graph, keep, budget).any()


def misfit(graph: "StructureGraph", keep: BoolArray, budget: Budget) -> IntArray:
    """Return ``[G]`` how many units each free group's width is away from the nearest allowed.

    Where layers of a kind have one width, it is the one nearest to their median.
    """
    widths = np.bincount(graph.group_of[keep], minlength=len(graph.groups))
    wanted = widths
    if budget.uniform:
        medians = [np.median(widths[graph.kinds == kind]) for kind in range(graph.kinds.max() + 1)]
        wanted = np.array(medians, dtype=np.int64)[graph.kinds]
    free = np.bincount(graph.group_of[graph.free], minlength=len(graph.groups)) > 0
    return np.where(free, abs(widths - _nearest(graph, wanted, budget.round_to)), 0)


def _nearest(graph: "StructureGraph", wanted: IntArray, round_to: int | None) -> IntArray:
    """Return the allowed widths ``[G]`` that are nearest to given ones."""
    units, sizes = rounding_units(graph, round_to), graph.group_sizes
    least = least_widths(graph, round_to)
    below = np.where(wanted >= sizes, sizes, np.maximum(wanted // units * units, least))
    above = np.minimum(np.maximum(-(-wanted // units) * units, least), sizes)
    nearest = np.where(abs(wanted - below) <= abs(above - wanted), below, above)
    for group, widths in graph.widths.items():
        nearest[group] = min(widths, key=lambda width: abs(width - wanted[group]))
    return nearest


def minimum_and_blocks(
    graph: "StructureGraph", order: IntArray, scores: Float64Array, budget: Budget
) -> tuple[BoolArray, Blocks]:
    """Divide the free units into each group's minimum and the blocks that may join it.

    Args:
        graph: the structure.
        order: ``[F]`` the free units, best first.
        scores: ``[N]`` their scores; a block's is the mean of its units'.
        budget: what the widths are rounded to, and whether layers of a kind have one.

    Returns:
        ``[N]`` the keep bits of frozen units and minima, and the blocks, best first.
    """
    groups = graph.group_of[order]
    by_group = np.argsort(groups, kind="stable")
    first = np.searchsorted(groups[by_group], groups[by_group], side="left")
    rank = np.empty(len(order), dtype=np.int64)
    rank[by_group] = np.arange(len(order)) - first
    needed = rank < least_widths(graph, budget.round_to)[groups]
    keep = graph.frozen.copy()
    keep[order[needed]] = True
    step = rank // rounding_units(graph, budget.round_to)[groups]
    for group, widths in graph.widths.items():
        of_group = groups == group
        step[of_group] = np.searchsorted(widths, rank[of_group], side="right")
    series = (graph.kinds if budget.uniform else np.arange(len(graph.groups)))[groups]
    key = series * (graph.num_units + 1) + step
    return keep, _sorted_blocks(order[~needed], series[~needed], key[~needed], scores)


def _sorted_blocks(rest: IntArray, series: IntArray, key: IntArray, scores: Float64Array) -> Blocks:
    """Return the blocks of units with the same ``key``, in descending mean score.

    Ties go to the block whose best unit comes first. Rounding errors of the means must not put a
    later block of a series first, so that no block's score exceeds its predecessor's.
    """
    if not len(rest):
        return Blocks(units=rest, ends=rest, series=rest)
    _, first, inverse, size = np.unique(
        key, return_index=True, return_inverse=True, return_counts=True
    )
    mean = np.bincount(inverse, weights=scores[rest]) / size  # blocks in order of (series, step)
    starts = np.flatnonzero(np.diff(series[first], prepend=-1))
    for begin, end in zip(starts, [*starts[1:], len(first)], strict=True):
        mean[begin:end] = np.minimum.accumulate(mean[begin:end])
    place = np.empty(len(first), dtype=np.int64)
    place[np.lexsort((first, -mean))] = np.arange(len(first))
    by_block = np.argsort(place[inverse], kind="stable")
    best_first = np.argsort(place)
    return Blocks(
        units=rest[by_block],
        ends=np.cumsum(size[best_first]),
        series=series[first][best_first],
    )
