"""What an agent that competes with itself remembers, as a value that is replaced, not changed."""

from dataclasses import dataclass, replace
from typing import Any, Self

from prunegraph.rewards.config import RewardConfig
from prunegraph.rewards.episode import Episode


@dataclass(frozen=True, kw_only=True)
class SelfCompetitionLedger:
    """The past of one (network, budget) pair.

    Attributes:
        num_episodes: episodes recorded.
        num_feasible: those whose evaluated mask violated nothing.
        best_metric: metric of the best feasible mask on the images it was last evaluated on.
        best_bits: that mask, as ``pack_bits`` writes it; None = nothing feasible was found.
        best_digest: its digest.
        least_violation: the smallest violation so far.
        ema_metric: running average of the metric.
        ema_violation: running average of the violation.
    """

    num_episodes: int = 0
    num_feasible: int = 0
    best_metric: float | None = None
    best_bits: str | None = None
    best_digest: str | None = None
    least_violation: float | None = None
    ema_metric: float | None = None
    ema_violation: float | None = None

    @property
    def feasible_found(self) -> bool:
        """Whether some mask violated nothing."""
        return self.best_bits is not None

    def set_bar(self, metric: float) -> Self:
        """Return the ledger with the best mask's metric measured anew, on other images."""
        return replace(self, best_metric=metric)

    def update(self, episode: Episode, config: RewardConfig) -> Self:
        """Return the ledger with one more episode."""
        metric = episode.metric(config.metric)
        least = self.least_violation
        recorded = replace(
            self,
            num_episodes=self.num_episodes + 1,
            num_feasible=self.num_feasible + episode.feasible,
            least_violation=episode.violation if least is None else min(least, episode.violation),
            ema_metric=_average(self.ema_metric, metric, config.ema_decay),
            ema_violation=_average(self.ema_violation, episode.violation, config.ema_decay),
        )
        if not episode.feasible or (self.best_metric is not None and metric <= self.best_metric):
            return recorded
        return replace(
            recorded,
            best_metric=metric,
            best_bits=episode.bits,
            best_digest=episode.digest,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the ledger that ``to_dict`` wrote."""
        return cls(**values)


def _average(past: float | None, value: float, decay: float) -> float:
    return value if past is None else decay * past + (1.0 - decay) * value
