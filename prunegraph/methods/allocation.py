"""Allocations: how many units of each group stay, from importances of each unit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from prunegraph.core.checks import find_named
from prunegraph.core.masks import ChannelMask, Float64Array, FloatArray, IntArray
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.graph import StructureGraph
from prunegraph.graph.features import group_mean, rank_in_group, rank_within, unit_cost
from prunegraph.graph.projection import check_scores
from prunegraph.methods.method import Problem, Result
from prunegraph.methods.prior import streams_first

LEAST_SENSITIVITY = 0.3
"""Sensitivities are at least this share of their mean: noise may make them negative, and what the
kept weights make up for when half of one group goes is lost when more does."""


def uniform(problem: Problem, values: Float64Array) -> Float64Array:
    """Keep the same share of every group: the score is the rank within the group."""
    return rank_in_group(problem.graph, values)


def globally(_problem: Problem, values: Float64Array) -> Float64Array:
    """Compare importances across groups."""
    return values


def per_mac(problem: Problem, values: Float64Array) -> Float64Array:
    """Compare importances per MAC that the unit frees (per parameter, if only those count)."""
    return values / unit_cost(problem.graph, problem.budget)


def skip_full(problem: Problem, values: Float64Array) -> Float64Array:
    """Keep residual streams whole as far as the budget lets, and be uniform elsewhere."""
    return streams_first(problem.graph, values)


def by_sensitivity(problem: Problem, values: Float64Array) -> Float64Array:
    """Scale importances, normalised in each group, by what the loss gains without half of it.

    Where the divergence from the dense outputs is measured, it takes the loss's place.
    """
    graph, evaluator = problem.graph, problem.evaluator
    subset = evaluator.draw_subset(problem.subset_size, problem.seed)
    gains = sensitivity(evaluator, graph, values.astype(np.float32), subset=subset)
    positive = np.maximum(gains.astype(np.float64), 0.0)
    floor = LEAST_SENSITIVITY * max(float(positive[graph.free].mean()), 1e-12)
    return _over_group_mean(graph, values) * np.maximum(positive, floor)


def _over_group_mean(graph: StructureGraph, values: Float64Array) -> Float64Array:
    return values / np.maximum(group_mean(graph, values), 1e-30)


def isomorphic(problem: Problem, values: Float64Array) -> Float64Array:
    """Compare importances among groups of isomorphic structure, and keep the same share of each.

    Fang et al. 2024 (ECCV, "Isomorphic Pruning for Vision Models"), section 3.2: importances of
    different structures are not comparable, so each kind of structure has a ranking of its own.
    """
    return rank_within(isomorphic_parts(problem.graph), values)


def isomorphic_parts(graph: StructureGraph) -> IntArray:
    """Return ``[N]`` the number of each unit's kind of structure.

    Two groups are of one kind if they touch the same kinds of operations in the same order and on
    the same sides. Sizes do not count: as in the paper it is the topology that must be the same, so
    that the inner channels of all stages compete.
    """
    touched: list[list[object]] = [[group.frozen] for group in graph.groups]
    for op in graph.ops:
        kind = (op.kind, op.depthwise, op.groups > 1)
        for side, units in (("writes", op.out_units), ("reads", op.in_units)):
            for group in np.unique(graph.group_of[units]).tolist():
                touched[group].append((*kind, side))
    kinds = {key: number for number, key in enumerate(dict.fromkeys(map(tuple, touched)))}
    return np.array([kinds[tuple(key)] for key in touched])[graph.group_of]


def num_sensitivity_networks(graph: StructureGraph) -> int:
    """Return how many networks ``sensitivity`` runs: one for each free group, and the dense one."""
    return len(graph.free_groups) + 1


def sensitivity(
    evaluator: Evaluator,
    graph: StructureGraph,
    scores: FloatArray,
    *,
    subset: Tensor | None = None,
) -> FloatArray:
    """Measure what the loss gains when half of one group goes, for each group in turn.

    Where the evaluator measures the divergence from the dense outputs, it takes the loss's place.

    Half is rounded down, and the group's minimum stays.

    The evaluator counts the networks: one for each free group, and one for the whole network
    under the same recalibration.

    Args:
        evaluator: scores masks on search images.
        graph: the structure.
        scores: ``[N]``, the group's lowest go.
        subset: positions in the search split; None = all.

    Returns:
        ``[N]`` the group's gain (nats), at each of its units; frozen 0.
    """

    def measured(mask: ChannelMask) -> float:
        outcome = evaluator.evaluate(mask, subset)
        return outcome.loss if outcome.kl is None else outcome.kl

    dense = measured(graph.dense_mask())
    gains = np.zeros(graph.num_units, dtype=np.float32)
    for group in graph.groups:
        units = group.units[graph.free[group.units]]
        if not units.size:
            continue
        num_removed = min(units.size // 2, len(group.units) - group.min_keep)
        keep = np.ones(graph.num_units, dtype=bool)
        keep[units[np.argsort(scores[units], kind="stable")[: max(num_removed, 0)]]] = False
        gains[units] = measured(graph.mask(keep)) - dense
    return gains


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """How units are compared.

    Attributes:
        scores: from importances ``[N]`` to scores ``[N]``; ``project`` keeps the highest.
        groups_compete: whether importances of different groups are compared as they are.
        num_networks: pruned networks that it runs on a structure; None = it runs none.
    """

    scores: Callable[[Problem, Float64Array], Float64Array]
    groups_compete: bool = False
    num_networks: Callable[[StructureGraph], int] | None = None


ALLOCATIONS: Mapping[str, Allocation] = {
    "uniform": Allocation(scores=uniform),
    "global": Allocation(scores=globally, groups_compete=True),
    "per_mac": Allocation(scores=per_mac, groups_compete=True),
    "sensitivity": Allocation(scores=by_sensitivity, num_networks=num_sensitivity_networks),
    "skip_full": Allocation(scores=skip_full),
    "isomorphic": Allocation(scores=isomorphic),
}
"""Every allocation by name."""


def find_allocation(name: str) -> Allocation:
    """Return the allocation of that name.

    Raises:
        ConfigError: there is none.
    """
    return find_named(name, ALLOCATIONS, "allocation")


def allocate(
    problem: Problem,
    values: FloatArray | Float64Array,
    allocation: str,
    *,
    of_the_layer: bool = False,
) -> Result:
    """Choose the mask of importances of one's own; only ``sensitivity`` runs networks.

    Args:
        problem: what to prune.
        values: ``[N]`` finite importances, higher = keep first.
        allocation: one of ``ALLOCATIONS``.
        of_the_layer: the values' scale is that of a layer, its fan-in, width or map size: where
            groups compete, they are divided by the group's mean.

    Raises:
        ConfigError: unknown allocation.
        MaskError: values of another shape, or not finite.
    """
    found = find_allocation(allocation)
    graph, before = problem.graph, problem.evaluator.num_networks
    check_scores(graph, values)
    exact = np.asarray(values, dtype=np.float64)
    if of_the_layer and found.groups_compete:
        exact = _over_group_mean(graph, exact)
    scores = found.scores(problem, exact)
    # ranks of the scores, since float32 would run some of them together
    order = np.argsort(np.argsort(-scores, kind="stable"), kind="stable")
    mask = problem.project(-order.astype(np.float32))
    return Result(mask=mask, networks=problem.evaluator.num_networks - before)
