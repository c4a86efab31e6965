"""Where searches begin: of a few heuristics the one whose mask is best before any search."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prunegraph.core.budget import Budget
from prunegraph.core.masks import BoolArray, ChannelMask, Float64Array, FloatArray, IntArray
from prunegraph.core.task import Task
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.graph import StructureGraph
from prunegraph.graph.features import (
    in_stream,
    prior_scores,
    rank_in_group,
    rank_within,
    standardised,
)
from prunegraph.methods.criteria.registry import importance
from prunegraph.tasks.batches import num_tokens

FIRST_PRIOR = "taylor/per_mac"
"""What policies start from where no mask can be run."""

PRIORS = (
    FIRST_PRIOR,
    "taylor/skip_full",
    "taylor/uniform",
    "fpgm/skip_full",
    "fpgm/uniform",
    "l2/skip_full",
    "l2/uniform",
    "activation/uniform",
)
"""Heuristics that cost one look at the dense network, and differ. None is the best everywhere."""

TOKEN_PRIORS = (
    "obs/skip_full",
    FIRST_PRIOR,
    "taylor/skip_full",
    "taylor/global",
    "flap/skip_full",
    "flap/global",
    "activation/skip_full",
    "activation/global",
)
"""Those of networks that read tokens. Their residual streams had better stay whole."""

BEST = 4
"""Heuristics that make the mean."""

MEAN = f"mean of the best {BEST}"
"""The prior that averages the scores of the best of ``PRIORS``."""

NUM_PRIORS = len(PRIORS) + 1
"""Networks that are run to choose among all of a task."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Prior:
    """What a search moves.

    Attributes:
        name: the heuristic, one of ``PRIORS``, or ``MEAN``.
        scores: ``[N]`` higher = keep; mean 0 and deviation 1 over the free units, frozen 0.
        divergence: of its mask.
    """

    name: str
    scores: FloatArray
    divergence: float


DEPTHS = (25, 50, 100)
"""Percent of what has to go that whole sub-layers take, where they may leave (``without``)."""


def prior_names(task: Task, graph: StructureGraph) -> tuple[str, ...]:
    """Return the heuristics that policies and searches of a task start from, as many in any case.

    Where sub-layers may leave wholly, the last ones give way to those that let some leave.
    """
    usual = TOKEN_PRIORS if num_tokens(task.example_inputs) else PRIORS
    if graph.min_keep.all():
        return usual
    criterion = usual[0].partition("/")[0]
    return (*usual[: -len(DEPTHS)], *(f"{criterion}/depth_{share}" for share in DEPTHS))


def scores_of_prior(
    name: str, graph: StructureGraph, statistics: Mapping[str, FloatArray], budget: Budget
) -> FloatArray:
    """Return a heuristic's scores ``[N]`` on the scale on which policies decide.

    Args:
        name: one of ``PRIORS``.
        graph: the structure.
        statistics: measured arrays ``[N]``.
        budget: decides what ``per_mac`` divides by.
    """
    if name == FIRST_PRIOR:
        return prior_scores(graph, statistics, budget)
    criterion, allocation = name.split("/")
    values = importance(criterion, statistics, graph.num_units, seed=0)
    if allocation == "global":
        return standardised(graph, rank_within(np.zeros_like(graph.group_of), values))
    if allocation.startswith("depth_"):
        share = int(allocation.removeprefix("depth_")) / 100
        gone = without(graph, statistics["taylor"], budget, share)
        return standardised(graph, streams_first(graph, values) - 2.0 * gone)
    ranks = streams_first if allocation == "skip_full" else rank_in_group
    return standardised(graph, ranks(graph, values))


def rank_priors(
    divergence: Callable[[ChannelMask], float],
    graph: StructureGraph,
    statistics: Mapping[str, FloatArray],
    budget: Budget,
    names: Sequence[str] = PRIORS,
) -> list[Prior]:
    """Run the mask of each heuristic and of the best ones' mean, and return all, the best first.

    Importances measure different things, each with its own mistakes: their mean is often better
    than the best of them.

    Args:
        divergence: of a mask, lower = better, as the divergence from the dense network's outputs.
        graph: the structure.
        statistics: measured arrays ``[N]``.
        budget: what may remain; a latency counts where the structure predicts it.
        names: which of ``PRIORS`` are tried, the mean only if they are more than it takes; equal
            ones stay in this order.
    """
    limits = budget if graph.latency_model is not None else budget.without_latency()

    def tried(name: str, scores: FloatArray) -> Prior:
        return Prior(name=name, scores=scores, divergence=divergence(graph.project(scores, limits)))

    def ranked(priors: Sequence[Prior]) -> list[Prior]:
        return sorted(priors, key=lambda prior: worst_last(prior.divergence))

    priors = ranked(
        [tried(name, scores_of_prior(name, graph, statistics, budget)) for name in names]
    )
    if len(priors) <= BEST:
        return priors
    mean = np.mean([prior.scores for prior in priors[:BEST]], axis=0)
    return ranked([*priors, tried(MEAN, standardised(graph, mean))])


def worst_last(divergence: float) -> float:
    """Return a divergence as it is compared: four digits, since rounding errors must not choose.

    What is no number comes last.
    """
    return float(f"{divergence:.4g}") if math.isfinite(divergence) else math.inf


def streams_first(graph: StructureGraph, values: Float64Array) -> Float64Array:
    """Return ``[N]`` ranks within the group, those of residual streams above all others."""
    return rank_in_group(graph, values) + in_stream(graph)


def without(
    graph: StructureGraph, values: FloatArray | Float64Array, budget: Budget, share: float
) -> BoolArray:
    """Return ``[N]`` True in sub-layers that leave wholly, the least values for the cost first.

    Args:
        graph: the structure.
        values: ``[N]`` importances that are compared across groups.
        budget: what may remain.
        share: of what has to go that they take, at most.
    """
    keep = np.ones(graph.num_units, dtype=bool)
    whole = graph.cost_ratio(keep, budget)
    able = [group.units for group in graph.groups if not group.min_keep]

    def worth(units: IntArray) -> float:
        left = keep.copy()
        left[units] = False
        freed = whole - graph.cost_ratio(left, budget)
        return float(values[units].sum()) / max(freed, 1e-12)

    for units in sorted(able, key=worth):
        keep[units] = False
        if graph.cost_ratio(keep, budget) < whole - share * (whole - 1.0):
            keep[units] = True
    return ~keep


def measure_divergence(evaluator: Evaluator, mask: ChannelMask) -> float:
    """Return a mask's KL divergence from the dense outputs in nats; the evaluator measures it."""
    value = evaluator.evaluate(mask).kl
    assert value is not None
    return value
