"""What is known of a pruned network that was run."""

from dataclasses import dataclass

from prunegraph.core.budget import Cost


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One evaluated pruned network.

    Attributes:
        accuracy: top-1 in [0, 1] on the images used.
        loss: mean cross-entropy in nats.
        kl: mean KL divergence from the dense network's outputs in nats, or None if not measured.
        num_images: number of images used.
        cost: cost of the network that was evaluated.
        digest: ``ChannelMask.digest()`` of its mask.
        seconds: wall time of surgery, recalibration and evaluation.
        soft_accuracy: mean probability that the network gives to the right class, or None if
            searches do not compare it.
    """

    accuracy: float
    loss: float
    kl: float | None
    num_images: int
    cost: Cost
    digest: str
    seconds: float
    soft_accuracy: float | None = None

    @property
    def steady(self) -> float | None:
        """What was measured to be compared in the accuracy's place, higher = better, or None.

        Two figures are less noisy: minus the divergence from the dense network, for which no label
        is needed, and the soft accuracy.
        """
        return self.soft_accuracy if self.kl is None else -self.kl

    @property
    def rank(self) -> tuple[float, float, float]:
        """What outcomes are chosen by, higher = better: ``steady``, accuracy, ties by loss."""
        return self.steady or 0.0, self.accuracy, -self.loss
