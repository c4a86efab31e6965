"""How good masks are beside others of the same network and budget."""

import torch
from torch import Tensor

EQUAL = 1e-5
"""Advantages that differ by less, relative to the largest, are equal: rewards lose digits."""


def standardise(advantages: Tensor, pairs: Tensor) -> Tensor:
    """Return advantages with mean 0 in each pair and standard deviation 1 over all.

    Args:
        advantages: ``[B]``.
        pairs: ``[B]`` which (network, budget) each belongs to: a network that is easier to prune
            must not make its masks look good. The only one of a pair gets 0, and so does each
            where all of a pair are equal but for rounding.
    """
    centred = advantages.clone()
    for pair in pairs.unique():
        members = pairs == pair
        centred[members] -= centred[members].mean()
    if centred.abs().max() <= EQUAL * max(1.0, float(advantages.abs().max())):
        return torch.zeros_like(centred)
    return centred / (centred.std(correction=0) + 1e-8)


def ranked(rewards: Tensor, pairs: Tensor) -> Tensor:
    """Return ranks within each pair with mean 0 and standard deviation 1; equal rewards share one.

    Fitness shaping as in natural evolution strategies (Wierstra et al. 2014, section 3.1).

    Args:
        rewards: ``[B]``.
        pairs: ``[B]`` which (network, budget) each belongs to; all of a pair that are equal get 0.
    """
    found = torch.zeros_like(rewards)
    for pair in pairs.unique():
        own = rewards[pairs == pair]
        ranks = (own[:, None] - own).sign().mean(1)  # equal ones share a rank
        found[pairs == pair] = ranks / (ranks.std(correction=0) + 1e-8)
    return found
