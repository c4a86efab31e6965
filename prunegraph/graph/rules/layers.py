"""What layers with parameters and matrix products do to labels, and what they cost."""

from math import prod

from torch import Tensor

from prunegraph.graph.rules.shared.constants import freeze_if_constant
from prunegraph.graph.rules.shared.copied_heads import SHARED
from prunegraph.graph.rules.shared.products import NO_AXIS, activation_product, record_product
from prunegraph.graph.rules.shared.tokens import keep_tokens, mix_tokens, mixes_tokens
from prunegraph.graph.rules.shared.weights import record_linear, tie_parameter
from prunegraph.graph.trace.labels import NEUTRAL, along, is_neutral, varying_axes
from prunegraph.graph.trace.recorder import LabelRecorder, OpCall

GROUPED_BYTES = 16
"""What the strides of a grouped product must be multiples of."""


def batch_norm(recorder: LabelRecorder, call: OpCall) -> None:
    """Tie the parameters and buffers to the channel axis."""
    labels = recorder.labels_of(call.args[0])
    if mixes_tokens(recorder, labels, 1):
        keep_tokens(recorder, call, *call.args[1:5])
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


def trilinear(recorder: LabelRecorder, call: OpCall) -> None:
    """Read two inputs by the last two axes of one weight, as ``nn.Bilinear`` does."""
    one, weight, other, *spread = call.args
    axes = [recorder.axis_labels(weight, axis) for axis in range(weight.ndim)]
    if spread[:4] != [[1, 3], [0], [1, 2], [2, 3]] or len(axes) != 3 or None in axes:
        recorder.freeze_all(call, "product of three tensors, one of them no weight of its own")
        return
    outputs, *inputs = (axis for axis in axes if axis is not None)
    for tensor, own in zip((one, other), inputs, strict=True):
        recorder.store.unite(recorder.channel_labels(recorder.labels_of(tensor), -1), own)
    recorder.set_labels(call.out, along(outputs, 1, call.out.shape))


def layer_norm(recorder: LabelRecorder, call: OpCall) -> None:
    """Tie the parameters to the channels; normalising over several labelled axes freezes."""
    source, normalized_shape, weight, bias = call.args[:4]
    labels = recorder.labels_of(source)
    first = labels.ndim - len(normalized_shape)
    wide = [axis for axis in range(first, labels.ndim) if labels.shape[axis] > 1]
    if varying_axes(labels) and not set(varying_axes(labels)) & set(wide) and wide:
        keep_tokens(recorder, call, weight, bias)
    elif len(normalized_shape) > 1 and varying_axes(labels):
        _norm_over_positions(recorder, call, labels, first)
    elif weight is not None and len(varying_axes(labels)) > 1 and recorder.is_head(labels):
        recorder.store.unite(labels, labels.narrow(-1, 0, 1))  # a whole head, or none of it
        recorder.recording.heads.append(labels.narrow(-1, 0, 1))
        for tensor in (weight, bias):
            if tensor is not None:
                own = recorder.stored_labels(tensor, 0)
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
            recorder.store.unite(recorder.stored_labels(tensor, axis - first), channels)


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
        mix_tokens(recorder, call, outs, source, weight, bias)
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
        in_labels, out_labels = recorder.channels(left, 1), recorder.stored_labels(left, 0)
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
    rows = left.numel() // max(left.shape[-1], 1)
    _record_sums(recorder, recorder.store.joined(summed, channels), rows)
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
        parts = recorder.stored_labels(weight, axis).view(-1, block)
        recorder.store.unite(parts, parts[:, :1])
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
