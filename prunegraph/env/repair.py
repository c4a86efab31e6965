"""From raw bits to the mask that is evaluated: repair, AMC's action wall, or neither.

Every choice that the bits leave open is drawn from the episode's generator, never made by an
importance score: else a constant agent would equal the heuristic that breaks ties.
"""

from typing import Literal

import numpy as np

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from prunegraph.core.masks import BoolArray, ChannelMask, IntArray
from prunegraph.graph import StructureGraph

Realisation = Literal["repair", "wall", "raw"]


def repair(
    graph: StructureGraph,
    keep: BoolArray,
    budget: Budget,
    how: Realisation,
    rng: np.random.Generator,
) -> tuple[ChannelMask, float]:
    """Return the mask to evaluate and the share of free bits that were flipped.

    Args:
        graph: the structure.
        keep: ``[N]`` raw bits; frozen units' bits are ignored.
        budget: what may remain.
        how: ``"repair"``: flips in random order until the budget is met; ``"wall"``: what a group
            keeps is cut to what leaves the later groups their minimum; ``"raw"``: only each
            group's minimum is forced.
        rng: the source of random flips.

    Raises:
        ConfigError: ``"wall"`` with width rounding, which it does not know.
    """
    if how == "repair":
        return graph.repair(keep, budget, rng)
    order = rng.permutation(graph.num_units)
    if how == "wall" and budget.round_to is not None:
        msg = f"the action wall cannot round widths to {budget.round_to}: choose another form"
        raise ConfigError(msg)
    if how == "wall":
        bits = _cut_at_wall(graph, keep, budget, order)
    else:
        bits = _force_minimum(graph, keep, order)
    flipped = float(((bits != keep) & graph.free).sum() / max(int(graph.free.sum()), 1))
    return graph.mask(bits), flipped


def _force_minimum(graph: StructureGraph, keep: BoolArray, order: IntArray) -> BoolArray:
    """Return ``keep`` with the first removed units of ``order`` added where a group is short."""
    bits = keep | graph.frozen
    for group, least in enumerate(graph.min_keep):
        members = order[graph.group_of[order] == group]
        missing = int(least) - int(bits[members].sum())
        if missing > 0:
            bits[members[~bits[members]][:missing]] = True
    return bits


def _cut_at_wall(
    graph: StructureGraph, keep: BoolArray, budget: Budget, order: IntArray
) -> BoolArray:
    """Return ``keep``, each group in turn cut to the longest prefix of ``order`` that fits.

    After He et al. 2018 (AMC, arXiv 1802.03494), algorithm 1: later groups are assumed to keep
    their minimum.
    """
    bits = graph.frozen.copy()
    for group, least in enumerate(graph.min_keep):  # the minimum, kept bits first
        members = order[graph.group_of[order] == group]
        members = members[np.argsort(~keep[members], kind="stable")]
        missing = max(int(least) - int(bits[members].sum()), 0)
        bits[members[~bits[members]][:missing]] = True
    for group in graph.free_groups:
        wanted = order[(graph.group_of[order] == group) & keep[order] & ~bits[order]]
        low, high = 0, len(wanted)
        while low < high:
            middle = (low + high + 1) // 2
            trial = bits.copy()
            trial[wanted[:middle]] = True
            fits = graph.fits(trial, budget)
            low, high = (middle, high) if fits else (low, middle - 1)
        bits[wanted[:low]] = True
    return bits
