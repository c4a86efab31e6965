"""Independent keep bits of which some are not the policy's to decide."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class MaskedBernoulli:
    """Independent Bernoulli bits; bits outside the mask carry neither probability nor entropy.

    The stock Bernoulli distribution of stable-baselines3 sums the log-probabilities of padding.

    Shapes:
        - logits ``[B, N]``, mask ``[B, N]`` bool, actions ``[B, N]``
    """

    logits: Tensor
    mask: Tensor

    def probabilities(self) -> Tensor:
        """Return keep probabilities ``[B, N]``, also outside the mask."""
        return torch.sigmoid(self.logits)

    def num_free(self) -> Tensor:
        """Return the number of bits inside the mask ``[B]``, at least 1 (to divide by)."""
        return self.mask.sum(dim=1).clamp(min=1)

    def log_prob_bits(self, actions: Tensor) -> Tensor:
        """Return each bit's log-probability ``[B, N]``, zero outside the mask."""
        log_prob = actions * self.logits - functional.softplus(self.logits)
        return torch.where(self.mask, log_prob, 0.0)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return the log-probability of the bits inside the mask together ``[B]``."""
        return self.log_prob_bits(actions).sum(dim=1)

    def entropy(self) -> Tensor:
        """Return the entropy of the bits inside the mask together ``[B]``, in nats."""
        bits = functional.softplus(self.logits) - self.logits * self.probabilities()
        return torch.where(self.mask, bits, 0.0).sum(dim=1)

    def mean_entropy(self) -> Tensor:
        """Return the entropy a free bit ``[B]``, in nats: at most log 2."""
        return self.entropy() / self.num_free()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw bits; those outside the mask are kept (1).

        The noise is drawn on the CPU, one number a bit in row order, so that it depends neither on
        the device nor on how the rows are split into calls.

        Args:
            generator: a CPU generator; None = torch's global one.
        """
        noise = torch.rand(self.logits.shape, generator=generator).to(self.logits.device)
        return self._outside_kept(noise < self.probabilities())

    def mode(self) -> Tensor:
        """Return the likeliest bits; those outside the mask are kept (1)."""
        return self._outside_kept(self.logits > 0)

    def _outside_kept(self, bits: Tensor) -> Tensor:
        return (bits | ~self.mask).to(self.logits.dtype)
