"""What views, slices, joins and copies do to labels: they run on the label tensor too."""

import math

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from prunegraph.graph.rules.shared.batched_heads import (
    is_batched,
    joined_along_batch,
    joined_heads,
    note_parts,
)
from prunegraph.graph.rules.shared.constants import ONE_ALONE, note_constant, note_filled
from prunegraph.graph.rules.shared.indexing import indexed_axes
from prunegraph.graph.trace.labels import (
    NEUTRAL,
    along,
    is_neutral,
    is_scalar,
    narrow_constant,
    neutral,
    varying_axes,
)
from prunegraph.graph.trace.recorder import LabelRecorder, OpCall
from prunegraph.graph.trace.weight_views import WeightView


def embedding(recorder: LabelRecorder, call: OpCall) -> None:
    """Rows of a stored table, or sums of some: its columns are the channels; its rows all stay."""
    table, (out, *others) = call.args[0], call.outputs()
    channels = recorder.axis_labels(table, 1)
    if channels is None and recorder.is_stored(table):  # used otherwise before
        channels = recorder.channel_labels(recorder.labels_of(table), 1)
    if channels is None:
        recorder.freeze_all(call, "embedding in a computed table")
        return
    recorder.set_labels(out, along(channels, -1 % out.ndim, out.shape))
    for tensor in others:  # where the rows of a bag lie
        recorder.set_labels(tensor, neutral(tensor.shape))


def follow_weight(recorder: LabelRecorder, call: OpCall) -> bool:
    """Follow a stored weight into its views and parts; return if the op has made some."""
    source = call.args[0]
    stored = recorder.weight_view(source) if isinstance(source, Tensor) else None
    if stored is None:
        return False
    views = _moved(stored, call)
    for tensor, part in zip(call.outputs(), views or (), strict=views is not None):
        recorder.set_weight_view(tensor, part)
    return views is not None


def _moved(view: WeightView, call: OpCall) -> list[WeightView] | None:
    """Return the views of the same weight that an op's outputs are; None if they are none."""
    source: Tensor = call.args[0]
    out = call.outputs()
    permutation = _permutation(call)
    if permutation is not None:
        return [view.arranged(permutation)]
    match call.name:
        case "split" | "split_with_sizes":
            axis, start = call.argument(2, "dim", 0) % source.ndim, 0
            parts = []
            for part in out:
                parts.append(view.narrowed(axis, start))
                start += part.shape[axis]
            return parts
        case "slice":
            axis, first = call.argument(1, "dim", 0) % source.ndim, call.argument(2, "start", None)
            if call.argument(4, "step", 1) != 1:
                return None
            size = source.shape[axis]
            start = max(first + size, 0) if first is not None and first < 0 else first or 0
            return [view.narrowed(axis, start)]
        case "select" | "unbind":
            axis, unbinds = call.argument(1, "dim", 0) % source.ndim, call.name == "unbind"
            places = range(len(out)) if unbinds else [call.args[2] % source.shape[axis]]
            picked = [view.at(axis, place) for place in places]
            return [each for each in picked if each is not None] or None
        case "unsqueeze" | "squeeze" | "view" | "_unsafe_view" | "reshape":
            viewed = view.viewed(source.shape, out[0].shape)
            return None if viewed is None else [viewed]
        case "expand" if view.is_stack and 1 not in source.shape:
            added = out[0].ndim - source.ndim
            repeated = out[0].shape[added:] == source.shape
            return [view.arranged([*[None] * added, *range(source.ndim)])] if repeated else None
        case _:
            return None


def _permutation(call: OpCall) -> tuple[int, ...] | None:
    """Return the permutation of axes that an op is, or None."""
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


def movement(recorder: LabelRecorder, call: OpCall) -> None:
    """Run the same op on the labels."""
    if follow_weight(recorder, call):
        return
    labels = tree_map_only(Tensor, recorder.labels_of, call.args[0])
    if call.name == "stack":  # all must be equally wide
        for part in labels[1:]:
            recorder.store.unite(labels[0], part)
        known = next((part for part in labels if not is_neutral(part)), labels[0])
        _note_constants(recorder, labels, known)
        labels = [known if is_neutral(part) else part for part in labels]
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


def pick(recorder: LabelRecorder, call: OpCall) -> None:
    """Positions that indices name: channels that are picked by computed ones all stay.

    The example's own indices show one choice alone, as a table of actions does with one action.
    """
    source = call.args[0]
    if call.name == "index":
        axes, indices = indexed_axes(call.args[1]), call.args[1]
    else:
        axes, indices = [call.args[1] % max(source.ndim, 1)], [call.args[2]]
    if call.name != "gather" and axes == [0] and call.out.ndim == source.ndim > 2:
        stored = recorder.weight_view(source)
        if stored is not None and not isinstance(stored.axes[0], tuple):  # layers of a stack
            picked = stored.arranged([None, *range(1, source.ndim)])
            recorder.set_weight_view(call.out, picked)
            return
    known = [recorder.labels_of(index) for index in indices if index is not None]
    if not all(map(recorder.is_constant, known)):
        looks_up = call.name != "gather" and axes == [0] and source.ndim == 2
        if looks_up and recorder.is_stored(source):
            embedding(recorder, call)
            return
        if set(axes) & set(varying_axes(recorder.labels_of(source))):
            recorder.freeze_inputs(call, "channels are picked by computed indices")
    movement(recorder, call)


def movement_inplace(recorder: LabelRecorder, call: OpCall) -> None:
    """Move the labels as the op has moved its input's axes."""
    target = call.args[0]
    labels = recorder.labels_of(target)
    if labels.shape != target.shape or not is_scalar(labels):
        move = getattr(torch.ops.aten, call.name.removesuffix("_"))
        recorder.set_labels(target, move(labels, *call.args[1:], **call.kwargs))


def cat(recorder: LabelRecorder, call: OpCall) -> None:
    """Join labels; parts without channels along the axis (tokens, samples) have the same channels.

    A part of one channel has no labels to speak of, but beside other channels it has a place.
    """
    parts = [recorder.labels_of(tensor) for tensor in call.args[0]]
    axis = call.argument(1, "dim", 0) % call.out.ndim
    parts = [part for part in parts if part.ndim == call.out.ndim]  # cat skips empty vectors
    parts = _rows_alike(recorder, parts, axis)
    join = joined_heads if axis else joined_along_batch
    joined = join(recorder, parts, axis) if all(part.numel() for part in parts) else None
    if joined is not None:
        recorder.set_labels(call.out, joined.expand(call.out.shape))
        return
    known = [part for part in parts if not is_neutral(part)]
    beside_data = len(known) < len(parts) and all(map(is_scalar, known))  # as a first state is
    if (known and beside_data) or any(axis in varying_axes(part) for part in parts):
        parts = [_placed(recorder, call, part, axis) for part in parts]
        labels = torch.cat(parts, axis)
        recorder.note_sizes(labels)
    else:
        firsts = [part.narrow(axis, 0, 1) for part in parts if part.shape[axis]]
        labels = firsts[0]
        for first in firsts[1:]:
            labels = recorder.store.joined(labels, first)
        _note_constants(recorder, firsts, labels)
        labels = labels.expand(call.out.shape)
    recorder.set_labels(call.out, labels)
    for tensor in call.args[0]:
        if not tensor.numel():
            recorder.tie_empty(tensor, labels)


def _note_constants(recorder: LabelRecorder, parts: list[Tensor], labels: Tensor) -> None:
    """Note the parts that are constants, beside channels that the others hold."""
    for part in parts:
        if is_neutral(part) and not is_neutral(labels):
            note_filled(recorder, part, labels)


def _rows_alike(recorder: LabelRecorder, parts: list[Tensor], axis: int) -> list[Tensor]:
    """Unite the rows of stored tables that are joined to tokens: their columns are the channels."""
    axes = [set(varying_axes(part)) for part in parts]
    tokens = [own for own in axes if own and axis not in own]
    if not tokens or not all(own - {axis} for own in axes if own):
        return parts
    firsts = [
        part.narrow(axis, 0, 1) if axis in own else part
        for part, own in zip(parts, axes, strict=True)
    ]
    for part, first in zip(parts, firsts, strict=True):
        recorder.store.unite(part, first)
    return [first.expand(part.shape) for part, first in zip(parts, firsts, strict=True)]


def _tie_slice(recorder: LabelRecorder, call: OpCall) -> None:
    """Tie one of several equal slices of channels to the first, as ``chunk`` does, but for heads.

    Where every second channel is taken (``x[:, ::2]``), neighbours leave together.
    """
    labels, part = recorder.labels_of(call.args[0]), recorder.labels_of(call.out)
    axis = call.argument(1, "dim", 0) % labels.ndim
    step = call.argument(4, "step", 1)
    whole, size = labels.shape[axis], part.shape[axis]
    if not 0 < size < whole or whole % size or axis not in varying_axes(labels):
        return
    if step == 1:
        note_parts(recorder, [labels.narrow(axis, 0, size), part], sliced=True)
    elif whole % step == 0:
        neighbours = labels.unflatten(axis, (-1, step))
        recorder.store.unite(neighbours, neighbours.narrow(axis + 1, 0, 1))


def _placed(recorder: LabelRecorder, call: OpCall, labels: Tensor, axis: int) -> Tensor:
    """Give positions of an axis that have no label ones of their own, or their head's.

    Linear attention has ones beside the values of each head. Those of their own are frozen, unless
    a layer makes them later: what a recurrent cell begins with stands beside its input.
    """
    unlabelled = narrow_constant(labels) == NEUTRAL
    if not bool(unlabelled.any()):
        return labels
    others = [other for other in varying_axes(labels) if other != axis % labels.ndim]
    if others and recorder.is_head(labels):
        first = labels.amax(axis, keepdim=True)
        recorder.store.unite(labels, first)
        recorder.recording.heads.append(narrow_constant(first))
        return first.expand(labels.shape)
    places = recorder.store.fresh(labels.shape[axis])
    own = unlabelled.movedim(axis, 0).flatten(1).any(1).expand(len(places))
    cause = recorder.cause(call, ONE_ALONE)
    if call.name == "cat":
        note_constant(recorder, places[own], cause)
    else:
        recorder.store.freeze(places[own], cause)
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
    by_reshape = call.kwargs.get("memory_format") is torch.contiguous_format
    if view is not None and (call.name == "_to_copy" or (by_reshape and view.is_stack)):
        recorder.set_weight_view(call.out, view)
        return
    recorder.set_labels(call.out, recorder.labels_of(call.args[0]).expand(call.out.shape))


def view(recorder: LabelRecorder, call: OpCall) -> None:
    """Reshape the labels; how the parts of a divided axis hang together is resolved at the end.

    A stored table of several axes, as one of positions, divides its rows.
    """
    if follow_weight(recorder, call):
        return
    before = recorder.labels_of(call.args[0])
    labels = before.reshape(call.out.shape)
    axes = varying_axes(before)
    is_divided = len(varying_axes(labels)) > len(axes)
    if is_divided and not (len(axes) > 1 and recorder.is_raw(before)):
        recorder.recording.splits.append(narrow_constant(labels))
        recorder.recording.divided.add(narrow_constant(labels))
    recorder.note_sizes(labels)
    recorder.set_labels(call.out, labels)


def split(recorder: LabelRecorder, call: OpCall) -> None:
    """Split the labels; equal parts of a labelled axis are tied position by position."""
    movement(recorder, call)
    if recorder.weight_view(call.args[0]) is not None:
        return
    parts = [recorder.labels_of(tensor) for tensor in call.out]
    labels = recorder.labels_of(call.args[0])
    axis = call.argument(2, "dim", 0) % labels.ndim
    equal = axis in varying_axes(labels) and len({part.shape for part in parts}) == 1
    if equal and not (axis == 0 and is_batched(recorder, labels)):
        note_parts(recorder, parts)


def glu(recorder: LabelRecorder, call: OpCall) -> None:
    """A gated linear unit halves its axis: the halves are tied position by position."""
    labels = recorder.labels_of(call.args[0])
    axis = call.argument(1, "dim", -1)
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


def as_strided(recorder: LabelRecorder, call: OpCall) -> None:
    """Windows over a tensor's storage (Longformer's): labels are laid out like their tensor."""
    source, size, stride = call.args[:3]
    offset = call.argument(3, "storage_offset", None)
    start = 0 if offset is None else offset - source.storage_offset()
    labels = torch.empty_strided(source.shape, source.stride(), dtype=torch.int64)
    storage = labels.untyped_storage().nbytes() // labels.element_size()
    reach = start + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if storage != source.numel() or not 0 <= start <= reach < storage:
        recorder.freeze_all(call, "reads a storage across its tensor")
        return
    labels.copy_(recorder.labels_of(source))
    recorder.set_labels(call.out, labels.as_strided(size, stride, start))


def unfold(recorder: LabelRecorder, call: OpCall) -> None:
    """``F.unfold``: each channel becomes one position a tap of the kernel, one after the other."""
    labels, taps = _channels_alone(recorder, call, -3), math.prod(call.args[1])
    labels = labels.narrow(-1, 0, 1).narrow(-2, 0, 1).squeeze(-1).repeat_interleave(taps, -2)
    recorder.note_sizes(labels)
    recorder.set_labels(call.out, labels.expand(call.out.shape))


def fold(recorder: LabelRecorder, call: OpCall) -> None:
    """``F.fold``: the taps of a channel are summed up, so they are one unit."""
    labels, taps = _channels_alone(recorder, call, -2), math.prod(call.args[2])
    parts = labels.narrow(-1, 0, 1).unflatten(-2, (-1, taps))
    recorder.store.unite(parts, parts.narrow(-2, 0, 1))
    recorder.set_labels(call.out, parts.narrow(-2, 0, 1).expand(call.out.shape))


def _channels_alone(recorder: LabelRecorder, call: OpCall, axis: int) -> Tensor:
    """Return the labels of the op's input; freeze them if any axis after ``axis`` carries some."""
    labels = recorder.labels_of(call.args[0])
    if any(varying > axis + labels.ndim for varying in varying_axes(labels)):
        recorder.freeze_inputs(call, "channels lie along a spatial axis")
    return labels


def view_as_complex(recorder: LabelRecorder, call: OpCall) -> None:
    """Real and imaginary part of a number leave together."""
    labels = recorder.labels_of(call.args[0])
    recorder.store.unite(labels[..., 0], labels[..., 1])
    recorder.set_labels(call.out, labels[..., 0])


def view_as_real(recorder: LabelRecorder, call: OpCall) -> None:
    """Both parts of a number have its label."""
    labels = recorder.labels_of(call.args[0])
    recorder.set_labels(call.out, labels[..., None].expand(call.out.shape))
