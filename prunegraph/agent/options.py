"""What a person who studies the agent may set of its search; a run needs none of it."""

from dataclasses import dataclass
from typing import Literal

from prunegraph.agent.config import EPISODES_PER_UPDATE, PPOConfig
from prunegraph.core.checks import check_at_least, check_range
from prunegraph.rewards.config import (
    Constraint,
    Metric,
    RewardConfig,
    SelfCompetitionForm,
)

MOST = 10**6
"""The largest count that an option takes."""


@dataclass(frozen=True, kw_only=True)
class AgentOptions:
    """How the agent searches; on the command line ``--agent.NAME``, in YAML below ``agent:``.

    Attributes:
        subset: search images on which an update scores its networks; default: 1,500, or all.
        constraint: how the agent meets the budget: bias is a threshold on the scores, lagrangian a
            multiplier on the overshoot.
        self_competition: what a pruned network competes with: the best one so far, a running
            average (ema), or nothing (accuracy).
        metric: what is compared: accuracy; soft_accuracy, the mean probability of the right class,
            which needs fewer images; kl, the divergence from the dense network, for weights that
            have seen the search images. A catalogue always takes kl.
        granularity: decide on the whole network in one step, or group by group.
        update_size: networks an update of the policy.
        learning_rate: step size of the policy.
        surrogate_steps: steps of the policy after each update on masks that a surrogate scores; 0:
            learn only from networks that were run. None are made with granularity group or
            constraint lagrangian.
        swaps: swaps of one unit for another (of a 128th of a wide group), at most, that improve
            every second mask before it is run, by the surrogate; 0: none.
        distill_steps: steps of distillation for each network that the search ran; they train the
            policy for use on other networks.
    """

    subset: int | None = None
    constraint: Constraint = RewardConfig.constraint
    self_competition: SelfCompetitionForm = "best"
    metric: Metric = "soft_accuracy"
    granularity: Literal["network", "group"] = "network"
    update_size: int = EPISODES_PER_UPDATE
    learning_rate: float = PPOConfig.learning_rate
    surrogate_steps: int = 20
    swaps: int = 40
    distill_steps: int = 3

    def __post_init__(self) -> None:
        for name in ("surrogate_steps", "swaps", "distill_steps"):
            check_range(f"agent.{name}", getattr(self, name), 0, MOST)
        check_range("agent.learning_rate", self.learning_rate, 0.0, 1e3)
        for name, least in (("update_size", 2), ("subset", 1)):
            check_at_least(f"agent.{name}", getattr(self, name), least)
