"""Heuristics: a criterion says which channels, an allocation how many of each group."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from prunegraph.core.errors import ConfigError, MaskError
from prunegraph.core.masks import Float64Array, FloatArray, IntArray
from prunegraph.graph import StructureGraph
from prunegraph.graph.features import group_mean, in_stream, rank_in_group, rank_within, unit_cost
from prunegraph.graph.projection import check_scores
from prunegraph.methods.criteria.registry import CRITERION_NAMES, importance
from prunegraph.methods.criteria.taylor import num_sensitivity_networks, sensitivity
from prunegraph.methods.problem import PrunerResult, PruningProblem

SENSITIVITY_IMAGES = 1500
"""Search images that each group's sensitivity is measured on."""

OF_THE_LAYER = ("l1", "l2", "fpgm", "activation", "apoz", "hrank", "chip")
"""Criteria whose scale is that of a layer: its fan-in, width or map size. Where groups compete,
they are divided by the group's mean, as by Torch-Pruning; else whole groups would go."""

LEAST_SENSITIVITY = 0.3
"""Sensitivities are at least this share of their mean: noise may make them negative, and what the
kept weights take over when half of one group goes is lost when more does."""


def uniform(problem: PruningProblem, values: Float64Array) -> Float64Array:
    """Keep the same share of every group: the score is the rank within the group."""
    return rank_in_group(problem.graph, values)


def globally(_problem: PruningProblem, values: Float64Array) -> Float64Array:
    """Compare importances across groups."""
    return values


def per_mac(problem: PruningProblem, values: Float64Array) -> Float64Array:
    """Compare importances per MAC that the unit frees (per parameter, if only those count)."""
    return values / unit_cost(problem.graph, problem.budget)


def skip_full(problem: PruningProblem, values: Float64Array) -> Float64Array:
    """Keep residual streams whole as far as the budget lets, and be uniform elsewhere."""
    return streams_first(problem.graph, values)


def streams_first(graph: StructureGraph, values: Float64Array) -> Float64Array:
    """Return ``[N]`` ranks within the group, those of residual streams above all others."""
    return rank_in_group(graph, values) + in_stream(graph)


def by_sensitivity(problem: PruningProblem, values: Float64Array) -> Float64Array:
    """Scale importances, normalised in each group, by what the loss gains without half of it.

    Where the divergence from the dense outputs is measured, it takes the loss's place.

    Raises:
        ConfigError: ``max_networks`` is below the networks that this runs.
    """
    graph, evaluator = problem.graph, problem.evaluator
    needed = num_sensitivity_networks(graph)
    if problem.max_networks < needed:
        msg = (
            f"allocation 'sensitivity' runs {needed} networks on this structure, "
            f"max_networks={problem.max_networks} allows fewer: raise it or choose another one"
        )
        raise ConfigError(msg)
    subset = evaluator.draw_subset(SENSITIVITY_IMAGES, problem.seed)
    by: Literal["loss", "kl"] = "kl" if evaluator.metric == "kl" else "loss"
    gains = sensitivity(evaluator, graph, values.astype(np.float32), subset=subset, by=by)
    positive = np.maximum(gains.astype(np.float64), 0.0)
    floor = LEAST_SENSITIVITY * max(float(positive[graph.free].mean()), 1e-12)
    return _over_group_mean(graph, values) * np.maximum(positive, floor)


def _over_group_mean(graph: StructureGraph, values: Float64Array) -> Float64Array:
    return values / np.maximum(group_mean(graph, values), 1e-30)


def isomorphic(problem: PruningProblem, values: Float64Array) -> Float64Array:
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


ALLOCATIONS: Mapping[str, Callable[[PruningProblem, Float64Array], Float64Array]] = {
    "uniform": uniform,
    "global": globally,
    "per_mac": per_mac,
    "sensitivity": by_sensitivity,
    "skip_full": skip_full,
    "isomorphic": isomorphic,
}
"""Allocation -> scores ``[N]`` from importances ``[N]``; ``project`` keeps the highest."""


def allocate(
    problem: PruningProblem,
    values: FloatArray | Float64Array,
    allocation: str,
    *,
    of_the_layer: bool = False,
) -> PrunerResult:
    """Choose the mask of importances of one's own; only ``sensitivity`` runs networks.

    Args:
        problem: what to prune.
        values: ``[N]`` finite importances, higher = keep first.
        allocation: one of ``ALLOCATIONS``.
        of_the_layer: the values' scale is that of a layer, its fan-in, width or map size: where
            groups compete, they are divided by the group's mean.

    Raises:
        ConfigError: unknown allocation, or ``max_networks`` is below the networks that it runs.
        MaskError: values of another shape, or not finite.
    """
    _check_allocation(allocation)
    graph, before = problem.graph, problem.evaluator.num_networks
    check_scores(graph, values)
    exact = np.asarray(values, dtype=np.float64)
    if of_the_layer and allocation in ("global", "per_mac"):
        exact = _over_group_mean(graph, exact)
    scores = ALLOCATIONS[allocation](problem, exact)
    # ranks of the scores, since float32 would run some of them together
    order = np.argsort(np.argsort(-scores, kind="stable"), kind="stable")
    mask = problem.project(-order.astype(np.float32))
    return PrunerResult(mask=mask, networks_evaluated=problem.evaluator.num_networks - before)


@dataclass(frozen=True)
class HeuristicPruner:
    """Keeps the units with the highest scores that fit the budget.

    Args:
        criterion: one of ``CRITERION_NAMES``.
        allocation: one of ``ALLOCATIONS``.
    """

    criterion: str
    allocation: str

    def __post_init__(self) -> None:
        _check_criterion(self.criterion)
        _check_allocation(self.allocation)

    @property
    def name(self) -> str:
        """``"criterion/allocation"``."""
        return f"{self.criterion}/{self.allocation}"

    def prune(self, problem: PruningProblem) -> PrunerResult:
        """Choose a mask that meets the problem's budget; only ``sensitivity`` runs networks."""
        values = importance(
            self.criterion, problem.statistics, problem.graph.num_units, problem.seed
        )
        of_the_layer = self.criterion in OF_THE_LAYER
        return allocate(problem, values, self.allocation, of_the_layer=of_the_layer)


@dataclass(frozen=True)
class WidthsPruner:
    """Keeps given numbers of units a group, chosen by a criterion.

    Answers whether a mask is good for *which* channels it keeps or for *how many*: the cost is that
    of the mask whose widths are given.

    Args:
        criterion: one of ``CRITERION_NAMES``.
        widths: kept units of each group that may be pruned (``StructureGraph.group_widths``).
    """

    criterion: str
    widths: Mapping[str, int]

    def __post_init__(self) -> None:
        _check_criterion(self.criterion)

    @property
    def name(self) -> str:
        """``"criterion/control_widths"``."""
        return f"{self.criterion}/control_widths"

    def prune(self, problem: PruningProblem) -> PrunerResult:
        """Choose the mask; runs no network.

        Raises:
            MaskError: the widths name other groups, or a width is out of range.
        """
        graph = problem.graph
        values = importance(self.criterion, problem.statistics, graph.num_units, problem.seed)
        if set(self.widths) != set(graph.group_widths(graph.dense_mask())):
            odd = sorted(set(self.widths) ^ set(graph.group_widths(graph.dense_mask())))
            msg = f"widths do not fit this structure: {odd[0]!r} is missing or unknown"
            raise MaskError(msg)
        keep = graph.frozen.copy()
        for group in graph.groups:
            width = self.widths.get(group.name, 0)
            if width > len(group.units):
                msg = f"{group.name} has {len(group.units)} units, not {width}"
                raise MaskError(msg)
            order = np.argsort(-values[group.units], kind="stable")
            keep[group.units[order[:width]]] = True
        return PrunerResult(mask=graph.mask(keep))


def _check_criterion(criterion: str) -> None:
    if criterion not in CRITERION_NAMES:
        msg = f"unknown criterion {criterion!r}; there are {', '.join(CRITERION_NAMES)}"
        raise ConfigError(msg)


def _check_allocation(allocation: str) -> None:
    if allocation not in ALLOCATIONS:
        msg = f"unknown allocation {allocation!r}; there are {', '.join(ALLOCATIONS)}"
        raise ConfigError(msg)
