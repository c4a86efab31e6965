"""The forms of the reward: pure functions of an episode and the ledger before it.

Two let the agent compete with itself, one is the comparator (see ``RewardConfig``). Every evaluated
mask meets its budget, so a form is about the metric ``A`` alone; what the raw bits overshot is the
constraint's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from prunegraph.rewards.config import GAIN, REWARD_BOUND, RewardConfig
from prunegraph.rewards.episode import Episode
from prunegraph.rewards.ledger import SelfCompetitionLedger


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward and what it is made of.

    Attributes:
        value: the scalar, in [-10, 10].
        terms: ``competition + constraint = value`` (before the bound), and what they come from:
            ``metric``, ``bar`` (0 if there is none), ``overshoot``, ``multiplier``.
    """

    value: float
    terms: Mapping[str, float]


Form = Callable[[RewardConfig, float | None, float], float]
"""From the options, the bar (None = there is no past) and the metric to the reward."""


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
        multiplier: price of a budget of overshoot; used with ``constraint="lagrangian"``.
    """
    bar = comparison_bar(config, ledger)
    competition = FORMS[config.self_competition](config, bar, episode.metric(config.metric))
    multiplier = multiplier if config.constraint == "lagrangian" else 0.0
    constraint = -multiplier * episode.overshoot
    terms = {
        "competition": competition,
        "constraint": constraint,
        "metric": episode.metric(config.metric),
        "bar": 0.0 if bar is None else bar,
        "overshoot": episode.overshoot,
        "multiplier": multiplier,
    }
    return Reward(value=_clip(competition + constraint, -REWARD_BOUND, REWARD_BOUND), terms=terms)


def best(config: RewardConfig, bar: float | None, metric: float) -> float:
    """Compare with the best mask so far, measured on the same images.

    ``+1`` if ``A > A*`` or if there is none, else ``clip(gain (A - A*), floor, 0)`` (floor -1 by
    default).
    """
    if bar is None or metric > bar:
        return 1.0
    return _clip(GAIN * (metric - bar), config.floor, 0.0)


def ema(_: RewardConfig, bar: float | None, metric: float) -> float:
    """Compare with a running average, after MuZero-RC (Mandhane et al. 2022, arXiv 2202.06626).

    ``sign(A - A_ema)``. The first episode has no past: 0.
    """
    return 0.0 if bar is None else float(np.sign(metric - bar))


def plain(_: RewardConfig, __: float | None, metric: float) -> float:
    """Return the metric itself: the comparator without competition."""
    return metric


FORMS: Mapping[str, Form] = {"best": best, "ema": ema, "accuracy": plain}
"""The forms by name."""


def comparison_bar(config: RewardConfig, ledger: SelfCompetitionLedger) -> float | None:
    """Return the metric that the next episode is compared with, or None if there is none yet."""
    if config.self_competition == "best":
        return ledger.best_metric
    return ledger.ema_metric if config.self_competition == "ema" else None


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
