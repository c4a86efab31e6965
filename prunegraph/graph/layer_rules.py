"""What layers with parameters and matrix products do to labels, and what they cost."""

from math import prod

from torch import Tensor

from prunegraph.graph.labels import NEUTRAL, along, varying_axes
from prunegraph.graph.product_rules import activation_product, record_product
from prunegraph.graph.recorder import LabelRecorder, OpCall
from prunegraph.graph.recording import RecordedOp


def _tie_parameter(recorder: LabelRecorder, tensor: Tensor | None, channels: Tensor) -> None:
    """Unite a 1-D parameter (or buffer) with the channels."""
    if tensor is None:
        return
    labels = recorder.axis_labels(tensor, 0)
    recorder.store.unite(recorder.labels_of(tensor) if labels is None else labels, channels)


def _freeze_if_constant(
    recorder: LabelRecorder, call: OpCall, channels: Tensor, in_labels: Tensor
) -> None:
    """Keep the columns of a layer that reads a constant made in the forward."""
    if in_labels.numel() > 1 and bool((channels == NEUTRAL).all()):
        recorder.store.freeze(in_labels, recorder.cause(call, "reads a constant"))


def batch_norm(recorder: LabelRecorder, call: OpCall) -> None:
    """Tie the parameters and buffers to the channel axis."""
    labels = recorder.labels_of(call.args[0])
    channels = recorder.channel_labels(labels, 1)
    for tensor in call.args[1:5]:
        if isinstance(tensor, Tensor):
            _tie_parameter(recorder, tensor, channels)
    result = call.outputs()
    recorder.set_labels(result[0], along(channels, 1, result[0].shape))
    for statistic in result[1:]:  # empty where running statistics are used
        if statistic.shape == channels.shape:
            recorder.set_labels(statistic, channels)


def layer_norm(recorder: LabelRecorder, call: OpCall) -> None:
    """Tie the parameters to the last axis; normalising over several labelled axes freezes."""
    source, normalized_shape, weight, bias = call.args[:4]
    labels = recorder.labels_of(source)
    if len(normalized_shape) > 1 and varying_axes(labels):
        recorder.freeze_inputs(call, "normalises over channels and positions")
    elif weight is not None and len(varying_axes(labels)) > 1 and recorder.is_head(labels):
        recorder.store.unite(labels, labels.narrow(-1, 0, 1))  # a whole head, or none of it
        recorder.recording.heads.append(labels.narrow(-1, 0, 1))
        for tensor in (weight, bias):
            if tensor is not None:
                own = recorder.axis_labels(tensor, 0)
                assert own is not None
                recorder.store.freeze(own, recorder.cause(call, "shared by all heads"))
    elif len(normalized_shape) == 1:
        channels = recorder.channel_labels(labels, -1)
        _tie_parameter(recorder, weight, channels)
        _tie_parameter(recorder, bias, channels)
        if weight is None or not recorder.in_norm_module:
            recorder.note_mean(channels, -1)
    recorder.set_labels(call.out[0], labels)


def group_norm(recorder: LabelRecorder, call: OpCall) -> None:
    """Tie the channels of each group: a group leaves as a whole, so no other's statistics change.

    One group over all channels is a layer norm: it normalises over the channels that are kept.
    """
    source, weight, bias = call.args[:3]
    labels = recorder.labels_of(source)
    channels = recorder.channel_labels(labels, 1)
    _tie_parameter(recorder, weight, channels)
    _tie_parameter(recorder, bias, channels)
    num_groups = call.args[6]
    if 1 < num_groups < source.shape[1]:
        parts = channels.view(num_groups, -1)
        recorder.store.unite(parts, parts[:, :1])
        if weight is None:
            recorder.note_mean(parts, None)
    elif weight is None and num_groups == 1:
        recorder.note_mean(channels, 1 - source.ndim)
    recorder.set_labels(call.out[0], labels)
    for statistic in call.out[1:]:  # [B, groups]
        recorder.set_labels(
            statistic, along(channels.view(num_groups, -1)[:, 0], 1, statistic.shape)
        )


def convolution(recorder: LabelRecorder, call: OpCall) -> None:
    """Unite the input's channels with the weight's input axis; the output's are fresh."""
    source, weight, bias, stride, _padding, _dilation, transposed = call.args[:7]
    groups: int = call.args[8]
    if recorder.weight_view(weight) is None:
        recorder.freeze_inputs(call, "convolution with a computed weight")
        recorder.set_unlabelled(call, "convolution with a computed weight")
        positions = prod((source if transposed else call.out).shape[2:])
        record_product(recorder, source.shape[0] * positions * weight.numel())
        return
    channels = recorder.channel_labels(recorder.labels_of(source), 1)
    depthwise = groups > 1 and weight.shape[1] == 1
    if transposed:
        depthwise &= weight.shape[0] == groups
    in_axis = 0 if transposed else 1
    out_labels = recorder.axis_labels(weight, 1 - in_axis)
    in_labels = recorder.axis_labels(weight, in_axis)
    assert in_labels is not None
    assert out_labels is not None
    _freeze_if_constant(recorder, call, channels, in_labels)
    if groups == 1:
        recorder.store.unite(channels, in_labels)
    elif depthwise:
        rows = in_labels if transposed else out_labels
        out_labels = rows
        recorder.store.unite(channels.view(groups, -1), rows.view(groups, -1))
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
    if bias is not None:
        _tie_parameter(recorder, bias, channels_out)
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
        )
    )


RECURRENT = "recurrent layer: its width is fixed"


def recurrent(recorder: LabelRecorder, call: OpCall) -> None:
    """A fused LSTM, ``[steps, batch, in]``: frozen, but counted.

    ``mkldnn_rnn_layer`` is one layer in one direction; CUDA's are the whole, with all weights.
    """
    source, *weights = call.tensors()[:3]
    if isinstance(call.args[1], list | tuple):
        weights = [weight for weight in call.args[1] if weight.ndim == 2]
    recorder.freeze_inputs(call, RECURRENT)
    recorder.set_unlabelled(call, RECURRENT)
    macs = source.shape[0] * source.shape[1] * sum(weight.numel() for weight in weights)
    record_product(recorder, macs)


def gates(recorder: LabelRecorder, call: OpCall) -> None:
    """Splitting the gates of an LSTM or GRU that runs step by step."""
    recorder.freeze_inputs(call, RECURRENT)
    recorder.set_unlabelled(call, RECURRENT)


def embedding(recorder: LabelRecorder, call: OpCall) -> None:
    """Rows of a stored table: its columns are the output's channels; its rows all stay."""
    table = call.args[0]
    channels = recorder.axis_labels(table, 1)
    if channels is None:
        recorder.freeze_inputs(call, "embedding in a computed table")
        recorder.set_unlabelled(call, "embedding in a computed table")
        return
    recorder.set_labels(call.out, along(channels, -1 % call.out.ndim, call.out.shape))


def _weight_name(recorder: LabelRecorder, weight: Tensor) -> str | None:
    stored = recorder.weight_view(weight)
    return None if stored is None else stored.name


def _stored_axis(recorder: LabelRecorder, weight: Tensor, position: int) -> int:
    """Return which axis of the stored weight an axis of its view is."""
    stored = recorder.weight_view(weight)
    return position if stored is None else stored.axes[position]


def _matrix_product(
    recorder: LabelRecorder, call: OpCall, source: Tensor, weight: Tensor, bias: Tensor | None
) -> None:
    """``out = source @ weight (+ bias)``; the weight is ``[in, out]``, perhaps a permuted view."""
    in_labels, out_labels = recorder.axis_labels(weight, 0), recorder.axis_labels(weight, 1)
    if in_labels is None or out_labels is None:
        activation_product(recorder, call)
        return
    channels = recorder.channel_labels(recorder.labels_of(source), -1)
    _freeze_if_constant(recorder, call, channels, in_labels)
    recorder.store.unite(channels, in_labels)
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
            out_axis=_stored_axis(recorder, weight, 1),
        )
    )


def addmm(recorder: LabelRecorder, call: OpCall) -> None:
    """A linear layer with bias."""
    bias, source, weight = call.args[:3]
    _matrix_product(recorder, call, source, weight, bias)


def mm(recorder: LabelRecorder, call: OpCall) -> None:
    """A linear layer without bias."""
    _matrix_product(recorder, call, call.args[0], call.args[1], None)
