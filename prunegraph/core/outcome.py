"""What is known of a pruned network that was run."""

from dataclasses import dataclass

from prunegraph.core.budget import Cost


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One evaluated pruned network.

    Attributes:
        accuracy: the score's utility on the scale of an accuracy (``Score.relative_to``), higher =
            better; for images top-1 in [0, 1].
        loss: mean loss, lower = better; for images the cross-entropy in nats.
        kl: mean divergence from the dense network's outputs, or None if not measured; for images
            KL in nats, for scores of a user's the fall of the utility.
        num_images: number of samples used; 1 if the score looks at data of its own.
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
