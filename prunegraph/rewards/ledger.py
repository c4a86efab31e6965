"""What an agent that competes with itself remembers, as a value that is replaced, not changed."""

from dataclasses import dataclass, replace
from typing import Self

from prunegraph.rewards.config import RewardConfig
from prunegraph.rewards.episode import Episode


@dataclass(frozen=True, kw_only=True)
class SelfCompetitionLedger:
    """The past of one (network, budget) pair.

    Attributes:
        best_metric: metric of the best mask on the images it was last evaluated on.
        best_bits: that mask, as ``pack_bits`` writes it; None = there is no past.
        ema_metric: running average of the metric.
    """

    best_metric: float | None = None
    best_bits: str | None = None
    ema_metric: float | None = None

    def set_bar(self, metric: float) -> Self:
        """Return the ledger with the best mask's metric measured anew, on other images."""
        return replace(self, best_metric=metric)

    def update(self, episode: Episode, config: RewardConfig) -> Self:
        """Return the ledger with one more episode."""
        metric, past, weight = episode.metric(config.metric), self.ema_metric, config.ema_decay
        average = metric if past is None else weight * past + (1.0 - weight) * metric
        recorded = replace(self, ema_metric=average)
        if self.best_metric is not None and metric <= self.best_metric:
            return recorded
        return replace(recorded, best_metric=metric, best_bits=episode.bits)
