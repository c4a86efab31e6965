"""Exact peak memory of a masked network's activations: which storages are alive at each operation.

A storage's size is linear in the keep bits, because each of its positions belongs to one channel
class: ``bytes(mask) = bytes_per_position * number of positions whose class is kept``. The peak is
the largest sum over the storages that are alive at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from prunegraph.types import BoolArray, IntArray

ALWAYS = -1
"""The class of positions that no mask removes."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Storage:
    """The memory that one or more tensors share.

    Attributes:
        bytes_per_position: bytes of one entry of ``classes``.
        classes: class id at each position, ``ALWAYS`` where no mask removes it.
        born: the operation that allocates it; -1 for the network's inputs.
        died: the first operation before which it is freed.
    """

    bytes_per_position: int
    classes: IntArray
    born: int
    died: int


class MemoryModel:
    """Peak memory of masks over N classes.

    Args:
        num_classes: N.
        storages: everything that the forward allocates, and its inputs.
    """

    def __init__(self, num_classes: int, storages: Sequence[Storage]) -> None:
        self.storages = tuple(storages)
        born = np.array([storage.born for storage in storages], dtype=np.int64)
        died = np.array([storage.died for storage in storages], dtype=np.int64)
        steps = np.unique(died)[:, None] - 1  # before a death the sum is at its highest
        self._alive = sparse.csr_array(((born <= steps) & (steps < died)).astype(np.int64))
        kept = [storage.classes[storage.classes != ALWAYS] for storage in storages]
        row = np.repeat(np.arange(len(kept)), [len(classes) for classes in kept])
        column = np.concatenate([*kept, np.zeros(0, dtype=np.int64)])
        size = np.array([storage.bytes_per_position for storage in storages], dtype=np.int64)
        self._per_class = sparse.coo_array(
            (size[row], (row, column)), shape=(len(kept), num_classes)
        ).tocsr()  # adds up the positions of a class
        always = [int((storage.classes == ALWAYS).sum()) for storage in storages]
        self._fixed = size * np.array(always, dtype=np.int64)

    def sizes(self, keep: BoolArray) -> IntArray:
        """Return the bytes of every storage at keep bits ``[N]``."""
        return np.asarray(self._per_class @ keep.astype(np.int64) + self._fixed)

    def peak(self, keep: BoolArray) -> int:
        """Return the most bytes that are alive at once at keep bits ``[N]``."""
        return int((self._alive @ self.sizes(keep)).max(initial=0))
