"""Products of activations and of weights: what their axes tie together."""

from math import prod

import torch
from torch import Tensor

from prunegraph.graph.rules.shared.weights import record
from prunegraph.graph.trace.labels import along, narrow_constant, neutral, varying_axes
from prunegraph.graph.trace.recorder import LabelRecorder, OpCall

NO_AXIS = torch.empty(0, dtype=torch.int64)


CHANNELS = "product of channels with channels"


def record_product(
    recorder: LabelRecorder, macs: float, outputs: Tensor = NO_AXIS, inputs: Tensor = NO_AXIS
) -> None:
    """Count a product: multiply-adds for each position of the two axes."""
    record(recorder, "matmul", macs, inputs, outputs)


def unite_heads(recorder: LabelRecorder, operands: list[Tensor]) -> Tensor:
    """Make each position of axis 0 one unit, over all ``[b, ., .]`` operands; return ``[b]``."""
    firsts = []
    for labels in operands:
        compact = narrow_constant(labels)
        first = compact.narrow(1, 0, 1).narrow(2, 0, 1)
        recorder.store.unite(compact, first)
        firsts.append(first.expand(labels.shape[0], 1, 1).reshape(-1))
    heads = firsts[0]
    for other in firsts[1:]:
        heads = recorder.store.joined(heads, other)
    recorder.recording.heads.append(heads)
    return heads


def collapsed(recorder: LabelRecorder, labels: Tensor) -> Tensor:
    """Tie axis 0 position by position: all heads lose the same part of their width."""
    first = labels.narrow(0, 0, 1)
    if 0 in varying_axes(labels):
        recorder.store.unite(labels, first)
    return first.expand(labels.shape)


def activation_product(recorder: LabelRecorder, call: OpCall) -> None:
    """A product of two activations, ``[b, n, k] x [b, k, m]`` or without the batch axis."""
    tensors = call.tensors()[-2:]
    left, right = (recorder.labels_of(tensor) for tensor in tensors)
    if recorder.is_constant(left) and recorder.is_constant(right):
        _constant_product(recorder, call, left, right)
        return
    if left.ndim == 2:
        left, right = left.unsqueeze(0), right.unsqueeze(0)
    if recorder.by_width:
        left, right = (collapsed(recorder, labels) for labels in (left, right))
    (batch, rows, inner), columns = left.shape, right.shape[2]
    left_axes, right_axes = varying_axes(left), varying_axes(right)
    if left_axes == [1, 2] and not set(right_axes) - {1}:
        left_axes, right_axes = _tie_summands(recorder, call, left, 2, right), []
    elif right_axes == [1, 2] and not set(left_axes) - {2}:
        left_axes, right_axes = [], _tie_summands(recorder, call, right, 1, left)
    if 0 in left_axes or 0 in right_axes:
        labels: Tensor | None = _batched(recorder, call, left, right)
    elif len(left_axes) > 1 or len(right_axes) > 1:
        recorder.freeze_all(call, CHANNELS)
        record_product(recorder, batch * rows * inner * columns)
        return
    else:
        if 1 in left_axes and 2 in right_axes:  # one side's channels can be told
            side = left if rows < columns else right
            recorder.store.freeze(side, recorder.cause(call, CHANNELS))
            left_axes, right_axes = ([], right_axes) if side is left else (left_axes, [])
        labels = _plain(recorder, call, left, right, left_axes, right_axes)
    if labels is None:
        recorder.set_unlabelled(call, "reduced over channels")
    else:
        recorder.set_labels(call.out, labels.expand(batch, rows, columns).view(call.out.shape))


def _tie_summands(
    recorder: LabelRecorder, call: OpCall, summands: Tensor, axis: int, weights: Tensor
) -> list[int]:
    """Tie the channels of what is summed with weights, as experts by a gate; return their axis.

    Each summand has channels of its own, along the other axis. The weights stay whole.
    """
    recorder.store.unite(summands, summands.narrow(axis, 0, 1))
    recorder.store.freeze(weights, recorder.cause(call, CHANNELS))
    return [3 - axis]


def _constant_product(recorder: LabelRecorder, call: OpCall, left: Tensor, right: Tensor) -> None:
    """What buffers and constants give (rotary angles, resampling) is a constant too."""
    cause = recorder.cause(call, "buffer of a computed constant")
    for labels in (left, right):
        recorder.store.freeze(labels, cause)
    recorder.set_labels(call.out, neutral(call.out.shape))
    tensors = call.tensors()[-2:]
    record_product(recorder, prod(tensors[0].shape) * tensors[1].shape[-1])


def _batched(recorder: LabelRecorder, call: OpCall, left: Tensor, right: Tensor) -> Tensor:
    """A product for each head: all that enters a head is one unit, and so is what leaves it."""
    operands = [left, right]
    if call.name == "baddbmm":
        bias = recorder.labels_of(call.args[0]).expand(call.out.shape)
        if 0 in varying_axes(bias):
            operands.append(bias)
    heads = unite_heads(recorder, operands)
    record_product(recorder, left.shape[1] * left.shape[2] * right.shape[2], heads)
    return along(heads, 0, (len(heads), 1, 1))


def _plain(
    recorder: LabelRecorder,
    call: OpCall,
    left: Tensor,
    right: Tensor,
    left_axes: list[int],
    right_axes: list[int],
) -> Tensor | None:
    """A product with no heads: channels lie along the rows, the columns or the sum."""
    (batch, rows, inner), columns = left.shape, right.shape[2]
    inputs = outputs = NO_AXIS
    macs = batch
    if 2 in left_axes or 1 in right_axes:
        summed, others = left[0, 0, :], right[0, :, 0]
        if left_axes == [1]:  # its channels lie along the rows alone: those of the sum stay
            summed = others
        elif right_axes == [2]:
            others = summed
        if summed is others:
            recorder.store.freeze(summed, recorder.cause(call, CHANNELS))
        inputs = recorder.store.joined(summed, others)
    else:
        macs *= inner
    labels = None
    if 1 in left_axes:
        outputs = left[0, :, 0]
        labels = along(outputs, 1, (1, rows, 1))
        macs *= columns
    elif 2 in right_axes:
        outputs = right[0, 0, :]
        labels = along(outputs, 2, (1, 1, columns))
        macs *= rows
    else:
        macs *= rows * columns
    record_product(recorder, macs, outputs, inputs)
    return labels
