"""Labels: an integer a position of an activation or parameter, and which of them are one unit.

Activations carry a *label tensor* of their own full shape (stride 0 along axes that carry no
channels), so that data movement needs no rule: the same op runs on the labels. Equalities are only
collected here; connected components at the end turn them into units.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from prunegraph.core.masks import IntArray
from prunegraph.graph.graph import FrozenOp

NEUTRAL = -1
"""Label of constants made in the forward and of axes of size 1: it unites with anything."""

MANY = 1 << 16
"""Of more labels or equalities most are the same: they are told apart without a sort, or first."""


@dataclass(frozen=True, kw_only=True)
class FreezeEvent:
    """Something that keeps a label from being pruned.

    Attributes:
        cause: the op, its module path and the reason.
        expected: True for the network's own input and output, which are no one's shortcoming.
    """

    cause: FrozenOp
    expected: bool


def varying_axes(labels: Tensor) -> list[int]:
    """Return the axes along which the labels differ."""
    return [axis for axis, size in enumerate(narrow_alike(labels).shape) if size > 1]


def distinct(labels: Tensor) -> Tensor:
    """Return each label of a tensor once, in order."""
    labels = narrow_constant(labels)
    if labels.numel() <= MANY:
        found: Tensor = labels.unique()
        return found
    seen = torch.zeros(int(labels.amax()) - NEUTRAL + 1, dtype=torch.bool)  # no sort: far faster
    seen[labels.reshape(-1) - NEUTRAL] = True
    return seen.nonzero().flatten() + NEUTRAL


def narrow_constant(labels: Tensor) -> Tensor:
    """Narrow every axis of stride 0 to one position; the result broadcasts like ``labels``."""
    for axis, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if stride == 0 and size > 1:
            labels = labels.narrow(axis, 0, 1)
    return labels


def narrow_alike(labels: Tensor) -> Tensor:
    """Narrow every axis along which the labels do not differ to one position."""
    labels = narrow_constant(labels)
    for axis, size in enumerate(labels.shape):
        if size > 1 and bool((labels == labels.narrow(axis, 0, 1)).all()):
            labels = labels.narrow(axis, 0, 1)
    return labels


def is_scalar(labels: Tensor) -> bool:
    """Return True if the tensor holds one label only (by its strides)."""
    return narrow_constant(labels).numel() == 1


def neutral(shape: Sequence[int]) -> Tensor:
    """Return the labels of a constant."""
    return torch.tensor(NEUTRAL).expand(tuple(shape))


def is_neutral(labels: Tensor) -> bool:
    """Return True if the tensor holds nothing but the label of constants."""
    return is_scalar(labels) and int(labels.reshape(-1)[0]) == NEUTRAL


def labelled(labels: Tensor) -> Tensor:
    """Return the labels one after the other, but for that of constants."""
    return labels[labels != NEUTRAL]


def along(labels: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """Spread the 1-D ``labels`` along one axis of ``shape``, with stride 0 elsewhere."""
    view = [1] * len(shape)
    view[axis] = labels.numel()
    return labels.view(view).expand(tuple(shape))


class LabelSet:
    """Labels, of which a large network asks often."""

    def __init__(self) -> None:
        self._held = torch.zeros(0, dtype=torch.bool)  # NEUTRAL comes first

    def add(self, labels: Tensor) -> None:
        """Add all labels of a tensor."""
        place = labels.reshape(-1) - NEUTRAL
        missing = int(place.amax()) + 1 - len(self._held) if place.numel() else 0
        if missing > 0:
            self._held = torch.cat([self._held, torch.zeros(missing, dtype=torch.bool)])
        self._held[place] = True

    def has_any(self, labels: Tensor) -> bool:
        """Return whether one of a tensor's labels is in it."""
        place = labels.reshape(-1) - NEUTRAL
        return bool(self._held[place[place < len(self._held)]].any())

    def has_all(self, labels: Tensor) -> bool:
        """Return whether all of a tensor's labels, but those of constants, are in it."""
        place = labels.reshape(-1) - NEUTRAL
        place = place[place > 0]
        within = place < len(self._held)
        return bool(within.all()) and bool(self._held[place].all())


class LabelStore:
    """Hands out labels and collects which of them are equal or frozen."""

    def __init__(self) -> None:
        self.num_labels = 0
        self.events: dict[int, FreezeEvent] = {}
        self._left: list[IntArray] = []  # equalities that ``_component`` does not know yet
        self._right: list[IntArray] = []
        self._component: IntArray = np.arange(0)

    def fresh(self, count: int) -> Tensor:
        """Return ``[count]`` new labels."""
        start = self.num_labels
        self.num_labels += count
        return torch.arange(start, start + count)

    def frozen(self, cause: FrozenOp, shape: Sequence[int], *, expected: bool = False) -> Tensor:
        """Return one new frozen label spread over ``shape``."""
        label = self.fresh(1)
        self.events[int(label)] = FreezeEvent(cause=cause, expected=expected)
        return label.view([1] * len(shape)).expand(tuple(shape))

    def unite(self, left: Tensor, right: Tensor) -> None:
        """Make the labels of two tensors equal, position by position, broadcast; skip neutral."""
        left, right = narrow_constant(left), narrow_constant(right)
        if left.shape != right.shape:
            left, right = self._tied_where_broadcast(left, right)
        self._note(left, right)

    def joined(self, left: Tensor, right: Tensor) -> Tensor:
        """Make the labels of two tensors equal; return those of the first, or of the other."""
        self.unite(left, right)
        return torch.where(left == NEUTRAL, right, left)

    def _note(self, left: Tensor, right: Tensor) -> None:
        """Note that two tensors are equal, position by position, broadcast."""
        left, right = torch.broadcast_tensors(left, right)
        a = left.reshape(-1).numpy()
        b = right.reshape(-1).numpy()
        differs = (a != b) & (a != NEUTRAL) & (b != NEUTRAL)
        if differs.any():
            a, b = a[differs], b[differs]
            if len(a) > MANY:
                a, b = np.divmod(np.unique(a * self.num_labels + b), self.num_labels)
            self._left.append(a)
            self._right.append(b)

    def _tied_where_broadcast(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Unite what one label of the other side equals, and return the first of each: far fewer.

        Constants tie nothing, so all stay where there are some.
        """
        ndim = max(left.ndim, right.ndim)
        if ndim < 2 or bool((left == NEUTRAL).any() or (right == NEUTRAL).any()):
            return left, right
        pair = [
            labels.reshape([1] * (ndim - labels.ndim) + [*labels.shape]) for labels in (left, right)
        ]
        for axis in range(ndim):
            for number, labels in enumerate(pair):
                if labels.shape[axis] > 1 == pair[1 - number].shape[axis]:
                    first = labels.narrow(axis, 0, 1)
                    self._note(labels, first)
                    pair[number] = first
        return pair[0], pair[1]

    def freeze(self, labels: Tensor, cause: FrozenOp, *, expected: bool = False) -> None:
        """Keep every unit that these labels belong to."""
        event = FreezeEvent(cause=cause, expected=expected)
        for label in distinct(labels).tolist():
            if label != NEUTRAL:
                self.events.setdefault(label, event)

    def components(self) -> Tensor:
        """Return ``[num_labels]`` the component of each label."""
        known = self._component
        first = int(known.max(initial=-1)) + 1
        fresh = np.arange(first, first + self.num_labels - len(known))
        known = np.concatenate([known, fresh])
        if self._left:  # join the components that new equalities tie
            left, right = known[np.concatenate(self._left)], known[np.concatenate(self._right)]
            count = first + len(fresh)
            ones = np.ones(len(left), dtype=np.int8)
            matrix = sparse.coo_array((ones, (left, right)), shape=(count, count))
            _count, joined = sparse.csgraph.connected_components(matrix, directed=False)
            known = joined.astype(np.int64)[known]
            self._left, self._right = [], []
        self._component = known
        return torch.from_numpy(known.copy())
