"""Options of an update."""

from dataclasses import dataclass

from prunegraph.core.checks import check_at_least, check_range
from prunegraph.core.errors import ConfigError

EPISODES_PER_UPDATE = 16
"""Masks an update."""

RATES = (
    *("learning_rate", "offset_rate", "group_offset_rate", "surrogate_rate"),
    *("group_noise_rate", "group_noise_weight", "group_noise_start", "group_noise_end"),
)
"""Options that are numbers from 0 on."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Options of an update.

    Attributes:
        learning_rate: Adam's step size.
        epochs: passes over the update's episodes, all in one batch.
        temperature_start: temperature of the keep probabilities at the start of training.
        temperature_end: and at its end; geometric in between.
        offset_rate: step of the instance offsets of channels in an update, all epochs together; 0
            leaves all to the policy network.
        group_offset_rate: likewise of groups.
        group_noise_start: standard deviation of the noise that every episode adds to the scores of
            each group at the start of training: independent bits hardly move the widths of groups,
            so the allocation is explored by this. 0 = none; none with ``"lagrangian"`` either.
        group_noise_end: and at its end; geometric in between.
        group_noise_rate: step of the groups' offsets along ``mean(A noise)``, the evolution
            strategies' estimate, in an update.
        group_noise_weight: weight in the loss of the same estimate for the policy network.
        surrogate_steps: steps on surrogate rollouts after each update, each on fresh ones: masks
            that a model of all episodes so far predicts (``Surrogate``). Needs one-step episodes
            whose observation a network and a budget fix; 0 = none.
        surrogate_rate: step of the offsets of channels and groups in it.
        swaps: of channels at the most, by which the model of the outcomes improves a mask
            before it is run; 0 = none. Needs predicted steps, whose model it is.
    """

    learning_rate: float = 3e-3
    epochs: int = 4
    temperature_start: float = 0.30
    temperature_end: float = 0.11
    offset_rate: float = 0.3
    group_offset_rate: float = 0.15
    group_noise_start: float = 0.25
    group_noise_end: float = 0.12
    group_noise_rate: float = 0.5
    group_noise_weight: float = 0.0
    surrogate_steps: int = 0
    surrogate_rate: float = 0.15
    swaps: int = 0

    def __post_init__(self) -> None:
        for name in RATES:
            check_range(name, getattr(self, name), 0.0, 1e3)
        for name in ("surrogate_steps", "swaps"):
            check_range(name, getattr(self, name), 0, 10**6)
        if self.group_noise_start and not self.group_noise_end:
            msg = (
                "group_noise_end=0 cannot be reached geometrically: set group_noise_start to 0 too"
            )
            raise ConfigError(msg)
        if min(self.temperature_start, self.temperature_end) <= 0:
            msg = (
                f"temperatures {self.temperature_start} and {self.temperature_end} must be above 0"
            )
            raise ConfigError(msg)
        check_at_least("epochs", self.epochs, 1)

    def temperature(self, progress: float) -> float:
        """Return the temperature at ``progress`` in [0, 1]."""
        return _geometric(self.temperature_start, self.temperature_end, progress)

    def group_noise(self, progress: float) -> float:
        """Return the deviation of the groups' noise at ``progress`` in [0, 1]."""
        return _geometric(self.group_noise_start, self.group_noise_end, progress)


def _geometric(start: float, end: float, progress: float) -> float:
    """Return the geometric interpolation; 0 throughout if the start is 0."""
    return float(start * (end / start) ** min(max(progress, 0.0), 1.0)) if start else 0.0
