"""Where a trained policy starts on networks that it has not seen, and how far it is trusted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from prunegraph.agent.distill import with_strength
from prunegraph.agent.policies import TrainedPolicy
from prunegraph.agent.subject import Subject, first_context
from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError
from prunegraph.core.masks import ChannelMask, FloatArray
from prunegraph.graph import StructureGraph
from prunegraph.graph.pyg import to_pyg
from prunegraph.methods.prior import NUM_PRIORS, measure_divergence, worst_last

STRENGTHS = (0.0, 0.5, 1.0)
"""Of what a policy learned, beside the prior that it starts from: these are tried."""

TRIED_PRIORS = 4
"""From so many priors, those that are best by themselves, each strength is tried."""

NUM_ADAPT_NETWORKS = (len(STRENGTHS) - 1) * TRIED_PRIORS
"""Networks that ``adapt`` runs. None of what learned is the prior itself, which has been run
(unless a latency cut it more)."""

NUM_DECISION_NETWORKS = NUM_PRIORS + NUM_ADAPT_NETWORKS
"""Pruned networks that a policy runs, with ``adapt``, to decide on one network."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """A network and a budget that a policy is to decide on.

    Attributes:
        graph: the network.
        budget: what may remain.
        features: prior -> ``[N, F]`` what the policy reads if it starts from there.
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
        policy: with the best strength of what it learned.
        strength: that one.
        divergence: strength -> mean over the cases, each from its best prior.
        masks: what the policy decides, one mask a case.
        priors: what it starts from, one a case.
    """

    policy: TrainedPolicy
    strength: float
    divergence: Mapping[float, float]
    masks: Sequence[ChannelMask]
    priors: Sequence[str]


def adapt(policy: TrainedPolicy, cases: Sequence[Case]) -> Adapted:
    """Run what a policy decides with each of ``STRENGTHS``; return the best, of equal the least.

    Mistakes on networks that a policy has not seen are as large as what it learned; on some
    half of it is better than all, on few none is. Which prior is best depends on the strength.

    Args:
        policy: as it learned.
        cases: at least one.

    Raises:
        BudgetError: no strength meets a budget from any prior; on the clock some may not.
    """
    divergence: dict[float, float] = {}
    decided: dict[float, tuple[TrainedPolicy, list[_Decision]]] = {}
    for strength in STRENGTHS:
        candidate = with_strength(policy, strength)
        try:
            found = [_decide(candidate, case) for case in cases]
        except BudgetError:
            if strength == STRENGTHS[-1] and not decided:
                raise
            continue
        decided[strength] = candidate, found
        divergence[strength] = fmean(decision.divergence for decision in found)
    best = min(divergence, key=lambda strength: worst_last(divergence[strength]))
    chosen, found = decided[best]
    return Adapted(
        policy=chosen,
        strength=best,
        divergence=divergence,
        masks=[decision.mask for decision in found],
        priors=[decision.prior for decision in found],
    )


def adapt_to(
    policy: TrainedPolicy, subjects: Sequence[Subject], budgets: Sequence[Budget]
) -> tuple[Adapted, list[Subject]]:
    """Fit a policy to networks, each at each budget, judged by its outputs on train data.

    Returns:
        What ``adapt`` does, masks in the order of networks, then budgets; and the networks, with
        the priors that fit the policy.
    """
    cases = [_case(policy, subject, budget) for subject in subjects for budget in budgets]
    adapted = adapt(policy, cases)
    priors = iter(adapted.priors)  # each network takes as many as there are budgets
    return adapted, [
        subject.starting_from(dict(zip(budgets, priors, strict=False))) for subject in subjects
    ]


def _case(policy: TrainedPolicy, subject: Subject, budget: Budget) -> Case:
    names, problem = policy.network.config.feature_names, subject.problem
    return Case(
        graph=problem.graph,
        budget=budget,
        features={
            prior.name: problem.features(names, budget, prior.scores)
            for prior in subject.priors(budget)[:TRIED_PRIORS]
        },
        project=partial(problem.project, budget=budget),
        divergence=partial(measure_divergence, problem.unlabelled),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Decision:
    """What a policy decides on one network: from which prior, how bad it is."""

    mask: ChannelMask
    prior: str
    divergence: float


def _decide(policy: TrainedPolicy, case: Case) -> _Decision:
    """Return the best of what a policy decides from each prior that lets it meet the budget."""
    data, context = to_pyg(case.graph), first_context(case.budget)
    found, missed = [], None
    for prior, features in case.features.items():
        try:
            mask = case.project(policy.logits(data, features, context))
        except BudgetError as error:
            missed = error
            continue
        found.append(_Decision(mask=mask, prior=prior, divergence=case.divergence(mask)))
    if missed is not None and not found:
        raise missed
    return min(found, key=lambda decision: worst_last(decision.divergence))
