"""Exact peak memory of a masked network's activations: which storages are alive at each operation.

A storage's size is linear in the keep bits, because each of its positions belongs to one
unit: ``bytes(mask) = bytes_per_position * number of positions whose unit is kept``. The peak is
the largest sum over the storages that are alive at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from prunegraph.core.masks import BoolArray, Float64Array, IntArray

ALWAYS = -1
"""The unit of positions that no mask removes."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Storage:
    """The memory that one or more tensors share.

    Attributes:
        bytes_per_position: bytes of one entry of ``units``.
        units: unit at each position, ``ALWAYS`` where no mask removes it.
        born: the operation that allocates it; -1 for the network's inputs.
        died: the first operation before which it is freed.
    """

    bytes_per_position: int
    units: IntArray
    born: int
    died: int


class MemoryModel:
    """Peak memory of masks over N units, a ``CostFunction``.

    Args:
        num_units: N.
        storages: everything that the forward allocates, and its inputs.

    Attributes:
        written: ``[N]`` bytes of each unit in all storages together.
    """

    def __init__(self, num_units: int, storages: Sequence[Storage]) -> None:
        self.storages = tuple(storages)
        born = np.array([storage.born for storage in storages], dtype=np.int64)
        died = np.array([storage.died for storage in storages], dtype=np.int64)
        steps = np.unique(died)[:, None] - 1  # before a death the sum is at its highest
        alive = sparse.csr_array(((born <= steps) & (steps < died)).astype(np.int64))
        kept = [storage.units[storage.units != ALWAYS] for storage in storages]
        row = np.repeat(np.arange(len(kept)), [len(units) for units in kept])
        column = np.concatenate([*kept, np.zeros(0, dtype=np.int64)])
        size = np.array([storage.bytes_per_position for storage in storages], dtype=np.int64)
        per_unit = sparse.coo_array(
            (size[row], (row, column)), shape=(len(kept), num_units)
        ).tocsr()  # adds up the positions of a unit
        always = [int((storage.units == ALWAYS).sum()) for storage in storages]
        self.written: Float64Array = np.asarray(per_unit.sum(axis=0), dtype=np.float64).ravel()
        self._by_unit = (alive @ per_unit).tocsr()  # [T, N] of each moment
        self._at_least = alive @ (size * np.array(always, dtype=np.int64))

    def peak(self, keep: BoolArray) -> int:
        """Return the most bytes that are alive at once at keep bits ``[N]``."""
        return int(self.moments(keep[None].astype(np.int64)).max(initial=0))

    def expected(self, probabilities: Float64Array) -> Float64Array:
        """Return the peak bytes ``[B]`` at keep probabilities ``[B, N]``, in the place of bits."""
        peaks: Float64Array = self.moments(probabilities).max(axis=1, initial=0)
        return peaks

    def slopes(self, probabilities: Float64Array) -> Float64Array:
        """Return the derivatives ``[B, N]`` of ``expected``: bytes that are alive at the peak."""
        if not len(self._at_least):
            return np.zeros_like(probabilities)
        return self.bytes_in(self.moments(probabilities).argmax(axis=1))

    def bytes_in(self, moments: IntArray) -> Float64Array:
        """Return the bytes ``[B, N]`` that each unit needs in B moments."""
        return np.asarray(self._by_unit[moments].toarray())

    def at_stake(self, limit: float) -> BoolArray:
        """Return the units ``[N]`` alive when the whole network needs more bytes than a limit."""
        ones = np.ones((1, self._by_unit.shape[1]), dtype=np.int64)
        above = self._by_unit[self.moments(ones)[0] > limit]
        return np.asarray(above.sum(axis=0) > 0)

    def fits_with_each(self, keep: BoolArray, limit: float) -> BoolArray:
        """Return ``[N]`` where the peak stays within a limit if one removed unit joins."""
        room = limit - self.moments(keep[None].astype(np.int64))[0]
        added = self._by_unit.tocoo()
        fits = np.ones(len(keep), dtype=bool)
        fits[added.col[added.data > room[added.row]]] = False
        return fits & bool((room >= 0).all())

    def swapped(self, keep: BoolArray, drops: IntArray, adds: IntArray) -> Float64Array:
        """Return the peak bytes ``[D, A]`` after swaps; arguments as of ``CostFunction``."""
        left, joined = (
            np.where(units >= 0, self._by_unit[:, units].toarray(), 0) for units in (drops, adds)
        )  # [T, D], [T, A]
        with_each = self.moments(keep[None].astype(np.int64)).T + joined
        rows = [(with_each - gone[:, None]).max(axis=0, initial=0) for gone in left.T]
        return np.array(rows, dtype=np.float64).reshape(len(drops), len(adds))

    def moments(self, keep: Any) -> Any:
        """Return the bytes alive at each of T moments ``[B, T]``, at bits ``[B, N]``.

        A moment is just before a storage dies: between two of them the sum only grows.
        """
        return (self._by_unit @ keep.T).T + self._at_least
