"""How far the outputs of two networks are apart."""

import math

import torch
from torch import Tensor


def as_finite(outputs: list[Tensor], dense: list[Tensor]) -> bool:
    """Return whether outputs are finite where those of the whole network are."""
    return all(
        one.shape == other.shape and torch.equal(one.isfinite(), other.isfinite())
        for one, other in zip(outputs, dense, strict=True)
    )


def difference_of(pruned: list[Tensor], masked: list[Tensor]) -> float:
    """Return the largest difference relative to each output's largest finite value.

    Infinite where shapes, numbers that are not finite, integers or booleans differ, and for NaN.
    """
    worst = 0.0
    for one, other in zip(pruned, masked, strict=True):
        if one.shape != other.shape:
            return math.inf
        if one.is_complex():
            one, other = torch.view_as_real(one), torch.view_as_real(other)
        measured = one.isfinite() & other.isfinite() & one.is_floating_point()
        if not torch.equal(one[~measured], other[~measured]):
            return math.inf
        if measured.any():
            scale = float(other[measured].abs().max().clamp_min(1e-6))
            worst = max(worst, float((one - other)[measured].abs().max()) / scale)
    return worst
