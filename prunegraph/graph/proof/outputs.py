"""How far the outputs of two networks are apart."""

import math

import torch
from torch import Tensor

FAINT = 1e-3
"""An output's slice is measured by its own largest value, or by this share of the output's."""

LEAST = 16
"""Slices of fewer values are not measured alone: all of them may be small by chance."""


def as_finite(outputs: list[Tensor], dense: list[Tensor]) -> bool:
    """Return whether outputs are finite where those of the whole network are."""
    return all(
        one.shape == other.shape and torch.equal(one.isfinite(), other.isfinite())
        for one, other in zip(outputs, dense, strict=True)
    )


def difference_of(pruned: list[Tensor], masked: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest finite value of the slice it is in.

    Slices along each axis are compared alone: scores may lie beside boxes in pixels.
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
            worst = max(worst, _by_slices(one.where(measured, 0.0), other.where(measured, 0.0)))
    return worst


def _by_slices(one: Tensor, other: Tensor) -> float:
    """Return the largest difference relative to its slice, of tensors of finite numbers."""
    errors, sizes = (one - other).abs(), other.abs()
    faint = max(float(sizes.max()) * FAINT, 1e-6)
    worst = float(errors.max()) / max(float(sizes.max()), 1e-6)
    for axis in range(one.ndim):
        if one.numel() < LEAST * one.shape[axis]:
            continue
        rest = [number for number in range(one.ndim) if number != axis]
        scales = sizes.amax(rest).clamp_min(faint)
        worst = max(worst, float((errors.amax(rest) / scales).max()))
    return worst
