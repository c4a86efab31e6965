"""What a layer reads, as sums or as a sample, and what its kept weights gain by it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prunegraph.core.errors import ModelError

MOST_INPUTS = 5000
"""Of layers that read more values an output rows are kept: a Gram matrix has the square."""

MOST_ROWS = 2048
"""How many, at most."""

WIDE = 1024
"""Sums over so many inputs or more are kept in float32: those of all layers are held at once."""

TINY = 1e-30

RIDGE = 0.02
"""Share of an input's own energy that speaks for leaving its weight as it is."""


@dataclass(frozen=True, eq=False)
class ProductStatistics:
    """What one layer reads, over all sampled outputs; D = input channels times kernel taps.

    Attributes:
        mean: ``[D]``; zeros where nothing behind the layer takes up a shift of its outputs.
        products: ``[D, D]`` mean products of the inputs, less those of ``mean``.
    """

    mean: Tensor
    products: Tensor

    def change(self, weight: Tensor, kept: Tensor) -> Tensor:
        """Return ``[out, kept]`` what the kept ones of weights ``[out, D]`` gain."""
        system = self.products[kept][:, kept]
        scale = _scale(system.diagonal())
        lost = weight[:, ~kept] @ (self.products[~kept][:, kept] * scale)  # [out, kept]
        return _solved(scale[:, None] * system * scale, lost) * scale


@dataclass(frozen=True, eq=False)
class RowStatistics:
    """What one layer reads in some of its outputs: the same, where D is large.

    Attributes:
        mean: ``[D]``, as above.
        rows: ``[S, D]`` the inputs, less ``mean``.
    """

    mean: Tensor
    rows: Tensor

    def change(self, weight: Tensor, kept: Tensor) -> Tensor:
        """Return ``[out, kept]`` what the kept ones of weights ``[out, D]`` gain."""
        return fitted_change(self.rows[:, kept], self.rows[:, ~kept] @ weight[:, ~kept].T)


def fitted_change(rows: Tensor, missing: Tensor) -> Tensor:
    """Return ``[out, D]`` what weights gain by which rows ``[S, D]`` give ``[S, out]`` more.

    The nearest in mean square, with ``RIDGE``: by a system of as many equations as there are rows,
    where these are fewer than inputs.
    """
    rows, missing = rows / len(rows) ** 0.5, missing / len(rows) ** 0.5
    scale = _scale(rows.square().sum(0))
    rows = rows * scale
    if rows.shape[1] <= len(rows):
        change = _solved(rows.T @ rows, missing.T @ rows) * scale
    else:
        change = _solved(rows @ rows.T, missing.T) @ rows * scale
    return change


def _scale(energy: Tensor) -> Tensor:
    """Return what gives inputs equal energy."""
    scale: Tensor = (energy + 1e-6 * energy.mean()).clamp_min(TINY).rsqrt()
    return scale


def _solved(system: Tensor, lost: Tensor) -> Tensor:
    """Return ``lost (system + RIDGE)^-1``; zeros where rounding has eaten more than the ridge."""
    system.diagonal().add_(RIDGE)
    factor, failed = torch.linalg.cholesky_ex(system)
    return torch.zeros_like(lost) if bool(failed) else torch.cholesky_solve(lost.T, factor).T


class InputSums:
    """Sums over what a layer reads, less the mean of its first batch.

    Products of numbers far from 0 would lose in single precision what varies between them.
    """

    def __init__(self, rows: Tensor) -> None:
        self.origin = rows.mean(0)
        self.count = 0
        exact = torch.float64 if len(self.origin) < WIDE else torch.float32
        self.total = torch.zeros_like(self.origin, dtype=exact)
        self.products = torch.outer(self.total, self.total)

    def add(self, rows: Tensor) -> None:
        """Add what ``[S, D]`` outputs are made of."""
        rows = rows - self.origin
        self.count += len(rows)
        self.total += rows.sum(0)
        with torch.autocast(rows.device.type, enabled=False):
            self.products += rows.T @ rows

    def statistics(self, name: str, *, centred: bool) -> ProductStatistics:
        """Return the means over all rows."""
        shift = self.total / self.count
        products = self.products / self.count - torch.outer(shift, shift)
        mean = self.origin + shift
        if not centred:
            products += torch.outer(mean, mean)
            mean = torch.zeros_like(mean)
        _check_finite(name, products)
        return ProductStatistics(mean.float(), products.float())


class InputRows:
    """Some of what a layer reads, each as likely as any other.

    Args:
        seed: fixes which.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.count = 0
        self._keys, self._rows = torch.zeros(0), torch.zeros(0)

    def add(self, rows: Tensor) -> None:
        """Add what ``[S, D]`` outputs are made of."""
        self.count += len(rows)
        known = torch.cat([self._rows, rows]) if len(self._rows) else rows
        keys = torch.cat([self._keys, torch.rand(len(rows), generator=self._generator)])
        self._keys, chosen = keys.topk(min(MOST_ROWS, len(keys)))
        self._rows = known[chosen.to(rows.device)]

    def statistics(self, name: str, *, centred: bool) -> RowStatistics:
        """Return the rows, less their mean if ``centred``."""
        _check_finite(name, self._rows)
        mean = self._rows.mean(0) * float(centred)
        return RowStatistics(mean, self._rows - mean)


def _check_finite(name: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        msg = f"what {name} reads is not finite: check the network's weights and its images"
        raise ModelError(msg)
