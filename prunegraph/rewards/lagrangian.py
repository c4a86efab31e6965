"""The Lagrangian multiplier of the budget: dual ascent on the mean raw overshoot."""

from dataclasses import dataclass, replace
from typing import Self

from prunegraph.rewards.config import RewardConfig


@dataclass(frozen=True, kw_only=True)
class LagrangianMultiplier:
    """The price of a budget's worth of overshoot, on a slower clock than the policy.

    Attributes:
        value: the multiplier.
        waiting: mean overshoots of the updates since its last step.
        num_steps: steps made.
    """

    value: float
    waiting: tuple[float, ...] = ()
    num_steps: int = 0

    def update(self, mean_overshoot: float, config: RewardConfig) -> Self:
        """Return the multiplier after one more update of the policy.

        Every ``multiplier_period`` updates ``value + step * (mean - tolerance)``, clipped to
        [0, limit]: with the tolerance a price that is no longer needed shrinks again.
        """
        waiting = (*self.waiting, mean_overshoot)
        if len(waiting) < config.multiplier_period:
            return replace(self, waiting=waiting)
        excess = sum(waiting) / len(waiting) - config.overshoot_tolerance
        value = min(max(self.value + config.multiplier_step * excess, 0.0), config.multiplier_limit)
        return replace(self, value=value, waiting=(), num_steps=self.num_steps + 1)
