"""Independent keep bits of which some are not the policy's to decide."""

from typing import Self

import torch
from stable_baselines3.common.distributions import Distribution
from torch import Tensor, nn
from torch.nn import functional


class MaskedBernoulli(Distribution):
    """Independent Bernoulli bits; bits outside the mask carry neither probability nor entropy.

    The stock Bernoulli distribution of stable-baselines3 sums the log-probabilities of padding.

    Shapes:
        - logits ``[B, N]``, mask ``[B, N]`` bool, actions ``[B, N]``
    """

    def __init__(self) -> None:
        super().__init__()
        self.logits: Tensor
        self.mask: Tensor

    def proba_distribution_net(self, latent_dim: int) -> nn.Module:
        """Not used: the policy's network makes the logits itself."""
        msg = "the logits come from the graph network, not from a layer of fixed size"
        raise NotImplementedError(msg)

    def proba_distribution(self, logits: Tensor, mask: Tensor) -> Self:
        """Set logits and mask; returns itself."""
        self.logits, self.mask = logits, mask
        return self

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

    def actions_from_params(
        self, logits: Tensor, mask: Tensor, deterministic: bool = False
    ) -> Tensor:
        """Set logits and mask and return bits."""
        return self.proba_distribution(logits, mask).get_actions(deterministic=deterministic)

    def log_prob_from_params(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Set logits and mask and return bits with their log-probability."""
        actions = self.actions_from_params(logits, mask)
        return actions, self.log_prob(actions)
