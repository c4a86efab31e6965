"""What each ATen op does to labels.

Data movement runs the same op on the label tensor. Pointwise ops pass labels on and unite their
inputs. Convolutions and linear layers unite the input's channels with the weight's input axis and
start fresh labels for the output's. Everything else has its own rule or freezes what it touches.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from prunegraph.graph.labels import NEUTRAL, along, is_scalar, varying_axes
from prunegraph.graph.recorder import LabelRecorder, OpCall, RecordedOp, Rule

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
    recorder.store.unite(left, right)
    if bool((left == NEUTRAL).any()):
        return torch.where(left == NEUTRAL, right, left)
    return left if left.numel() >= right.numel() else right


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


def movement(recorder: LabelRecorder, call: OpCall) -> None:
    """Run the same op on the labels."""
    if isinstance(call.args[0], Tensor):
        view, permutation = recorder.weight_view(call.args[0]), _permutation(call)
        if view is not None and permutation is not None:
            name, axes = view
            moved = tuple(axes[axis] for axis in permutation)
            recorder.set_weight_view(call.out, (name, moved))
            return
    args, kwargs = tree_map_only(
        Tensor,
        lambda t: recorder.labels_of(t) if t.is_floating_point() else t,
        (call.args, call.kwargs),
    )
    kwargs.pop("dtype", None)
    kwargs.pop("memory_format", None)
    moved_labels = call.func(*args, **kwargs)
    pairs = zip(
        call.outputs(),
        [moved_labels] if isinstance(moved_labels, Tensor) else moved_labels,
        strict=True,
    )
    for tensor, labels in pairs:
        recorder.set_labels(tensor, labels)


def copy(recorder: LabelRecorder, call: OpCall) -> None:
    """Keep the labels: a copy in another layout or dtype."""
    recorder.set_labels(call.out, recorder.labels_of(call.args[0]).expand(call.out.shape))


def view(recorder: LabelRecorder, call: OpCall) -> None:
    """Reshape the labels; an axis divided into equal parts ties the parts position by position."""
    before = recorder.labels_of(call.args[0])
    labels = before.reshape(call.out.shape)
    axes = varying_axes(labels)
    if len(axes) > len(varying_axes(before)):
        recorder.store.unite(labels, labels.narrow(axes[0], 0, 1))
    recorder.set_labels(call.out, labels)


def split(recorder: LabelRecorder, call: OpCall) -> None:
    """Split the labels; equal parts of a labelled axis are tied position by position."""
    movement(recorder, call)
    parts = [recorder.labels_of(tensor) for tensor in call.out]
    axis = call.args[2] if len(call.args) > 2 else call.kwargs.get("dim", 0)
    labels = recorder.labels_of(call.args[0])
    if axis % labels.ndim in varying_axes(labels) and len({part.shape for part in parts}) == 1:
        for part in parts[1:]:
            recorder.store.unite(parts[0], part)


def pad(recorder: LabelRecorder, call: OpCall) -> None:
    """Pad the labels with neutral ones."""
    labels = recorder.labels_of(call.args[0])
    recorder.set_labels(call.out, torch.constant_pad_nd(labels, call.args[1], NEUTRAL))


# Reductions


def _reduced_axes(call: OpCall, ndim: int) -> list[int]:
    dims = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
    if dims is None or dims == []:
        return list(range(ndim))
    return [axis % ndim for axis in ([dims] if isinstance(dims, int) else dims)]


def _drop(labels: Tensor, axes: Sequence[int], out: Tensor) -> Tensor:
    for axis in axes:
        labels = labels.narrow(axis, 0, 1)
    return labels.reshape(out.shape) if labels.shape != out.shape else labels


def reduction(recorder: LabelRecorder, call: OpCall) -> None:
    """Pass labels on along axes that are not reduced; reducing a labelled axis freezes it.

    Sums over a labelled axis are the exception: a removed channel adds nothing.
    """
    labels = recorder.labels_of(call.args[0])
    axes = _reduced_axes(call, labels.ndim)
    varying = varying_axes(labels)
    if any(axis in varying for axis in axes):
        only_sum = call.name == "sum" and all(axis in axes for axis in varying)
        if not only_sum:
            recorder.freeze_inputs(call, "reduces over channels")
        recorder.set_unlabelled(call, "reduced over channels")
        return
    for tensor in call.outputs():
        recorder.set_labels(tensor, _drop(labels, axes, tensor))


def softmax(recorder: LabelRecorder, call: OpCall) -> None:
    """Pass labels on; a softmax over a labelled axis freezes it."""
    labels = recorder.labels_of(call.args[0])
    if call.args[1] % labels.ndim in varying_axes(labels):
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


# Layers with parameters


def _tie_parameter(recorder: LabelRecorder, tensor: Tensor | None, channels: Tensor) -> None:
    """Unite a 1-D parameter (or buffer) with the channels."""
    if tensor is None:
        return
    labels = recorder.axis_labels(tensor, 0)
    recorder.store.unite(recorder.labels_of(tensor) if labels is None else labels, channels)


def batch_norm(recorder: LabelRecorder, call: OpCall) -> None:
    """Tie the parameters and buffers to the channel axis."""
    labels = recorder.labels_of(call.args[0])
    channels = recorder.channel_labels(labels, 1)
    for tensor in call.args[1:5]:
        if isinstance(tensor, Tensor):
            _tie_parameter(recorder, tensor, channels)
    result = call.outputs()
    recorder.set_labels(result[0], along(channels, 1, result[0].shape))


def layer_norm(recorder: LabelRecorder, call: OpCall) -> None:
    """Tie the parameters to the last axis; normalising over several labelled axes freezes."""
    source, normalized_shape, weight, bias = call.args[:4]
    labels = recorder.labels_of(source)
    if len(normalized_shape) > 1 and varying_axes(labels):
        recorder.freeze_inputs(call, "normalises over channels and positions")
    elif len(normalized_shape) == 1:
        channels = recorder.channel_labels(labels, -1)
        _tie_parameter(recorder, weight, channels)
        _tie_parameter(recorder, bias, channels)
    recorder.set_labels(call.out[0], labels)


def group_norm(recorder: LabelRecorder, call: OpCall) -> None:
    """Freeze: the statistics of a group of channels change when one of them leaves."""
    source, weight, bias = call.args[:3]
    labels = recorder.labels_of(source)
    channels = recorder.channel_labels(labels, 1)
    _tie_parameter(recorder, weight, channels)
    _tie_parameter(recorder, bias, channels)
    num_groups = call.args[6]
    if num_groups != source.shape[1]:
        recorder.store.freeze(channels, recorder.cause(call, "group norm over several channels"))
    recorder.set_labels(call.out[0], labels)


def convolution(recorder: LabelRecorder, call: OpCall) -> None:
    """Unite the input's channels with the weight's input axis; the output's are fresh."""
    source, weight, bias, stride, _padding, _dilation, transposed = call.args[:7]
    groups: int = call.args[8]
    if recorder.weight_view(weight) is None:
        recorder.freeze_inputs(call, "convolution with a computed weight")
        recorder.set_unlabelled(call, "convolution with a computed weight")
        return
    channels = recorder.channel_labels(recorder.labels_of(source), 1)
    depthwise = groups > 1 and weight.shape[1] == 1
    in_axis = 0 if transposed else 1
    out_labels = recorder.axis_labels(weight, 1 - in_axis)
    in_labels = recorder.axis_labels(weight, in_axis)
    assert in_labels is not None
    assert out_labels is not None
    if groups == 1:
        recorder.store.unite(channels, in_labels)
    elif depthwise:
        rows = in_labels if transposed else out_labels
        out_labels = rows
        recorder.store.unite(channels.view(groups, -1), rows.view(groups, -1))
    elif transposed:
        recorder.freeze_inputs(call, "grouped transposed convolution")
        recorder.store.freeze(in_labels, recorder.cause(call, "grouped transposed convolution"))
        out_labels = recorder.store.frozen(
            recorder.cause(call, "grouped transposed convolution"), (call.out.shape[1],)
        )
    else:
        recorder.store.unite(channels.view(groups, -1), in_labels.view(1, -1))
        parts = out_labels.view(groups, -1)
        recorder.store.unite(parts, parts[:1])
    if bias is not None:
        _tie_parameter(recorder, bias, out_labels)
    recorder.set_labels(call.out, along(out_labels, 1, call.out.shape))
    positions = prod((source if transposed else call.out).shape[2:])
    kernel = prod(weight.shape[2:])
    recorder.recording.ops.append(
        RecordedOp(
            module=recorder.modules.current,
            kind="conv",
            in_labels=in_labels[:0] if depthwise else in_labels,
            out_labels=out_labels,
            macs_coefficient=float(source.shape[0] * positions * kernel),
            param=_weight_name(recorder, weight),
            kernel_size=kernel,
            stride=stride[0],
            groups=groups,
            depthwise=depthwise,
            spatial=prod(call.out.shape[2:]),
        )
    )


def _weight_name(recorder: LabelRecorder, weight: Tensor) -> str | None:
    stored = recorder.weight_view(weight)
    return None if stored is None else stored[0]


def _matrix_product(
    recorder: LabelRecorder, call: OpCall, source: Tensor, weight: Tensor, bias: Tensor | None
) -> None:
    """``out = source @ weight (+ bias)``; the weight is ``[in, out]``, perhaps a permuted view."""
    in_labels, out_labels = recorder.axis_labels(weight, 0), recorder.axis_labels(weight, 1)
    if in_labels is None or out_labels is None:
        activation_product(recorder, call)
        return
    recorder.store.unite(recorder.channel_labels(recorder.labels_of(source), -1), in_labels)
    if bias is not None:
        _tie_parameter(recorder, bias, out_labels)
    recorder.set_labels(call.out, along(out_labels, -1 % call.out.ndim, call.out.shape))
    rows = prod(call.out.shape[:-1])
    recorder.recording.ops.append(
        RecordedOp(
            module=recorder.modules.current,
            kind="linear",
            in_labels=in_labels,
            out_labels=out_labels,
            macs_coefficient=float(rows),
            param=_weight_name(recorder, weight),
            spatial=rows,
        )
    )


def addmm(recorder: LabelRecorder, call: OpCall) -> None:
    """A linear layer with bias."""
    bias, source, weight = call.args[:3]
    _matrix_product(recorder, call, source, weight, bias)


def mm(recorder: LabelRecorder, call: OpCall) -> None:
    """A linear layer without bias."""
    _matrix_product(recorder, call, call.args[0], call.args[1], None)


def activation_product(recorder: LabelRecorder, call: OpCall) -> None:
    """A product of activations: frozen, but counted."""
    left, right = call.tensors()[-2:]
    recorder.freeze_inputs(call, "matrix product of activations")
    recorder.set_unlabelled(call, "matrix product of activations")
    empty = UNIT[:0]
    recorder.recording.ops.append(
        RecordedOp(
            module=recorder.modules.current,
            kind="matmul",
            in_labels=empty,
            out_labels=empty,
            macs_coefficient=float(prod(left.shape) * right.shape[-1]),
            param=None,
        )
    )


def attention(recorder: LabelRecorder, call: OpCall) -> None:
    """Fused attention: frozen, but counted as two matrix products."""
    query, key, value = call.args[:3]
    recorder.freeze_inputs(call, "attention")
    recorder.set_unlabelled(call, "attention")
    rows = prod(query.shape[:-1])
    macs = rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    empty = UNIT[:0]
    recorder.recording.ops.append(
        RecordedOp(
            module=recorder.modules.current,
            kind="matmul",
            in_labels=empty,
            out_labels=empty,
            macs_coefficient=float(macs),
            param=None,
        )
    )


def nothing(_recorder: LabelRecorder, _call: OpCall) -> None:
    """The op returns no tensor that matters."""


_POINTWISE = (
    "relu gelu silu sigmoid tanh hardtanh hardswish hardsigmoid elu leaky_relu softplus mish exp log "
    "log1p sqrt rsqrt abs neg sign square pow reciprocal clamp clamp_min clamp_max erf sin cos add sub "
    "mul div rsub maximum minimum where lerp addcmul addcdiv threshold logical_not eq ne lt gt le ge "
    "masked_fill bitwise_not native_dropout _prelu_kernel prelu log_sigmoid_forward relu6 floor round "
    "isnan isfinite nan_to_num rsqrt celu selu atan"
).split()
_INPLACE = "copy_ fill_ zero_ masked_fill_".split()
_CONSTANT = (
    "empty zeros ones full arange new_zeros new_ones new_empty new_full zeros_like ones_like empty_like "
    "full_like rand randn scalar_tensor linspace eye empty_strided new_empty_strided rand_like randn_like "
    "tril triu tril_indices triu_indices"
).split()
_MOVEMENT = (
    "permute transpose t numpy_T squeeze unsqueeze expand slice select unbind cat stack flip roll repeat "
    "split_with_sizes alias detach lift_fresh index index_select narrow movedim pixel_shuffle "
    "pixel_unshuffle unfold channel_shuffle native_channel_shuffle diagonal gather"
).split()
_SPATIAL = (
    "max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_avg_pool1d max_pool2d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d "
    "_upsample_nearest_exact2d _upsample_bilinear2d_aa upsample_linear1d mkldnn_max_pool2d "
    "reflection_pad2d replication_pad2d reflection_pad1d replication_pad1d"
).split()


def _table() -> dict[str, Rule]:
    table: dict[str, Rule] = dict.fromkeys(_POINTWISE, pointwise)
    table |= dict.fromkeys([f"{name}_" for name in _POINTWISE], pointwise_inplace)
    table |= dict.fromkeys(_INPLACE, pointwise_inplace)
    table |= dict.fromkeys(_CONSTANT, constant)
    table |= dict.fromkeys(_MOVEMENT, movement)
    table |= dict.fromkeys(_SPATIAL, spatial)
    table |= dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), view)
    table |= dict.fromkeys(("clone", "contiguous", "_to_copy"), copy)
    table |= dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "argmax"), reduction)
    table |= dict.fromkeys(("_softmax", "_log_softmax"), softmax)
    table |= {"split": split, "constant_pad_nd": pad, "bmm": activation_product}
    batch_norms = ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
    table |= dict.fromkeys(batch_norms, batch_norm)
    table |= {"native_layer_norm": layer_norm, "native_group_norm": group_norm}
    table |= {"convolution": convolution, "addmm": addmm, "mm": mm}
    fused = (
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
    )
    table |= dict.fromkeys(fused.split(), attention)
    table |= dict.fromkeys(("_local_scalar_dense", "sym_size", "is_same_size", "equal"), nothing)
    return table


RULES: dict[str, Rule] = _table()


def known_ops() -> list[Any]:
    """Return the names of the ATen ops that have a rule."""
    return sorted(RULES)
