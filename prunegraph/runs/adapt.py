"""Where a trained policy starts on networks that it has not seen, and how far it is trusted."""

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import cast

import numpy as np

from prunegraph.agent.distill import with_strength
from prunegraph.agent.policies import TrainedPolicy
from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError
from prunegraph.core.masks import ChannelMask, FloatArray
from prunegraph.graph import StructureGraph
from prunegraph.graph.features import CONTEXT_NAMES, node_features
from prunegraph.graph.pyg import to_pyg
from prunegraph.methods.prior import NUM_PRIORS, Prior, measure_divergence, worst_last
from prunegraph.runs.bench import Bench

STRENGTHS = (0.0, 0.5, 1.0)
"""Of what a policy was taught, beside the heuristic that it starts from: these are tried."""

TRIED_STARTS = 4
"""From so many starts, those that are best by themselves, each share is tried."""

NUM_SUIT_NETWORKS = (len(STRENGTHS) - 1) * TRIED_STARTS
"""Networks that ``adapt`` runs. None of what was taught is the start itself, which has been run
(unless a latency cut it more)."""

NUM_DECISION_NETWORKS = NUM_PRIORS + NUM_SUIT_NETWORKS
"""Pruned networks that a policy runs, with ``adapt``, to decide on one network."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Use:
    """A network and a budget that a policy is to decide on.

    Attributes:
        graph: the network.
        budget: what may remain.
        features: start -> ``[N, F]`` what the policy reads if it starts from there.
        project: scores ``[N]`` to the mask of the best ones within the budget.
        divergence: of a mask, lower = better.
    """

    graph: StructureGraph
    budget: Budget
    features: Mapping[str, FloatArray]
    project: Callable[[FloatArray], ChannelMask]
    divergence: Callable[[ChannelMask], float]


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapted:
    """A policy that fits networks.

    Attributes:
        policy: with the best share of what it was taught.
        share: that one.
        divergence: share -> mean over the uses, each from its best start.
        masks: what the policy decides, one mask a use.
        starts: what it starts from, one a use.
    """

    policy: TrainedPolicy
    share: float
    divergence: Mapping[float, float]
    masks: Sequence[ChannelMask]
    starts: Sequence[str]


def adapt(policy: TrainedPolicy, cases: Sequence[Use]) -> Adapted:
    """Run what a policy decides with each of ``STRENGTHS``; return the best, of equal the least.

    Mistakes on networks that a policy has not seen are as large as what it was taught; on some
    half of it is better than all, on few none is. Which start is best depends on the share.

    Args:
        policy: as it was taught.
        cases: at least one.

    Raises:
        BudgetError: no share meets a budget from any start; on the clock some may not.
    """
    divergence: dict[float, float] = {}
    decided: dict[float, tuple[TrainedPolicy, list[_Decision]]] = {}
    for share in STRENGTHS:
        candidate = with_strength(policy, share)
        try:
            found = [_decide(candidate, use) for use in cases]
        except BudgetError:
            if share == STRENGTHS[-1] and not decided:
                raise
            continue
        decided[share] = candidate, found
        divergence[share] = fmean(decision.divergence for decision in found)
    best = min(divergence, key=lambda share: worst_last(divergence[share]))
    chosen, found = decided[best]
    return Adapted(
        policy=chosen,
        share=best,
        divergence=divergence,
        masks=[decision.mask for decision in found],
        starts=[decision.start for decision in found],
    )


def adapt_contexts(
    policy: TrainedPolicy, benches: Sequence[Bench], budgets: Sequence[Budget]
) -> tuple[Adapted, list[Bench]]:
    """Fit a policy to networks, each at each budget, judged by its outputs on train images.

    Returns:
        What ``adapt`` does, masks in the order of networks, then budgets; and the benches, from the
        starts that suit the policy.
    """
    names = policy.network.config.feature_names
    cases = [
        Use(
            graph=bench.target.graph,
            budget=budget,
            features=features_by_start(
                bench.target.graph, bench.context.statistics, budget, names, bench.priors(budget)
            ),
            project=partial(bench.project, budget=budget),
            divergence=partial(measure_divergence, bench.unlabelled),
        )
        for bench in benches
        for budget in budgets
    ]
    adapted = adapt(policy, cases)
    starts = iter(adapted.starts)  # each bench takes as many as there are budgets
    return adapted, [
        bench.starting_from(dict(zip(budgets, starts, strict=False))) for bench in benches
    ]


def features_by_start(
    graph: StructureGraph,
    statistics: Mapping[str, FloatArray],
    budget: Budget,
    names: Sequence[str],
    starts: Sequence[Prior],
) -> dict[str, FloatArray]:
    """Return what a policy reads from each of the best starts, for ``Use``.

    Args:
        graph: the network.
        statistics: measured arrays ``[N]``.
        budget: what may remain.
        names: of the features.
        starts: at least one, the best one first.
    """
    return {
        start.name: node_features(
            graph,
            ChainMap({"start": start.scores}, cast(dict[str, FloatArray], statistics)),
            budget,
            names,
        )
        for start in starts[:TRIED_STARTS]
    }


def first_context(budget: Budget) -> FloatArray:
    """Return the context of an episode's first observation."""
    values = {"cost_so_far": 1.0, "keep_macs": 1.0, "keep_params": 1.0} | budget.as_dict()
    return np.array([values.get(name, 0.0) for name in CONTEXT_NAMES], dtype=np.float32)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Decision:
    """What a policy decides on one network: from which start, how bad it is."""

    mask: ChannelMask
    start: str
    divergence: float


def _decide(policy: TrainedPolicy, use: Use) -> _Decision:
    """Return the best of what a policy decides from each start that lets it meet the budget."""
    data, context = to_pyg(use.graph), first_context(use.budget)
    found, missed = [], None
    for start, features in use.features.items():
        try:
            mask = use.project(policy.logits(data, features, context))
        except BudgetError as error:
            missed = error
            continue
        found.append(_Decision(mask=mask, start=start, divergence=use.divergence(mask)))
    if missed is not None and not found:
        raise missed
    return min(found, key=lambda decision: worst_last(decision.divergence))
