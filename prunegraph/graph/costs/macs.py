"""Exact costs of a masked network: sums of products of kept sizes.

``cost(mask) = sum over terms of coefficient * product of the kept sizes of the term's axes``. A
term is a convolution, linear layer or matrix product (multiply-adds) or a parameter (elements). An
axis lists the unit at each of its positions, so its kept size is a sparse product with the bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import sparse

from prunegraph.core.masks import BoolArray, Float64Array, IntArray

MACS, PARAMS = 0, 1


@dataclass(frozen=True, kw_only=True)
class CostTerm:
    """One summand of the cost.

    Attributes:
        kind: ``MACS`` or ``PARAMS``.
        coefficient: multiply-adds or elements for one position of every axis.
        axes: for each axis the unit id at each position.
        name: the parameter's name (``PARAMS`` only).
        present: unit ids without any of which the summand is 0; None = it always counts.
    """

    kind: int
    coefficient: float
    axes: tuple[IntArray, ...]
    name: str = ""
    present: IntArray | None = None


class CostFunction(Protocol):
    """A cost of masks over N units that is no sum of products, and only grows as units join."""

    def expected(self, probabilities: Float64Array) -> Float64Array:
        """Return the cost ``[B]`` at bits ``[B, N]``, or at keep probabilities in their place."""
        ...

    def slopes(self, probabilities: Float64Array) -> Float64Array:
        """Return the derivatives ``[B, N]`` of ``expected``."""
        ...

    def at_stake(self, limit: float) -> BoolArray:
        """Return the units ``[N]`` whose removal can bring the cost below a limit."""
        ...

    def fits_with_each(self, keep: BoolArray, limit: float) -> BoolArray:
        """Return ``[N]`` where the cost stays within a limit if one removed unit joins."""
        ...

    def swapped(self, keep: BoolArray, drops: IntArray, adds: IntArray) -> Float64Array:
        """Return the cost ``[D, A]`` where one kept unit leaves and a removed one joins.

        Args:
            keep: ``[N]`` keep bits.
            drops: ``[D]`` kept units, -1 for none.
            adds: ``[A]`` removed units, -1 for none.
        """
        ...


class CostModel:
    """Costs of masks over N units.

    Args:
        num_units: N.
        terms: the summands.
    """

    def __init__(self, num_units: int, terms: Sequence[CostTerm]) -> None:
        self.num_units = num_units
        self.terms = tuple(terms)
        self.kind = np.array([term.kind for term in terms], dtype=np.int64)
        self.coefficient = np.array([term.coefficient for term in terms], dtype=np.float64)
        width = max((len(term.axes) + (term.present is not None) for term in terms), default=0)
        index: dict[tuple[bytes, bool], int] = {}
        axes: list[IntArray] = []
        self.term_axes = np.full((len(terms), max(width, 1)), -1, dtype=np.int64)
        for row, term in enumerate(terms):
            capped = () if term.present is None else (term.present,)
            for column, axis in enumerate((*term.axes, *capped)):
                key = axis.tobytes(), column == len(term.axes)
                if key not in index:
                    index[key] = len(axes)
                    axes.append(axis)
                self.term_axes[row, column] = index[key]
        self.term_axes[self.term_axes < 0] = len(axes)  # the axis of size one
        self.most = np.full(len(axes) + 1, np.inf)
        self.most[[own for (_, capped), own in index.items() if capped]] = 1.0
        counts = [np.bincount(axis, minlength=num_units) for axis in axes]
        self.axis_counts = sparse.csr_array(
            np.stack(counts) if counts else np.zeros((0, num_units)), dtype=np.float64
        )
        self._pairs()

    def _pairs(self) -> None:
        """List each (term, unit) with the unit's positions on every axis of the term."""
        columns = [
            sparse.vstack([self.axis_counts, sparse.csr_array((1, self.num_units))]).tocsr()[axis]
            for axis in self.term_axes.T
        ]
        pattern = sum((abs(column) for column in columns[1:]), columns[0]).tocoo()
        self.pair_term = pattern.row.astype(np.int64)
        self.pair_unit = pattern.col.astype(np.int64)
        deltas = []
        for column in columns:
            coordinates = column.tocoo()
            flat = coordinates.row.astype(np.int64) * self.num_units + coordinates.col
            pair_flat = self.pair_term * self.num_units + self.pair_unit
            values = np.zeros(len(pair_flat))
            order = np.argsort(pair_flat)
            values[order[np.searchsorted(pair_flat, flat, sorter=order)]] = coordinates.data
            deltas.append(values)
        self.pair_delta = np.stack(deltas, axis=1)  # [P, K]

    def sizes(self, keep: Float64Array) -> Float64Array:
        """Return the kept size of every axis, then 1 for the axis of size one.

        What is but present or not may have a size above 1 (``most``).
        """
        return np.append(self.axis_counts @ keep, 1.0)

    def totals(self, keep: Float64Array) -> tuple[float, float]:
        """Return MACs and params at ``[N]`` keep bits or keep probabilities."""
        sizes = np.minimum(self.sizes(keep), self.most)
        products = self.coefficient * sizes[self.term_axes].prod(axis=1)
        macs = float(products[self.kind == MACS].sum())
        return macs, float(products.sum()) - macs

    def _change_by_each(self, keep: BoolArray, sign: float) -> Float64Array:
        base = self.sizes(keep.astype(np.float64))[self.term_axes][self.pair_term]  # [P, K]
        most = self.most[self.term_axes][self.pair_term]
        changed = np.minimum(base + sign * self.pair_delta, most).prod(axis=1)
        return self._by_unit(sign * (changed - np.minimum(base, most).prod(axis=1)))

    def _by_unit(self, values: Float64Array) -> Float64Array:
        """Return the ``[2, N]`` sums over each unit's terms, times the terms' coefficients."""
        values = values * self.coefficient[self.pair_term]
        kinds = self.kind[self.pair_term]
        return np.stack(
            [
                np.bincount(
                    self.pair_unit[kinds == kind],
                    weights=values[kinds == kind],
                    minlength=self.num_units,
                )
                for kind in (MACS, PARAMS)
            ]
        )

    def added_by_each(self, keep: BoolArray) -> Float64Array:
        """Return ``[2, N]`` MACs and params that adding one removed unit alone would cost."""
        return self._change_by_each(keep, 1.0)

    def freed_by_each(self, keep: BoolArray) -> Float64Array:
        """Return ``[2, N]`` MACs and params that removing one kept unit alone would free."""
        return self._change_by_each(keep, -1.0)

    def expected(self, probabilities: Float64Array) -> Float64Array:
        """Return the expected MACs and params ``[B, 2]`` at keep probabilities ``[B, N]``.

        The multilinear extension of the cost: widths are replaced by sums of keep probabilities.
        """
        products = self.coefficient[:, None] * self._factors(probabilities).prod(axis=1)  # [T, B]
        return np.stack(
            [products[self.kind == kind].sum(axis=0) for kind in (MACS, PARAMS)], axis=1
        )

    def slopes(self, probabilities: Float64Array) -> Float64Array:
        """Return the derivatives ``[B, 2, N]`` of ``expected`` by keep probabilities ``[B, N]``."""
        factors = self._factors(probabilities)
        by_size = np.zeros((2, self.axis_counts.shape[0] + 1, len(probabilities)))
        for column, axis in enumerate(self.term_axes.T):
            others = np.delete(factors, column, axis=1).prod(axis=1)  # [T, B]
            np.add.at(by_size, (self.kind, axis), self.coefficient[:, None] * others)
        sizes = np.asarray(self.axis_counts @ probabilities.T)
        by_size[:, :-1][:, sizes >= self.most[:-1, None]] = 0.0
        return np.stack([(self.axis_counts.T @ each[:-1]).T for each in by_size], axis=1)

    def _factors(self, probabilities: Float64Array) -> Float64Array:
        """Return the expected sizes ``[T, K, B]`` of the terms' axes, one where there is none."""
        sizes = np.asarray(self.axis_counts @ probabilities.T)  # [A, B]
        sizes = np.minimum(sizes, self.most[:-1, None])
        return np.vstack([sizes, np.ones((1, len(probabilities)))])[self.term_axes]

    def prunable_elements(self, names: set[str], free: BoolArray) -> tuple[int, int]:
        """Return (elements on some free unit, all elements) of the named parameters."""
        prunable = total = 0.0
        for term in self.terms:
            if term.kind == PARAMS and term.name in names:
                full = term.coefficient * float(np.prod([len(axis) for axis in term.axes]))
                fixed = term.coefficient * float(
                    np.prod([(~free[axis]).sum() for axis in term.axes])
                )
                total += full
                prunable += full - fixed
        return round(prunable), round(total)
