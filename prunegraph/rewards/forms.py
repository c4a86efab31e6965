"""The forms of the reward: pure functions of an episode and the ledger before it.

Two let the agent compete with itself, two are comparators (see ``RewardConfig``). With repair
every evaluated mask is feasible, and a form is about the metric ``A`` alone; without, the violation
``V`` of the evaluated mask comes first.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prunegraph.rewards.config import REWARD_BOUND, RewardConfig
from prunegraph.rewards.episode import Episode
from prunegraph.rewards.ledger import SelfCompetitionLedger


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward and what it is made of.

    Attributes:
        value: the scalar, in [-10, 10].
        terms: ``competition + constraint = value`` (before the bound), and what they come from:
            ``metric``, ``bar`` (0 if there is none), ``violation``, ``overshoot``,
            ``multiplier``.
    """

    value: float
    terms: Mapping[str, float]


Form = Callable[[RewardConfig, SelfCompetitionLedger, Episode], float]


def score(
    config: RewardConfig,
    ledger: SelfCompetitionLedger,
    episode: Episode,
    *,
    multiplier: float = 0.0,
) -> Reward:
    """Return the reward of an episode that the ledger does not hold yet.

    Args:
        config: the form and its options.
        ledger: the past.
        episode: the figures of the episode.
        multiplier: price of a budget of overshoot; used if ``config.uses_multiplier``.
    """
    competition = FORMS[config.self_competition](config, ledger, episode)
    multiplier = multiplier if config.uses_multiplier else 0.0
    constraint = -multiplier * episode.overshoot
    bar = comparison_bar(config, ledger)
    terms = {
        "competition": competition,
        "constraint": constraint,
        "metric": episode.metric(config.metric),
        "bar": 0.0 if bar is None else bar,
        "violation": episode.violation,
        "overshoot": episode.overshoot,
        "multiplier": multiplier,
    }
    return Reward(value=_clip(competition + constraint, -REWARD_BOUND, REWARD_BOUND), terms=terms)


def best(config: RewardConfig, ledger: SelfCompetitionLedger, episode: Episode) -> float:
    """Compare with the best mask so far, measured on the same images.

    ``+1`` if feasible and ``A > A*``, else ``clip(gain (A - A*), floor, 0)`` (floor -1 by
    default); ``-1`` if infeasible after something feasible was found, ``sign(V* - V)`` before.
    """
    if not episode.feasible:
        if ledger.feasible_found:
            return -1.0
        least = math.inf if ledger.least_violation is None else ledger.least_violation
        return _sign(least - episode.violation)
    bar = -math.inf if ledger.best_metric is None else ledger.best_metric
    difference = episode.metric(config.metric) - bar
    return 1.0 if difference > 0.0 else _clip(config.gain * difference, config.floor, 0.0)


def ema(config: RewardConfig, ledger: SelfCompetitionLedger, episode: Episode) -> float:
    """Compare with running averages, after MuZero-RC (Mandhane et al. 2022, arXiv 2202.06626).

    ``sign(V_ema - V)`` if one of them exceeds ``epsilon``, else ``sign(A - A_ema)``. The first
    episode has no past: 0.
    """
    if ledger.ema_metric is None or ledger.ema_violation is None:
        return 0.0
    if max(episode.violation, ledger.ema_violation) > config.epsilon:
        return _sign(ledger.ema_violation - episode.violation)
    return _sign(episode.metric(config.metric) - ledger.ema_metric)


def plain(config: RewardConfig, _: SelfCompetitionLedger, episode: Episode) -> float:
    """Return the metric itself: the comparators without competition."""
    return episode.metric(config.metric)


FORMS: Mapping[str, Form] = {
    "best": best,
    "ema": ema,
    "accuracy": plain,
    "lagrangian": plain,
}
"""The forms by name."""


def comparison_bar(config: RewardConfig, ledger: SelfCompetitionLedger) -> float | None:
    """Return the metric that the next episode is compared with, or None if there is none yet."""
    if config.self_competition == "best":
        return ledger.best_metric
    return ledger.ema_metric if config.self_competition == "ema" else None


def _sign(value: float) -> float:
    return float((value > 0.0) - (value < 0.0))


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
