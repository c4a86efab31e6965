"""What products of activations do to labels: attention, pruned by whole heads, or by their width.

The batch axis of a product runs over samples and heads. By heads, a head's queries, keys and values
leave together, so that the heads that stay compute what they did: the same width, the same scale.
By width, all heads stay and lose the same part of their queries and keys, and of their values.
"""

import itertools
import operator
from math import prod

import torch
from torch import Tensor

from prunegraph.graph.rules.constants import tie_beside
from prunegraph.graph.rules.copied_heads import keep_shared
from prunegraph.graph.trace.labels import NEUTRAL, along, narrow_constant, neutral, varying_axes
from prunegraph.graph.trace.recorder import LabelRecorder, OpCall, Rule
from prunegraph.graph.trace.recording import RecordedOp

NO_AXIS = torch.empty(0, dtype=torch.int64)

CHANNELS = "product of channels with channels"

SCALE = "the width of a head sets the scale of its scores"


def where_rows_are(rule: Rule) -> Rule:
    """Return a product's rule that passes by where there are no rows, as sent to an expert.

    The layer is then as unused as one that is not called, and what is known of others of its kind
    holds for it.
    """

    def passing_by(recorder: LabelRecorder, call: OpCall) -> None:
        empty = [tensor for tensor in call.tensors() if not tensor.numel()]
        if call.out.numel() or all(recorder.sources.of(tensor) for tensor in empty):
            rule(recorder, call)
        else:
            recorder.set_labels(call.out, neutral(call.out.shape))

    return passing_by


def record_product(
    recorder: LabelRecorder, macs: float, outputs: Tensor = NO_AXIS, inputs: Tensor = NO_AXIS
) -> None:
    """Count a product: multiply-adds for each position of the two axes."""
    recorder.recording.ops.append(
        RecordedOp(
            module=recorder.modules.current,
            kind="matmul",
            in_labels=inputs,
            out_labels=outputs,
            macs_coefficient=float(macs),
            param=None,
        )
    )


def _unite_heads(recorder: LabelRecorder, operands: list[Tensor]) -> Tensor:
    """Make each position of axis 0 one unit, over all ``[b, ., .]`` operands; return ``[b]``."""
    firsts = []
    for labels in operands:
        compact = narrow_constant(labels)
        first = compact.narrow(1, 0, 1).narrow(2, 0, 1)
        recorder.store.unite(compact, first)
        firsts.append(first.expand(labels.shape[0], 1, 1).reshape(-1))
    heads = firsts[0]
    for other in firsts[1:]:
        recorder.store.unite(heads, other)
        heads = torch.where(heads == NEUTRAL, other, heads)
    recorder.recording.heads.append(heads)
    return heads


def _collapsed(recorder: LabelRecorder, labels: Tensor) -> Tensor:
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
        left, right = (_collapsed(recorder, labels) for labels in (left, right))
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
    heads = _unite_heads(recorder, operands)
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
        recorder.store.unite(summed, others)
        inputs = torch.where(summed == NEUTRAL, others, summed)
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


def attention(recorder: LabelRecorder, call: OpCall) -> None:
    """Fused attention, ``[b, heads, n, width]``: counted as two matrix products."""
    query, key, value = call.args[:3]
    labels = [_heads_in_front(recorder.labels_of(tensor)) for tensor in (query, key, value)]
    heads, length = query.shape[-3], key.shape[-2]
    rows = prod(query.shape[:-3]) * query.shape[-2]
    serves_all = [len(each) == 1 < heads for each in labels]
    labels = [each.repeat_interleave(heads // len(each), 0) for each in labels]
    if recorder.by_width:
        labels = [_collapsed(recorder, each) for each in labels]
    if any(0 in varying_axes(each) for each in labels):
        own = [*itertools.compress(labels, map(operator.not_, serves_all))]
        out = _unite_heads(recorder, own + _bias_of_heads(recorder, call, query))
        for shared in itertools.compress(labels, serves_all):
            keep_shared(recorder, call, shared, out)
        record_product(recorder, rows * length * (query.shape[-1] + value.shape[-1]), out)
        spread = along(out, 0, (heads, 1, 1))
        tie_beside(recorder, call.tensors()[3:], spread)
    else:
        spread = _attention_by_width(recorder, call, labels, rows * heads * length)
    first, *rest = call.outputs()
    recorder.set_labels(first, spread.expand(first.shape))
    for tensor in rest:
        lines = torch.tensor(NEUTRAL)
        if tensor.ndim == 3 and 1 < tensor.shape[1] == spread.shape[0]:  # sums, [b, heads, n]
            lines = spread[:, :, :1].reshape(1, -1, 1)
        recorder.set_labels(tensor, lines.expand(tensor.shape))


def _attention_by_width(
    recorder: LabelRecorder, call: OpCall, labels: list[Tensor], scores: int
) -> Tensor:
    """Attention whose heads all stay; return the output's labels ``[1, 1, width]``.

    Values may lose any part of their width; queries and keys only if the scale is kept.
    """
    query, key, value = (recorder.channel_labels(each, 2) for each in labels)
    keeps_scale = call.kwargs.get("scale") is not None or recorder.in_multihead_attention
    if not keeps_scale:
        for each in (query, key):
            recorder.store.freeze(each, recorder.cause(call, SCALE))
    recorder.store.unite(query, key)
    for each, is_output in ((query, False), (value, True)):
        fixed = bool((each == NEUTRAL).any())
        axis = NO_AXIS if fixed else each
        macs = scores * (len(each) if fixed else 1)
        record_product(recorder, macs, *((axis, NO_AXIS) if is_output else (NO_AXIS, axis)))
    return along(value, 2, (1, 1, len(value)))


def _heads_in_front(labels: Tensor) -> Tensor:
    """Return ``[heads, n, width]`` of ``[..., heads, n, width]`` labels: samples are alike."""
    while labels.ndim > 3:
        labels = labels[0]
    return labels


def _bias_of_heads(recorder: LabelRecorder, call: OpCall, query: Tensor) -> list[Tensor]:
    """Return the labels of a mask that has values of its own for each head."""
    masks = [t for t in call.tensors()[3:] if t.is_floating_point()]
    if not masks:
        return []
    shape = (*query.shape[:-1], masks[0].shape[-1])
    bias = _heads_in_front(recorder.labels_of(masks[0]).expand(shape))
    return [bias] if 0 in varying_axes(bias) else []


def sparse_mm(recorder: LabelRecorder, call: OpCall) -> None:
    """A sparse matrix of constants, as a graph's adjacency, times rows of channels."""
    dense = call.args[-1] if call.name == "_sparse_mm" else call.args[2]
    bias = () if call.name == "_sparse_mm" else call.args[:1]
    labels = recorder.labels_of(dense)
    if 0 in varying_axes(labels):
        recorder.freeze_all(call, "a sparse matrix times rows that are channels")
        return
    for tensor in bias:
        recorder.store.unite(labels.narrow(0, 0, 1), recorder.labels_of(tensor))
    recorder.set_labels(call.out, labels.narrow(0, 0, 1).expand(call.out.shape))
