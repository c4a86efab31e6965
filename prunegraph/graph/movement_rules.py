"""What views, slices, joins and copies do to labels: they run on the label tensor too."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from prunegraph.graph.labels import NEUTRAL, along, narrow_constant, varying_axes
from prunegraph.graph.recorder import LabelRecorder, OpCall, WeightView


def _permutation(call: OpCall) -> tuple[int, ...] | None:
    """Return the permutation of axes that the op is, or None."""
    ndim = call.args[0].ndim
    axes = list(range(ndim))
    match call.name:
        case "t" | "numpy_T":
            return tuple(reversed(axes))
        case "transpose":
            first, second = call.args[1] % ndim, call.args[2] % ndim
            axes[first], axes[second] = second, first
            return tuple(axes)
        case "permute":
            return tuple(axis % ndim for axis in call.args[1])
        case "detach" | "alias" | "lift_fresh":
            return tuple(axes)
        case _:
            return None


def _narrow_weight(recorder: LabelRecorder, call: OpCall, view: WeightView) -> bool:
    """Follow a stored weight into its parts, as in a packed projection; return if that was one."""
    axis = call.args[2] if len(call.args) > 2 else call.kwargs.get("dim", 0)
    match call.name:
        case "split" | "split_with_sizes":
            parts, start = call.out, 0
        case "slice":
            axis = call.args[1] if len(call.args) > 1 else 0
            first = call.args[2] if len(call.args) > 2 else None
            if len(call.args) > 4 and call.args[4] != 1:
                return False
            size = call.args[0].shape[axis]
            start = max(first + size, 0) if first is not None and first < 0 else first or 0
            parts = [call.out]
        case _:
            return False
    axis %= call.args[0].ndim
    for part in parts:
        recorder.set_weight_view(part, view.narrowed(axis, start))
        start += part.shape[axis]
    return True


def movement(recorder: LabelRecorder, call: OpCall) -> None:
    """Run the same op on the labels."""
    if isinstance(call.args[0], Tensor):
        view, permutation = recorder.weight_view(call.args[0]), _permutation(call)
        if view is not None and permutation is not None:
            recorder.set_weight_view(call.out, view.permuted(permutation))
            return
        if view is not None and _narrow_weight(recorder, call, view):
            return
    labels = tree_map_only(Tensor, recorder.labels_of, call.args[0])
    indices = tree_map_only(Tensor, Tensor.cpu, call.args[1:])  # where labels are
    kwargs = {k: v for k, v in call.kwargs.items() if k not in {"dtype", "memory_format"}}
    moved_labels = call.func(labels, *indices, **kwargs)
    pairs = zip(
        call.outputs(),
        [moved_labels] if isinstance(moved_labels, Tensor) else moved_labels,
        strict=True,
    )
    for index, (tensor, part) in enumerate(pairs):
        recorder.set_labels(tensor, part)
        if call.name in {"split", "split_with_sizes", "slice"}:
            recorder.note_sizes(part, index)
    if call.name == "slice":
        _tie_slice(recorder, call)


def cat(recorder: LabelRecorder, call: OpCall) -> None:
    """Join labels; parts without channels along the axis (tokens, samples) have the same channels.

    A part of one channel has no labels to speak of, but beside other channels it has a place.
    """
    parts = [recorder.labels_of(tensor) for tensor in call.args[0]]
    axis = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)
    axis %= call.out.ndim
    parts = [part for part in parts if part.ndim == call.out.ndim]  # cat skips empty vectors
    if any(axis in varying_axes(part) for part in parts):
        parts = [_placed(recorder, call, part, axis) for part in parts]
        labels = torch.cat(parts, axis)
        recorder.note_sizes(labels)
    else:
        firsts = [part.narrow(axis, 0, 1) for part in parts if part.shape[axis]]
        labels = firsts[0]
        for first in firsts[1:]:
            recorder.store.unite(labels, first)
            labels = torch.where(labels == NEUTRAL, first, labels)
        labels = labels.expand(call.out.shape)
    recorder.set_labels(call.out, labels)


def _tie_slice(recorder: LabelRecorder, call: OpCall) -> None:
    """Tie one of several equal slices of channels to the first, as ``chunk`` does.

    Where every second channel is taken (``x[:, ::2]``), neighbours leave together.
    """
    labels, part = recorder.labels_of(call.args[0]), recorder.labels_of(call.out)
    axis = (call.args[1] if len(call.args) > 1 else 0) % labels.ndim
    step = call.args[4] if len(call.args) > 4 else 1
    whole, size = labels.shape[axis], part.shape[axis]
    if not 0 < size < whole or whole % size or axis not in varying_axes(labels):
        return
    if step == 1:
        recorder.store.unite(part, labels.narrow(axis, 0, size))
    elif whole % step == 0:
        neighbours = labels.unflatten(axis, (-1, step))
        recorder.store.unite(neighbours, neighbours.narrow(axis + 1, 0, 1))


def _placed(recorder: LabelRecorder, call: OpCall, labels: Tensor, axis: int) -> Tensor:
    """Give positions of an axis that have no label frozen ones of their own."""
    if not bool((narrow_constant(labels) == NEUTRAL).any()):
        return labels
    places = recorder.store.fresh(labels.shape[axis])
    cause = recorder.cause(call, "a channel of constants, or one alone")
    for place in places:
        recorder.store.freeze(place, cause)
    return torch.where(labels == NEUTRAL, along(places, axis, labels.shape), labels)


def channel_shuffle(recorder: LabelRecorder, call: OpCall) -> None:
    """Shuffle the labels; the groups are tied position by position."""
    labels = recorder.labels_of(call.args[0])
    groups: int = call.args[1]
    parts = labels.unflatten(1, (groups, -1))
    if 1 in varying_axes(labels):
        recorder.store.unite(parts, parts.narrow(1, 0, 1))
    recorder.set_labels(call.out, parts.transpose(1, 2).reshape(call.out.shape))


def copy(recorder: LabelRecorder, call: OpCall) -> None:
    """Keep the labels: a copy in another layout or dtype; a weight's, as autocast makes, is it."""
    view = recorder.weight_view(call.args[0])
    if view is not None and call.name == "_to_copy":
        recorder.set_weight_view(call.out, view)
        return
    recorder.set_labels(call.out, recorder.labels_of(call.args[0]).expand(call.out.shape))


def view(recorder: LabelRecorder, call: OpCall) -> None:
    """Reshape the labels; how the parts of a divided axis hang together is settled at the end."""
    before = recorder.labels_of(call.args[0])
    labels = before.reshape(call.out.shape)
    if len(varying_axes(labels)) > len(varying_axes(before)):
        recorder.recording.splits.append(narrow_constant(labels))
    recorder.note_sizes(labels)
    recorder.set_labels(call.out, labels)


def split(recorder: LabelRecorder, call: OpCall) -> None:
    """Split the labels; equal parts of a labelled axis are tied position by position."""
    movement(recorder, call)
    if recorder.weight_view(call.args[0]) is not None:
        return
    parts = [recorder.labels_of(tensor) for tensor in call.out]
    axis = call.args[2] if len(call.args) > 2 else call.kwargs.get("dim", 0)
    labels = recorder.labels_of(call.args[0])
    if axis % labels.ndim in varying_axes(labels) and len({part.shape for part in parts}) == 1:
        for part in parts[1:]:
            recorder.store.unite(parts[0], part)


def glu(recorder: LabelRecorder, call: OpCall) -> None:
    """A gated linear unit halves its axis: the halves are tied position by position."""
    labels = recorder.labels_of(call.args[0])
    axis = call.args[1] if len(call.args) > 1 else -1
    values, gates = labels.chunk(2, axis)
    recorder.store.unite(values, gates)
    recorder.set_labels(call.out, values)


def pad(recorder: LabelRecorder, call: OpCall) -> None:
    """Padding of space belongs to the channels; channels of zeros are frozen in their place."""
    labels = recorder.labels_of(call.args[0])
    varying = varying_axes(labels)
    for axis in range(labels.ndim):
        place = 2 * (labels.ndim - 1 - axis)
        sides = call.args[1][place : place + 2]
        if axis not in varying:
            labels = labels.narrow(axis, 0, 1)
        elif any(sides):
            widths = [0] * place + list(sides)
            labels = torch.constant_pad_nd(labels, widths, NEUTRAL)
            labels = _placed(recorder, call, labels, axis)
    recorder.set_labels(call.out, labels.expand(call.out.shape))
