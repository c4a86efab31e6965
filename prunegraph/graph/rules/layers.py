"""What layers with parameters and matrix products do to labels, and what they cost."""

from math import prod

import torch
from torch import Tensor

from prunegraph.graph.rules.attention import NO_AXIS, activation_product, record_product
from prunegraph.graph.rules.constants import freeze_if_constant
from prunegraph.graph.rules.copied_heads import SHARED
from prunegraph.graph.trace.labels import NEUTRAL, along, is_neutral, neutral, varying_axes
from prunegraph.graph.trace.recorder import LabelRecorder, OpCall
from prunegraph.graph.trace.recording import RecordedOp

GROUPED_BYTES = 16
"""What the strides of a grouped product must be multiples of."""


def tie_parameter(recorder: LabelRecorder, tensor: Tensor | None, channels: Tensor) -> None:
    """Unite a 1-D parameter (or buffer) with the channels."""
    if tensor is None:
        return
    labels = recorder.axis_labels(tensor, 0)
    recorder.store.unite(recorder.labels_of(tensor) if labels is None else labels, channels)


def mixes_tokens(recorder: LabelRecorder, labels: Tensor, axis: int) -> bool:
    """Return whether channels lie along other axes than the one that a layer mixes or scales.

    What was made of a stored table alone has none yet: it may vary along tokens.
    """
    varying = varying_axes(labels)
    if labels.shape[axis] == 1 or not varying or axis % labels.ndim in varying:
        return False
    return not recorder.is_raw(labels)


def _keep_tokens(recorder: LabelRecorder, call: OpCall, *parameters: Tensor | None) -> None:
    """Keep parameters whole that lie along tokens."""
    for tensor in parameters:
        for axis in range(0 if tensor is None else tensor.ndim):
            assert tensor is not None
            labels = recorder.channels(tensor, axis)
            if labels is not None:
                recorder.store.freeze(labels, recorder.cause(call, "lies along tokens"))


def _mix_tokens(
    recorder: LabelRecorder,
    call: OpCall,
    axis: int,
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> None:
    """A layer over tokens (MLP-Mixer's): what it makes of a channel is of that channel alone.

    Its weight stays whole, and is used for each channel that is left.
    """
    labels = recorder.labels_of(source).narrow(axis, 0, 1)
    _keep_tokens(recorder, call, weight, bias)
    recorder.set_labels(call.out, labels.expand(call.out.shape))
    matrix = weight.shape[:2] if call.name == "convolution" else weight.shape[-2:]
    record_product(recorder, prod(matrix), labels.reshape(-1))


def batch_norm(recorder: LabelRecorder, call: OpCall) -> None:
    """Tie the parameters and buffers to the channel axis."""
    labels = recorder.labels_of(call.args[0])
    if mixes_tokens(recorder, labels, 1):
        _keep_tokens(recorder, call, *call.args[1:5])
        recorder.set_labels(call.outputs()[0], labels)
        return
    channels = recorder.channel_labels(labels, 1)
    for tensor in call.args[1:5]:
        tie_parameter(recorder, tensor, channels)
    result = call.outputs()
    recorder.set_labels(result[0], along(channels, 1, result[0].shape))
    for statistic in result[1:]:  # empty where running statistics are used
        if statistic.shape == channels.shape:
            recorder.set_labels(statistic, channels)


def layer_norm(recorder: LabelRecorder, call: OpCall) -> None:
    """Tie the parameters to the channels; normalising over several labelled axes freezes."""
    source, normalized_shape, weight, bias = call.args[:4]
    labels = recorder.labels_of(source)
    first = labels.ndim - len(normalized_shape)
    wide = [axis for axis in range(first, labels.ndim) if labels.shape[axis] > 1]
    if varying_axes(labels) and not set(varying_axes(labels)) & set(wide) and wide:
        _keep_tokens(recorder, call, weight, bias)
    elif len(normalized_shape) > 1 and varying_axes(labels):
        _norm_over_positions(recorder, call, labels, first)
    elif weight is not None and len(varying_axes(labels)) > 1 and recorder.is_head(labels):
        recorder.store.unite(labels, labels.narrow(-1, 0, 1))  # a whole head, or none of it
        recorder.recording.heads.append(labels.narrow(-1, 0, 1))
        for tensor in (weight, bias):
            if tensor is not None:
                own = recorder.axis_labels(tensor, 0)
                assert own is not None
                recorder.store.freeze(own, recorder.cause(call, SHARED))
    elif len(normalized_shape) == 1:
        channels = recorder.channel_labels(labels, -1)
        tie_parameter(recorder, weight, channels)
        tie_parameter(recorder, bias, channels)
        if weight is None or not recorder.in_norm_module:
            recorder.note_mean(channels, -1)
    recorder.set_labels(call.out[0], labels)


def _norm_over_positions(recorder: LabelRecorder, call: OpCall, labels: Tensor, first: int) -> None:
    """Tie the parameters of a layer norm over channels and what follows them, ``[C, H, W]``."""
    weight, bias = call.args[2:4]
    (axis, *others) = varying_axes(labels)
    if others or axis < first or weight is None or not recorder.in_norm_module:
        recorder.freeze_inputs(call, "normalises over channels and positions")
        return
    channels = recorder.channel_labels(labels, axis)
    for tensor in (weight, bias):
        if tensor is not None:
            own = recorder.axis_labels(tensor, axis - first)
            assert own is not None
            recorder.store.unite(own, channels)


def group_norm(recorder: LabelRecorder, call: OpCall) -> None:
    """Tie the channels of each group: a group leaves as a whole, so no other's statistics change.

    One group over all channels is a layer norm: it normalises over the channels that are kept.
    """
    source, weight, bias = call.args[:3]
    labels = recorder.labels_of(source)
    channels = recorder.channel_labels(labels, 1)
    tie_parameter(recorder, weight, channels)
    tie_parameter(recorder, bias, channels)
    num_groups = call.args[6]
    known = weight is not None and recorder.in_norm_module
    if 1 < num_groups < source.shape[1]:
        parts = channels.view(num_groups, -1)
        recorder.store.unite(parts, parts[:, :1])
        if not known:
            recorder.note_mean(parts, None)
    elif num_groups == 1 and not known:
        recorder.note_mean(channels, 1 - source.ndim)
    recorder.set_labels(call.out[0], labels)
    for statistic in call.out[1:]:  # [B, groups]
        recorder.set_labels(
            statistic, along(channels.view(num_groups, -1)[:, 0], 1, statistic.shape)
        )


def _computed_convolution(recorder: LabelRecorder, call: OpCall) -> None:
    """A weight that is made in the forward: channels pass where each has a kernel of its own."""
    source, weight, bias, stride, _, _, transposed = call.args[:7]
    positions = prod((source if transposed else call.out).shape[2:])
    blurs = weight.shape[:2] == (source.shape[1], 1) and call.args[8] == source.shape[1]
    kernels = recorder.labels_of(weight)
    own = bool(varying_axes(kernels)) and set(varying_axes(kernels)) <= {0}
    if own and not recorder.is_constant(kernels):
        recorder.recording.computed |= recorder.sources.of(weight)
    if not (blurs and (own or recorder.is_constant(kernels))):
        recorder.recording.computed |= recorder.sources.of(weight)
        recorder.freeze_all(call, "convolution with a computed weight")
        record_product(recorder, source.shape[0] * positions * weight.numel())
        return
    channels = recorder.channel_labels(recorder.labels_of(source), 1)
    tie_parameter(recorder, bias, channels)
    if own:  # features of a template, looked for in those of an image
        recorder.store.unite(channels, recorder.channel_labels(kernels, 0))
    recorder.set_labels(call.out, along(channels, 1, call.out.shape))
    if recorder.modules.running_own_code:
        recorder.note_sizes(channels)  # `groups`
    kernel = prod(weight.shape[2:])
    recorder.recording.ops.append(
        RecordedOp(
            module=recorder.modules.current,
            kind="conv",
            in_labels=channels[:0],
            out_labels=channels,
            macs_coefficient=float(source.shape[0] * positions * kernel),
            param=None,
            kernel_size=kernel,
            stride=stride[0],
            groups=len(channels),
            depthwise=True,
            spatial=prod(call.out.shape[2:]),
        )
    )


def convolution(recorder: LabelRecorder, call: OpCall) -> None:
    """Unite the input's channels with the weight's input axis; the output's are fresh."""
    source, weight, bias, stride, _padding, _dilation, transposed = call.args[:7]
    groups: int = call.args[8]
    if recorder.weight_view(weight) is None:
        _computed_convolution(recorder, call)
        return
    labels = recorder.labels_of(source)
    pointwise = prod(weight.shape[2:]) == 1 and source.shape[2:] == call.out.shape[2:]
    if pointwise and groups == 1 and mixes_tokens(recorder, labels, 1):
        _mix_tokens(recorder, call, 1, source, weight, bias)
        return
    channels = recorder.channel_labels(labels, 1)
    depthwise = groups > 1 and weight.shape[1] == 1
    if transposed:
        depthwise &= weight.shape[0] == groups
    in_axis = 0 if transposed else 1
    out_labels = recorder.axis_labels(weight, 1 - in_axis)
    in_labels = recorder.axis_labels(weight, in_axis)
    assert in_labels is not None
    assert out_labels is not None
    freeze_if_constant(recorder, call, channels, in_labels)
    if groups == 1:
        recorder.store.unite(channels, in_labels)
    elif depthwise:
        rows = in_labels if transposed else out_labels
        out_labels = rows
        recorder.store.unite(channels.view(groups, -1), rows.view(groups, -1))
        if recorder.modules.running_own_code:  # it names the number of groups
            recorder.note_sizes(channels)
    elif transposed:
        recorder.store.unite(channels, in_labels)
        parts = in_labels.view(groups, -1)
        recorder.store.unite(parts, parts[:1])
    else:
        recorder.store.unite(channels.view(groups, -1), in_labels.view(1, -1))
        parts = out_labels.view(groups, -1)
        recorder.store.unite(parts, parts[:1])
    channels_out = out_labels
    if transposed and groups > 1 and not depthwise:
        channels_out = out_labels.repeat(groups)
    tie_parameter(recorder, bias, channels_out)
    recorder.set_labels(call.out, along(channels_out, 1, call.out.shape))
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
            out_axis=_stored_axis(recorder, weight, 1 if transposed and not depthwise else 0),
            computed=_is_computed(recorder, weight),
        )
    )


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


def _weight_name(recorder: LabelRecorder, weight: Tensor) -> str | None:
    stored = recorder.weight_view(weight)
    return None if stored is None else stored.name


def _is_computed(recorder: LabelRecorder, weight: Tensor) -> bool:
    stored = recorder.weight_view(weight)
    return stored is not None and stored.computed


def _stored_axis(recorder: LabelRecorder, weight: Tensor, position: int) -> int:
    """Return which axis of the stored weight an axis of its view is."""
    stored = recorder.weight_view(weight)
    axis = None if stored is None else stored.axes[position]
    return axis if isinstance(axis, int) else position


def record_linear(
    recorder: LabelRecorder,
    weight: Tensor,
    in_labels: Tensor,
    out_labels: Tensor,
    rows: int,
    out_position: int = 0,
) -> None:
    """Count a product of ``rows`` rows with a weight, whose outputs lie along ``out_position``."""
    recorder.recording.ops.append(
        RecordedOp(
            module=recorder.modules.current,
            kind="linear",
            in_labels=in_labels,
            out_labels=out_labels,
            macs_coefficient=float(rows),
            param=_weight_name(recorder, weight),
            spatial=rows,
            out_axis=_stored_axis(recorder, weight, out_position),
            computed=_is_computed(recorder, weight),
        )
    )


def _matrix_product(
    recorder: LabelRecorder,
    call: OpCall,
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    from_left: bool = False,
) -> None:
    """``out = source @ weight (+ bias)``; the weight is ``[in, out]``, perhaps a permuted view.

    With ``from_left`` it is ``weight @ source``, and the weight ``[out, in]``.
    """
    ins, outs = (-1, -2) if from_left else (-2, -1)
    in_labels, out_labels = (recorder.matrix_labels(weight, axis) for axis in (ins, outs))
    if in_labels is None or out_labels is None:
        recorder.recording.computed |= recorder.sources.of(source) | recorder.sources.of(weight)
        activation_product(recorder, call)
        return
    labels = recorder.labels_of(source)
    if mixes_tokens(recorder, labels, outs) and not recorder.is_recurrent(weight):
        _mix_tokens(recorder, call, outs, source, weight, bias)
        return
    channels = recorder.channel_labels(labels, outs)
    if not recorder.is_recurrent(weight):  # that reads zeros first, as many as it has units
        freeze_if_constant(recorder, call, channels, in_labels)
    recorder.store.unite(channels, in_labels)
    tie_parameter(recorder, bias, out_labels)
    recorder.set_labels(call.out, along(out_labels, outs % call.out.ndim, call.out.shape))
    rows = prod(call.out.shape) // max(call.out.shape[outs], 1)
    record_linear(recorder, weight, in_labels, out_labels, rows, outs)


def addmm(recorder: LabelRecorder, call: OpCall) -> None:
    """A linear layer with bias."""
    bias, source, weight = call.args[:3]
    _matrix_product(recorder, call, source, weight, bias)


def mm(recorder: LabelRecorder, call: OpCall) -> None:
    """A linear layer without bias."""
    _matrix_product(recorder, call, call.args[0], call.args[1])


def mv(recorder: LabelRecorder, call: OpCall) -> None:
    """A matrix, or a vector (``dot``), times a vector: channels along the sum's axis are one."""
    left, right = call.args
    channels = recorder.channel_labels(recorder.labels_of(right), 0)
    if recorder.weight_view(left) is not None and left.ndim > 1:
        in_labels, out_labels = recorder.channels(left, 1), recorder.axis_labels(left, 0)
        assert out_labels is not None
        if in_labels is None:
            recorder.store.freeze(channels, recorder.cause(call, "lies along a kernel"))
        else:
            recorder.store.unite(channels, in_labels)
        _record_sums(recorder, channels, 1, out_labels)
        recorder.set_labels(call.out, out_labels)
        return
    if left.ndim > 1:
        recorder.recording.computed |= recorder.sources.of(left)
    labels = recorder.labels_of(left)
    if set(range(left.ndim - 1)) & set(varying_axes(labels)):
        recorder.freeze_all(call, "a vector times rows that are channels")
        record_product(recorder, left.numel())
        return
    summed = recorder.channel_labels(labels, -1)
    recorder.store.unite(summed, channels)
    rows = left.numel() // max(left.shape[-1], 1)
    _record_sums(recorder, torch.where(summed == NEUTRAL, channels, summed), rows)
    recorder.set_unlabelled(call, "reduced over channels")


def _record_sums(
    recorder: LabelRecorder, summed: Tensor, rows: int, outputs: Tensor = NO_AXIS
) -> None:
    """Count sums over one axis, which may be of constants."""
    if bool((summed == NEUTRAL).any()):
        record_product(recorder, rows * len(summed), outputs)
    else:
        record_product(recorder, rows, outputs, summed)


def grouped_mm(recorder: LabelRecorder, call: OpCall) -> None:
    """Each row times the matrix of its group, of weights ``[groups, in, out]``, as experts do.

    All groups lose the same positions, and these leave in blocks: the kernels read rows that begin
    at multiples of 16 bytes.
    """
    source, weight = call.args[:2]
    stored = recorder.weight_view(weight)
    block = GROUPED_BYTES // source.element_size()
    if (
        stored is None
        or weight.ndim != 3
        or source.ndim != 2
        or any(size % block for size in weight.shape[1:])
    ):
        recorder.freeze_all(call, "a product of groups that is not of stored weights in blocks")
        return
    for axis in (1, 2):
        labels = recorder.axis_labels(weight, axis)
        assert labels is not None
        recorder.store.unite(labels.view(-1, block), labels.view(-1, block)[:, :1])
    _matrix_product(recorder, call, source, weight)


def bmm(recorder: LabelRecorder, call: OpCall) -> None:
    """A product of activations, or a linear layer as ``einsum`` computes it, perhaps with bias."""
    left, right = call.args[-2:]
    if _is_matrix(recorder, right, left):
        _matrix_product(recorder, call, left, right)
    elif _is_matrix(recorder, left, right):
        _matrix_product(recorder, call, right, left, from_left=True)
    else:
        activation_product(recorder, call)
        return
    for bias in map(recorder.labels_of, call.args[:-2]):  # of each matrix perhaps
        if not is_neutral(bias):
            recorder.store.unite(recorder.labels_of(call.out), bias)


def _is_matrix(recorder: LabelRecorder, tensor: Tensor, other: Tensor) -> bool:
    """Return whether a batch of matrices is a stored weight, of one or of several matrices.

    Several lose the same rows and columns, and all stay, unless each belongs to a head.
    """
    stored = recorder.weight_view(tensor)
    if stored is None or None in stored.axes[1:]:
        return False
    varying = varying_axes(recorder.labels_of(other))
    return stored.axes[0] is None or 0 not in varying or len(varying) > 1
