"""What a reward is computed from: the plain figures of one finished episode."""

import math
from dataclasses import dataclass

from prunegraph.core.errors import ConfigError
from prunegraph.rewards.config import Metric

COST_TOLERANCE = 1.05
"""Independent bits move the cost by 4 to 6 % of the budget by chance: that is not overshoot."""

METRIC_FLOOR = -10.0
"""The least metric: a network whose divergence overflows counts as this bad."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One finished episode.

    Attributes:
        pair: name of the (network, budget) pair whose episodes compete with one another.
        accuracy: top-1 in [0, 1].
        kl: mean KL divergence from the dense network in nats, or None if not measured.
        soft_accuracy: mean probability of the right class, or None if not measured.
        raw_cost_ratio: cost of the raw bits over the budget (the tightest, of several).
        cost_ratio: cost of the evaluated mask, which meets the budget, over it.
        bits: the evaluated mask, as ``pack_bits`` writes it.
    """

    pair: str
    accuracy: float
    kl: float | None = None
    soft_accuracy: float | None = None
    raw_cost_ratio: float
    cost_ratio: float
    bits: str

    @property
    def overshoot(self) -> float:
        """Share of the budget by which the raw bits exceed it, beyond chance (``V_raw``)."""
        return max(0.0, self.raw_cost_ratio - COST_TOLERANCE)

    def metric(self, name: Metric) -> float:
        """Return the figure that is compared, higher = better, in [-10, 1].

        Raises:
            ConfigError: ``"kl"`` or ``"soft_accuracy"`` was not measured.
        """
        if name == "accuracy":
            return self.accuracy
        value = self.kl if name == "kl" else self.soft_accuracy
        if value is None:
            argument = "kl" if name == "kl" else "soft"
            msg = (
                f"metric={name!r} was not measured for {self.pair}: build its Evaluator with "
                f"{argument}=True"
            )
            raise ConfigError(msg)
        if name == "soft_accuracy":
            return value
        return max(METRIC_FLOOR, -value) if math.isfinite(value) else METRIC_FLOOR
