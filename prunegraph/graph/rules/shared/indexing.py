"""What indices pick and where they write."""

from collections.abc import Sequence

import torch
from torch import Tensor

from prunegraph.graph.graph import FrozenOp
from prunegraph.graph.rules.shared.constants import ONE_ALONE
from prunegraph.graph.trace.labels import is_neutral, varying_axes
from prunegraph.graph.trace.recorder import LabelRecorder, OpCall


def indexed_axes(indices: Sequence[Tensor | None]) -> list[int]:
    """Return the axes that ``x[indices]`` picks from: a mask of booleans has several."""
    axes: list[int] = []
    first = 0
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        size = index.ndim if index is not None and is_mask else 1
        axes += [] if index is None else range(first, first + size)
        first += size
    return axes


def write_slices(recorder: LabelRecorder, call: OpCall) -> bool:
    """Label the part of a base that slices of it write (``out[:, :4] = x``, ``out[:, 3] = x``).

    Returns:
        False if the target is no slices of another tensor: then nothing was done.
    """
    target, source = call.args[:2]
    base = target._base
    where = None if base is None else _slices_of(base, target)
    if where is None:
        return False
    labels = recorder.labels_of(base)
    written = recorder.labels_of(source)
    written = written.view([1] * (target.ndim - written.ndim) + list(written.shape))
    written = written.expand(target.shape)
    single = [axis for axis, part in enumerate(where) if isinstance(part, int)]
    for axis in single:
        written = written.unsqueeze(axis)
    index = [slice(part, part + 1) if isinstance(part, int) else part for part in where]
    axes = {*varying_axes(labels), *varying_axes(written)}
    for axis in range(base.ndim):
        if axis not in axes:
            labels, written = labels.narrow(axis, 0, 1), written.narrow(axis, 0, 1)
            index[axis] = slice(None)
    labels = labels.clone()
    part = labels[tuple(index)]
    if is_neutral(written) and any(index[axis] != slice(None) for axis in axes):
        cause = FrozenOp(op="copy_", module=recorder.modules.current, reason=ONE_ALONE)
        recorder.store.freeze(part, cause)
    part.copy_(recorder.store.joined(part, written))
    recorder.set_labels(base, labels.expand(base.shape))
    for axis in reversed(single):
        part = part.squeeze(axis)
    recorder.set_labels(target, part.expand(target.shape))
    return True


def _slices_of(base: Tensor, target: Tensor) -> list[slice | int] | None:
    """Return the slices and positions that a view is, an axis; None if it is another view."""
    if 0 in base.stride() or 0 in target.shape:
        return None
    axes = _matched_axes(base, target)
    if axes is None:
        return None
    rest = int(target.storage_offset() - base.storage_offset())
    where: list[slice | int] = [slice(None)] * base.ndim
    for axis in sorted(range(base.ndim), key=base.stride, reverse=True):
        if base.shape[axis] == 1:
            where[axis] = slice(None) if axis in axes else 0
            continue
        start, rest = divmod(rest, base.stride(axis))
        if axis not in axes:
            where[axis] = start
            continue
        size = target.shape[axes[axis]]
        step = target.stride(axes[axis]) // base.stride(axis) if size > 1 else 1
        if start + step * (size - 1) >= base.shape[axis]:
            return None
        where[axis] = slice(start, start + step * (size - 1) + 1, step)
    return None if rest else where


def _matched_axes(base: Tensor, target: Tensor) -> dict[int, int] | None:
    """Return base axis -> target axis, in order; base axes that are left out were selected."""
    found: dict[int, int] = {}
    for axis in range(base.ndim):
        own = len(found)
        to_drop = base.ndim - axis - (target.ndim - own)
        if own == target.ndim:
            continue
        size, stride = target.shape[own], target.stride(own)
        if base.shape[axis] == 1:
            fits = size == 1
        else:
            fits = size == 1 or (stride > 0 and stride % base.stride(axis) == 0)
        if fits and (size > 1 or to_drop == 0 or base.shape[axis] == 1):
            found[axis] = own
        elif to_drop == 0:
            return None
    return found if len(found) == target.ndim else None
