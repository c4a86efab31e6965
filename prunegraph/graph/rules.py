"""What each ATen op does to labels.

Data movement runs the same op on the label tensor. Pointwise ops pass labels on and unite their
inputs. Convolutions and linear layers unite the input's channels with the weight's input axis and
start fresh labels for the output's. Everything else has its own rule or freezes what it touches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from prunegraph.graph.labels import NEUTRAL, is_scalar, narrow_constant, varying_axes
from prunegraph.graph.layer_rules import (
    addmm,
    batch_norm,
    convolution,
    embedding,
    gates,
    group_norm,
    layer_norm,
    mm,
    recurrent,
)
from prunegraph.graph.product_rules import activation_product, attention
from prunegraph.graph.recorder import LabelRecorder, OpCall, Rule, WeightView
from prunegraph.graph.recording import RecordedMean

UNIT = torch.tensor([NEUTRAL])


def _is_neutral(labels: Tensor) -> bool:
    return is_scalar(labels) and int(labels.reshape(-1)[0]) == NEUTRAL


# Pointwise


def _aligned_sizes(labels: Tensor, ndim: int) -> list[int]:
    return [1] * (ndim - labels.ndim) + list(labels.shape)


def combine(recorder: LabelRecorder, call: OpCall, left: Tensor, right: Tensor) -> Tensor:
    """Return the labels of a broadcast binary op, uniting what belongs together.

    A side of size 1 along all axes on which the other varies (a gate of one channel, a spatial
    map) says nothing about the other's channels.
    """
    if _is_neutral(left):
        return right
    if _is_neutral(right):
        return left
    ndim = max(left.ndim, right.ndim)
    for one, other in ((left, right), (right, left)):
        axes = [axis + ndim - other.ndim for axis in varying_axes(other)]
        if axes and all(_aligned_sizes(one, ndim)[axis] == 1 for axis in axes):
            if varying_axes(one):
                recorder.store.freeze(one, recorder.cause(call, "its axis carries no channels"))
            return other
    for one, other in ((left, right), (right, left)):
        if _shared_by_heads(recorder, one, other):
            recorder.store.freeze(one, recorder.cause(call, "shared by all heads"))
            return other
    recorder.store.unite(left, right)
    if bool((left == NEUTRAL).any()) or bool((right == NEUTRAL).any()):
        return torch.where(left == NEUTRAL, right, left)
    ranks = len(varying_axes(left)), len(varying_axes(right))
    if ranks[0] != ranks[1]:  # they are equal now, and the simpler one shows it
        return left if ranks[0] < ranks[1] else right
    return left if left.numel() >= right.numel() else right


def _shared_by_heads(recorder: LabelRecorder, one: Tensor, other: Tensor) -> bool:
    """Return whether ``one`` varies inside a head only, and ``other`` over the heads too."""
    ndim = max(one.ndim, other.ndim)
    inner, all_axes = (
        {axis + ndim - labels.ndim for axis in varying_axes(labels)} for labels in (one, other)
    )
    within = bool(inner) and inner < all_axes and min(all_axes) not in inner
    return within and recorder.is_head(other)


def _expand(labels: Tensor, tensor: Tensor) -> Tensor:
    return labels.expand(tensor.shape)


def pointwise(recorder: LabelRecorder, call: OpCall) -> None:
    """Unite all inputs, broadcast; the outputs carry the result."""
    inputs = [t for t in call.tensors() if t.numel() > 1 or t.ndim > 0]
    labels = recorder.labels_of(inputs[0]) if inputs else UNIT.view([])
    for tensor in inputs[1:]:
        labels = combine(recorder, call, labels, recorder.labels_of(tensor))
    for tensor in call.outputs():
        recorder.set_labels(tensor, _expand(labels, tensor))


def pointwise_inplace(recorder: LabelRecorder, call: OpCall) -> None:
    """Unite all inputs; a constant target takes the labels of what is written into it.

    A view of a constant cannot be followed back to its base, so what enters it is frozen.
    """
    target: Tensor = call.args[0]
    sources = [t for t in call.tensors()[1:] if t.numel() > 1]
    labels = recorder.labels_of(target)
    if _is_neutral(labels) and target._base is not None and sources:
        recorder.freeze_inputs(call, "written in place into a view of a constant")
        return
    for tensor in sources:
        labels = combine(recorder, call, labels, recorder.labels_of(tensor))
    if labels.shape != target.shape and labels.numel() > target.numel():
        recorder.freeze_inputs(call, "in-place op that broadcasts its target")
        return
    recorder.set_labels(target, _expand(labels, target))


def constant(recorder: LabelRecorder, call: OpCall) -> None:
    """A tensor made from sizes and numbers: neutral."""
    for tensor in call.outputs():
        recorder.set_labels(tensor, UNIT.view([1] * tensor.ndim).expand(tensor.shape))


# Data movement


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
    labels = tree_map_only(Tensor, recorder.labels_of, call.args[0])  # indices stay as they are
    kwargs = {k: v for k, v in call.kwargs.items() if k not in {"dtype", "memory_format"}}
    moved_labels = call.func(labels, *call.args[1:], **kwargs)
    pairs = zip(
        call.outputs(),
        [moved_labels] if isinstance(moved_labels, Tensor) else moved_labels,
        strict=True,
    )
    for index, (tensor, part) in enumerate(pairs):
        recorder.set_labels(tensor, part)
        if call.name in {"split", "split_with_sizes", "slice"}:
            recorder.note_sizes(part, index)


def copy(recorder: LabelRecorder, call: OpCall) -> None:
    """Keep the labels: a copy in another layout or dtype."""
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
    """Pad the labels with neutral ones."""
    labels = recorder.labels_of(call.args[0])
    recorder.set_labels(call.out, torch.constant_pad_nd(labels, call.args[1], NEUTRAL))


# Reductions


def _reduced_axes(call: OpCall, ndim: int) -> list[int]:
    place = 2 if call.name == "linalg_vector_norm" else 1
    dims = call.args[place] if len(call.args) > place else call.kwargs.get("dim")
    if dims is None or dims == []:
        return list(range(ndim))
    return [axis % ndim for axis in ([dims] if isinstance(dims, int) else dims)]


def _drop(labels: Tensor, axes: Sequence[int], out: Tensor | None) -> Tensor:
    for axis in axes:
        labels = labels.narrow(axis, 0, 1)
    return labels if out is None or labels.shape == out.shape else labels.reshape(out.shape)


def reduction(recorder: LabelRecorder, call: OpCall) -> None:
    """Pass labels on along axes that are not reduced.

    If another axis is labelled too, positions along the reduced one become one class: the width of
    a head, paths that were stacked. If it is the only one, sums and 2-norms pass, because a removed
    channel adds nothing; a mean is one over the channels that are kept; all else freezes.
    """
    labels = recorder.labels_of(call.args[0])
    axes = _reduced_axes(call, labels.ndim)
    varying = varying_axes(labels)
    reduced = [axis for axis in varying if axis in axes]
    if not reduced or recorder.is_constant(labels):
        for tensor in call.outputs():
            recorder.set_labels(tensor, _drop(labels, axes, tensor))
    elif len(reduced) < len(varying):
        for axis in reduced:
            recorder.store.unite(labels, labels.narrow(axis, 0, 1))
        if recorder.is_head(labels):
            recorder.recording.heads.append(_drop(narrow_constant(labels), axes, None))
        for tensor in call.outputs():
            recorder.set_labels(tensor, _drop(labels, axes, tensor))
    else:
        if call.name == "mean":
            mean = RecordedMean(
                module=recorder.modules.current,
                labels=recorder.channel_labels(labels, reduced[0]),
                axis=reduced[0] - labels.ndim,
            )
            recorder.recording.means.append(mean)
        elif not _is_sum(call):
            recorder.freeze_inputs(call, "reduces over channels")
        recorder.set_unlabelled(call, "reduced over channels")


def _is_sum(call: OpCall) -> bool:
    if call.name == "linalg_vector_norm":
        order = call.args[1] if len(call.args) > 1 else call.kwargs.get("ord", 2)
        return bool(order == 2)
    return call.name == "sum"


def softmax(recorder: LabelRecorder, call: OpCall) -> None:
    """Pass labels on; a softmax over the only labelled axis freezes it.

    If another axis is labelled too (paths that were stacked), the positions become one class.
    """
    labels = recorder.labels_of(call.args[0])
    axis, varying = call.args[1] % labels.ndim, varying_axes(labels)
    if axis in varying and len(varying) > 1:
        recorder.store.unite(labels, labels.narrow(axis, 0, 1))
    elif axis in varying:
        recorder.freeze_inputs(call, "normalises over channels")
    recorder.set_labels(call.out, labels)


def spatial(recorder: LabelRecorder, call: OpCall) -> None:
    """Pooling and resampling: channels (axis -3 or before) pass, spatial positions are united."""
    labels = recorder.labels_of(call.args[0])
    spatial_rank = call.name.count("1d") + 2 * call.name.count("2d") + 3 * call.name.count("3d")
    first = labels.ndim - spatial_rank
    for axis in varying_axes(labels):
        if axis >= first:
            recorder.freeze_inputs(call, "channels lie along a spatial axis")
            break
    for axis in range(first, labels.ndim):
        labels = labels.narrow(axis, 0, 1)
    for tensor in call.outputs():
        recorder.set_labels(tensor, labels.expand(tensor.shape))


def restride(recorder: LabelRecorder, call: OpCall) -> None:
    """A new stride for axes of size 1 (pooling in channels-last ends with it) moves nothing."""
    target: Tensor = call.args[0]
    labels = recorder.labels_of(target)
    strides, expected = target.stride(), 1
    moved = tuple(labels.shape) != tuple(target.shape) or target.storage_offset() != 0
    for axis in reversed(range(target.ndim)):
        moved |= target.shape[axis] > 1 and strides[axis] != expected
        expected *= target.shape[axis]
    if moved:
        recorder.freeze_inputs(call, "its memory is read in another order")
    else:
        recorder.set_labels(target, labels)


def nothing(_recorder: LabelRecorder, _call: OpCall) -> None:
    """The op returns no tensor that matters."""


def _names(text: str) -> list[str]:
    return text.split()


_POINTWISE = _names(
    """
    relu gelu silu sigmoid tanh hardtanh hardswish hardsigmoid elu leaky_relu softplus mish exp
    log log1p sqrt rsqrt abs neg sign square pow reciprocal clamp clamp_min clamp_max erf sin
    cos add sub mul div rsub maximum minimum where lerp addcmul addcdiv threshold logical_not eq
    ne lt gt le ge masked_fill bitwise_not native_dropout _prelu_kernel prelu
    log_sigmoid_forward relu6 floor round isnan isfinite nan_to_num rsqrt celu selu atan
    """
)
_INPLACE = _names(
    """
    copy_ fill_ zero_ masked_fill_
    """
)
_CONSTANT = _names(
    """
    empty zeros ones full arange new_zeros new_ones new_empty new_full zeros_like ones_like
    empty_like full_like rand randn scalar_tensor linspace eye empty_strided new_empty_strided
    rand_like randn_like tril triu tril_indices triu_indices
    """
)
_MOVEMENT = _names(
    """
    permute transpose t numpy_T squeeze unsqueeze expand slice select unbind cat stack flip roll
    repeat split_with_sizes alias detach lift_fresh index index_select narrow movedim
    pixel_shuffle pixel_unshuffle unfold channel_shuffle native_channel_shuffle diagonal gather
    """
)
_SPATIAL = _names(
    """
    max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_avg_pool1d max_pool2d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d
    upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa upsample_linear1d
    mkldnn_max_pool2d reflection_pad2d replication_pad2d reflection_pad1d replication_pad1d
    """
)


_ATTENTION = _names(
    """
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    """
)


def _table() -> dict[str, Rule]:
    table: dict[str, Rule] = dict.fromkeys(_POINTWISE, pointwise)
    table |= dict.fromkeys([f"{name}_" for name in _POINTWISE], pointwise_inplace)
    table |= dict.fromkeys(_INPLACE, pointwise_inplace)
    table |= dict.fromkeys(_CONSTANT, constant)
    table |= dict.fromkeys(_MOVEMENT, movement)
    table |= dict.fromkeys(_SPATIAL, spatial)
    table |= dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), view)
    table |= dict.fromkeys(("clone", "contiguous", "_to_copy"), copy)
    table |= dict.fromkeys(
        ("mean", "sum", "amax", "amin", "max", "min", "argmax", "linalg_vector_norm"), reduction
    )
    table |= dict.fromkeys(("_softmax", "_log_softmax"), softmax)
    table |= {
        "as_strided_": restride,
        "split": split,
        "constant_pad_nd": pad,
        "bmm": activation_product,
        "baddbmm": activation_product,
        "glu": glu,
        "embedding": embedding,
        "mkldnn_rnn_layer": recurrent,
        "unsafe_split": gates,
    }
    batch_norms = ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
    table |= dict.fromkeys(batch_norms, batch_norm)
    table |= {"native_layer_norm": layer_norm, "native_group_norm": group_norm}
    table |= {"convolution": convolution, "addmm": addmm, "mm": mm}
    table |= dict.fromkeys(_ATTENTION, attention)
    table |= dict.fromkeys(("_local_scalar_dense", "sym_size", "is_same_size", "equal"), nothing)
    return table


RULES: dict[str, Rule] = _table()
