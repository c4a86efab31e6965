"""Where a trained policy starts on networks that it has not seen, and how far it is trusted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from prunegraph.agent.distill import with_strength
from prunegraph.agent.policies import TrainedPolicy
from prunegraph.agent.subject import Subject
from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError
from prunegraph.core.masks import ChannelMask
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
class Adapted:
    """A policy that fits networks.

    Attributes:
        policy: with the best strength of what it learned.
        strength: that one.
        divergence: strength -> mean over networks and budgets, each from its best prior.
        masks: what the policy decides, in the order of networks, then budgets.
        subjects: the networks with the priors that it starts from.
    """

    policy: TrainedPolicy
    strength: float
    divergence: Mapping[float, float]
    masks: Sequence[ChannelMask]
    subjects: Sequence[Subject]


def adapt(policy: TrainedPolicy, subjects: Sequence[Subject], budgets: Sequence[Budget]) -> Adapted:
    """Run what a policy decides with each of ``STRENGTHS``; return the best, of equal the least.

    Mistakes on networks that a policy has not seen are as large as what it learned; on some
    half of it is better than all, on few none is. Which prior is best depends on the strength.
    Decisions are judged by the networks' outputs on train data.

    Args:
        policy: as it learned.
        subjects: networks, at least one.
        budgets: that it is to decide at, on each of them.

    Raises:
        BudgetError: no strength meets a budget from any prior; on the clock some may not.
    """
    cases = [(subject, budget) for subject in subjects for budget in budgets]
    divergence: dict[float, float] = {}
    decided: dict[float, tuple[TrainedPolicy, list[_Decision]]] = {}
    for strength in STRENGTHS:
        candidate = with_strength(policy, strength)
        try:
            found = [_decide(candidate, *case) for case in cases]
        except BudgetError:
            if strength == STRENGTHS[-1] and not decided:
                raise
            continue
        decided[strength] = candidate, found
        divergence[strength] = fmean(decision.divergence for decision in found)
    best = min(divergence, key=lambda strength: worst_last(divergence[strength]))
    chosen, found = decided[best]
    priors = iter(decision.prior for decision in found)  # each takes as many as there are budgets
    return Adapted(
        policy=chosen,
        strength=best,
        divergence=divergence,
        masks=[decision.mask for decision in found],
        subjects=[
            subject.starting_from(dict(zip(budgets, priors, strict=False))) for subject in subjects
        ],
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Decision:
    """What a policy decides on one network: from which prior, how bad it is."""

    mask: ChannelMask
    prior: str
    divergence: float


def _decide(policy: TrainedPolicy, subject: Subject, budget: Budget) -> _Decision:
    """Return the best of what a policy decides from each prior that lets it meet the budget."""
    found, missed = [], None
    for prior in subject.priors(budget)[:TRIED_PRIORS]:
        try:
            mask = subject.starting_from({budget: prior.name}).mask(policy, budget)
        except BudgetError as error:
            missed = error
            continue
        divergence = measure_divergence(subject.problem.unlabelled, mask)
        found.append(_Decision(mask=mask, prior=prior.name, divergence=divergence))
    if missed is not None and not found:
        raise missed
    return min(found, key=lambda decision: worst_last(decision.divergence))
