"""Notes in a recorded forward which storages live when and which labels their positions have.

A storage is counted once however many tensors view it, and dies with the last of them. Parameters
and buffers are no activations and are left out; the inputs count, because their caller holds them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from prunegraph.core.masks import IntArray
from prunegraph.graph.costs.memory import ALWAYS, Storage
from prunegraph.graph.trace.labels import NEUTRAL, is_neutral, narrow_alike, narrow_constant

SMALL = 4096
"""Label tensors up to this size are kept as they are until the end."""

LIKE = frozenset({"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"})
"""Ops that take their size, though not their labels, from their first argument."""


@dataclass
class _Record:
    """One storage: its size, the labels of its positions (None = constant) and its lifetime."""

    num_bytes: int
    born: int
    labels: Tensor | None = None
    died: int | None = None


class LifetimeRecorder:
    """Follows the storages of one forward."""

    def __init__(self) -> None:
        self._left_out: set[StorageWeakRef] = set()
        self._alive: dict[StorageWeakRef, _Record] = {}
        self._records: list[_Record] = []
        self._step = 0

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these tensors: parameters and buffers."""
        strided = [tensor for tensor in tensors if tensor.layout is torch.strided]
        self._left_out.update(map(_reference, strided))

    def add_input(self, tensor: Tensor) -> None:
        """Count a tensor that the forward is given."""
        self._add(tensor, born=-1)

    def step(self, outputs: Sequence[Tensor]) -> None:
        """Note what an operation allocated, and what was freed since the one before."""
        for reference in [ref for ref in self._alive if ref.expired()]:
            record = self._alive.pop(reference)
            record.died = self._step
            record.labels = None if record.labels is None else _compact(record.labels)
        for tensor in outputs:
            self._add(tensor, born=self._step)
        self._step += 1

    def note_labels(self, tensor: Tensor, labels: Tensor) -> None:
        """Remember the labels of a storage's positions, if the tensor covers all of it."""
        strided = tensor.layout is torch.strided
        record = self._alive.get(_reference(tensor)) if strided else None
        if record is None or tensor.numel() * tensor.element_size() != record.num_bytes:
            return
        if not is_neutral(labels) or record.labels is None:
            record.labels = narrow_constant(labels)

    def storages(self, components: IntArray, unit_of: IntArray) -> list[Storage]:
        """Return the storages with labels turned into units.

        Args:
            components: ``[num_labels]`` the component of each label.
            unit_of: unit of each component, ``NEUTRAL`` where it has none.
        """
        found = []
        for record in self._records:
            labels = torch.tensor([NEUTRAL]) if record.labels is None else record.labels
            values = labels.reshape(-1).numpy()
            known = values != NEUTRAL
            units = np.full(values.shape, ALWAYS, dtype=np.int64)
            units[known] = unit_of[components[values[known]]]
            found.append(
                Storage(
                    bytes_per_position=record.num_bytes // len(values),
                    units=units,
                    born=record.born,
                    died=self._step if record.died is None else record.died,
                )
            )
        return found

    def _add(self, tensor: Tensor, born: int) -> None:
        if tensor.layout is not torch.strided:
            return
        reference = _reference(tensor)
        num_bytes = tensor.untyped_storage().nbytes()
        if num_bytes and reference not in self._left_out and reference not in self._alive:
            record = _Record(num_bytes=num_bytes, born=born)
            self._alive[reference] = record
            self._records.append(record)


def _reference(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _compact(labels: Tensor) -> Tensor:
    """Return the labels narrowed to the axes along which they differ, if they take much room."""
    return (labels if labels.numel() <= SMALL else narrow_alike(labels)).clone()
