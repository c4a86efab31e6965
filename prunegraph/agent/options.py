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
        constraint: how the agent meets the budget: by a threshold that repair completes, or by a
            multiplier on the overshoot.
        self_competition: what a pruned network competes with: the best one so far, running averages
            (ema), or nothing (accuracy).
        metric: what is compared: soft_accuracy is the mean probability of the right class, of which
            fewer images tell as much; kl (to the dense network) is for weights that have seen the
            search images; a catalogue is trained by it in any case.
        granularity: decide on the whole network in one step, or group by group.
        update_size: networks an update of the policy.
        learning_rate: step size of the policy.
        surrogate_steps: steps of the policy after each update on masks whose outcome a surrogate
            predicts; 0: learn from networks that were run alone. None are made with granularity
            group or constraint lagrangian.
        swaps: at most so many swaps of one unit for another improve every second mask, by the
            surrogate, before it is run; 0: none.
        distill_steps: steps for each network of the search, after it, that teach the policy what
            was found, for use on other networks.
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
