"""Options of the reward: what is compared with what, and how the budget enters."""

from dataclasses import dataclass
from typing import Literal, get_args

from prunegraph.core.checks import check_choice, check_range

SelfCompetitionForm = Literal["best", "ema", "accuracy"]
Metric = Literal["accuracy", "soft_accuracy", "kl"]
Constraint = Literal["bias", "lagrangian"]

GAIN = 10.0
"""Of the reward for a difference of the metric."""

REWARD_BOUND = 10.0
"""Rewards lie between minus this and this."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How a pruned network's measurements become a reward.

    Attributes:
        self_competition: what the network competes with: the best mask so far (``"best"``),
            running averages (``"ema"``), or no competition: the metric itself (``"accuracy"``).
        metric: what is compared: ``"accuracy"``; ``"soft_accuracy"`` (the mean probability of the
            right class: few images tell more by it); or ``"kl"`` (minus the divergence from the
            dense network).
        constraint: ``"lagrangian"`` takes ``multiplier * overshoot`` off every reward; ``"bias"``
            leaves the budget to the policy's threshold and the repair.
        floor: least reward of ``"best"`` for a mask that loses. At -1 masks that lose by
            more than ``1 / GAIN`` are all alike; a search tells them apart with a lower floor.
        ema_decay: weight of the past in the running averages, an episode.
        multiplier_step: step size of the Lagrangian multiplier on the mean overshoot.
        multiplier_limit: its largest value.
        multiplier_period: updates of the policy between two of its steps (the slower clock).
        overshoot_tolerance: mean overshoot at which it neither grows nor shrinks.
    """

    self_competition: SelfCompetitionForm = "best"
    metric: Metric = "accuracy"
    constraint: Constraint = "bias"
    floor: float = -1.0
    ema_decay: float = 0.9
    multiplier_step: float = 0.05
    multiplier_limit: float = 10.0
    multiplier_period: int = 2
    overshoot_tolerance: float = 0.01

    def __post_init__(self) -> None:
        check_choice("self_competition", self.self_competition, get_args(SelfCompetitionForm))
        check_choice("metric", self.metric, get_args(Metric))
        check_choice("constraint", self.constraint, get_args(Constraint))
        check_range("floor", self.floor, -REWARD_BOUND, 0.0)
        check_range("ema_decay", self.ema_decay, 0.0, 1.0)
        check_range("multiplier_limit", self.multiplier_limit, 0.0, 1e6)
        check_range("multiplier_step", self.multiplier_step, 0.0, 1e6)
        check_range("multiplier_period", self.multiplier_period, 1, 10**6)
        check_range("overshoot_tolerance", self.overshoot_tolerance, 0.0, 1.0)
