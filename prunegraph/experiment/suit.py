"""How far a trained policy is to be trusted on networks that it has not seen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np

from prunegraph.agent import CONTEXT_NAMES, TrainedPolicy, with_share
from prunegraph.errors import BudgetError
from prunegraph.experiment.bench import Bench, num_probes
from prunegraph.graph import StructureGraph
from prunegraph.graph.encode import to_pyg
from prunegraph.pruners.start import worst_last
from prunegraph.pruning.statistics import divergence
from prunegraph.types import Budget, FloatArray, KeepMask

SHARES = (0.0, 0.5, 1.0)
"""Of what a policy was taught, beside the heuristic that it starts from: these are tried."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Use:
    """A network and a budget that a policy is to decide on.

    Attributes:
        graph: the network.
        budget: what may remain.
        features: ``[N, F]`` those that the policy reads.
        project: scores ``[N]`` to the mask of the best ones within the budget.
        badness: of a mask, lower = better.
    """

    graph: StructureGraph
    budget: Budget
    features: FloatArray
    project: Callable[[FloatArray], KeepMask]
    badness: Callable[[KeepMask], float]


@dataclass(frozen=True, eq=False, kw_only=True)
class Suited:
    """A policy that fits networks.

    Attributes:
        policy: with the best share of what it was taught.
        share: that one.
        badness: share -> mean over the uses.
        masks: what the policy decides, one mask a use.
    """

    policy: TrainedPolicy
    share: float
    badness: Mapping[float, float]
    masks: Sequence[KeepMask]


def suit(policy: TrainedPolicy, cases: Sequence[Use]) -> Suited:
    """Run what a policy decides with each of ``SHARES``, and return the best; of equal the least.

    Mistakes on networks that a policy has not seen are as large as what it was taught; on some
    half of it is better than all, on few none is.

    Args:
        policy: as it was taught.
        cases: at least one.

    Raises:
        BudgetError: no share meets the budget; on the clock some may not.
    """
    badness: dict[float, float] = {}
    decided: dict[float, tuple[TrainedPolicy, list[KeepMask]]] = {}
    for share in SHARES:
        candidate = with_share(policy, share)
        try:
            masks = [_decide(candidate, use) for use in cases]
        except BudgetError:
            if share == SHARES[-1] and not decided:
                raise
            continue
        decided[share] = candidate, masks
        badness[share] = fmean(use.badness(mask) for use, mask in zip(cases, masks, strict=True))
    best = min(badness, key=lambda share: worst_last(badness[share]))
    chosen, masks = decided[best]
    return Suited(policy=chosen, share=best, badness=badness, masks=masks)


def num_decision_networks(policy: TrainedPolicy, graph: StructureGraph) -> int:
    """Return how many pruned networks a policy runs, with ``suit``, to decide on one network."""
    return num_probes(graph, policy.network.config.feature_names) + len(SHARES)


def uses(policy: TrainedPolicy, benches: Sequence[Bench], budgets: Sequence[Budget]) -> list[Use]:
    """Return each network at each budget, judged by its outputs on train images."""
    names = policy.network.config.feature_names
    compared = [(bench, partial(divergence, bench.unlabelled())) for bench in benches]
    return [
        Use(
            graph=bench.target.graph,
            budget=budget,
            features=bench.node_features(budget, names),
            project=partial(bench.project, budget=budget),
            badness=badness,
        )
        for bench, badness in compared
        for budget in budgets
    ]


def first_context(budget: Budget) -> FloatArray:
    """Return the context of an episode's first observation, the critic's columns left at 0."""
    values = {"cost_so_far": 1.0, "keep_macs": 1.0, "keep_params": 1.0} | budget.as_dict()
    return np.array([values.get(name, 0.0) for name in CONTEXT_NAMES], dtype=np.float32)


def _decide(policy: TrainedPolicy, use: Use) -> KeepMask:
    context = first_context(use.budget)
    return use.project(policy.logits(to_pyg(use.graph), use.features, context))
