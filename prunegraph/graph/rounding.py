"""Width rounding: which widths a group may have, and the blocks in which its units come.

Hardware likes layers whose number of channels is a multiple of 8 or 16. A *block* is what takes a
group from one allowed width to the next; without rounding each unit is a block of its own.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from prunegraph.core.masks import BoolArray, Float64Array, IntArray

if TYPE_CHECKING:  # the graph's methods call these functions
    from prunegraph.graph.graph import StructureGraph


@dataclass(frozen=True, eq=False, kw_only=True)
class Blocks:
    """The units that are not of a group's minimum, in the order in which they are added.

    Attributes:
        units: ``[R]`` class ids, block after block.
        ends: ``[B]`` end of each block in ``units``.
        group: ``[B]`` group of each block; a group's blocks come in the order of their widths.
    """

    units: IntArray
    ends: IntArray
    group: IntArray

    def __len__(self) -> int:
        return len(self.ends)

    def first(self, count: int) -> IntArray:
        """Return the units of the first ``count`` blocks."""
        return self.units[: self.ends[count - 1]] if count else self.units[:0]

    def block(self, index: int) -> IntArray:
        """Return the units of one block."""
        return self.units[self.ends[index - 1] if index else 0 : self.ends[index]]


def rounding_units(graph: "StructureGraph", round_to: int | None) -> IntArray:
    """Return ``[G]`` the number of units whose channels make a multiple of ``round_to``.

    A unit that takes several positions on every axis (one in each group of a grouped convolution)
    counts as that many channels.

    Args:
        graph: the structure.
        round_to: multiple of channels; None = no rounding, each unit is one class.
    """
    if round_to is None:
        return np.ones(len(graph.groups), dtype=np.int64)
    return round_to // np.gcd(round_to, graph.channels_per_class)


def least_widths(graph: "StructureGraph", round_to: int | None) -> IntArray:
    """Return ``[G]`` the least allowed width of each group, in units."""
    units, sizes = rounding_units(graph, round_to), graph.group_sizes
    rounded = np.minimum(-(-graph.min_keep // units) * units, sizes)
    return np.where(sizes < units, graph.min_keep, rounded)


def allowed(graph: "StructureGraph", keep: BoolArray, round_to: int) -> bool:
    """Return whether the width of every free group is one that rounding allows."""
    return not misfit(graph, keep, round_to).any()


def misfit(graph: "StructureGraph", keep: BoolArray, round_to: int | None) -> IntArray:
    """Return ``[G]`` how many units each free group's width is away from the nearest allowed."""
    units, sizes = rounding_units(graph, round_to), graph.group_sizes
    least = least_widths(graph, round_to)
    widths = np.bincount(graph.group_of[keep], minlength=len(graph.groups))
    below = np.where(widths >= sizes, sizes, np.maximum(widths // units * units, least))
    above = np.minimum(np.maximum(-(-widths // units) * units, least), sizes)
    away = np.minimum(abs(widths - below), abs(above - widths))
    free = np.bincount(graph.group_of[graph.free], minlength=len(graph.groups)) > 0
    return np.where(free, away, 0)


def minimum_and_blocks(
    graph: "StructureGraph", order: IntArray, scores: Float64Array, round_to: int | None
) -> tuple[BoolArray, Blocks]:
    """Divide the free units into each group's minimum and the blocks that may join it.

    Args:
        graph: the structure.
        order: ``[F]`` the free units, best first.
        scores: ``[N]`` their scores; a block's is the mean of its units'.
        round_to: multiple of channels, or None.

    Returns:
        ``[N]`` the keep bits of frozen units and minima, and the blocks, best first.
    """
    groups = graph.group_of[order]
    by_group = np.argsort(groups, kind="stable")
    first = np.searchsorted(groups[by_group], groups[by_group], side="left")
    rank = np.empty(len(order), dtype=np.int64)
    rank[by_group] = np.arange(len(order)) - first
    needed = rank < least_widths(graph, round_to)[groups]
    keep = graph.frozen.copy()
    keep[order[needed]] = True
    units = rounding_units(graph, round_to)
    rest, groups = order[~needed], groups[~needed]
    key = groups * (graph.num_units + 1) + (rank // units[graph.group_of[order]])[~needed]
    return keep, _sorted_blocks(rest, groups, key, scores)


def _sorted_blocks(rest: IntArray, groups: IntArray, key: IntArray, scores: Float64Array) -> Blocks:
    """Return the blocks of units with the same ``key``, in descending mean score.

    Ties go to the block whose best unit comes first. Rounding errors of the means must not put a
    group's later block first, so that no block's score exceeds its predecessor's.
    """
    if not len(rest):
        return Blocks(units=rest, ends=rest, group=rest)
    _, first, inverse, size = np.unique(
        key, return_index=True, return_inverse=True, return_counts=True
    )
    mean = np.bincount(inverse, weights=scores[rest]) / size  # blocks in order of (group, rank)
    starts = np.flatnonzero(np.diff(groups[first], prepend=-1))
    for begin, end in zip(starts, [*starts[1:], len(first)], strict=True):
        mean[begin:end] = np.minimum.accumulate(mean[begin:end])
    place = np.empty(len(first), dtype=np.int64)
    place[np.lexsort((first, -mean))] = np.arange(len(first))
    by_block = np.argsort(place[inverse], kind="stable")
    best_first = np.argsort(place)
    return Blocks(
        units=rest[by_block],
        ends=np.cumsum(size[best_first]),
        group=groups[first][best_first],
    )
