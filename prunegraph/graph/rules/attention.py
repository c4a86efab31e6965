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

from prunegraph.graph.rules.shared.constants import tie_beside
from prunegraph.graph.rules.shared.copied_heads import keep_shared
from prunegraph.graph.rules.shared.products import NO_AXIS, collapsed, record_product, unite_heads
from prunegraph.graph.trace.labels import NEUTRAL, along, neutral, varying_axes
from prunegraph.graph.trace.recorder import LabelRecorder, OpCall, Rule

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


def attention(recorder: LabelRecorder, call: OpCall) -> None:
    """Fused attention, ``[b, heads, n, width]``: counted as two matrix products."""
    query, key, value = call.args[:3]
    labels = [_heads_in_front(recorder.labels_of(tensor)) for tensor in (query, key, value)]
    heads, length = query.shape[-3], key.shape[-2]
    rows = prod(query.shape[:-3]) * query.shape[-2]
    serves_all = [len(each) == 1 < heads for each in labels]
    labels = [each.repeat_interleave(heads // len(each), 0) for each in labels]
    if recorder.by_width:
        labels = [collapsed(recorder, each) for each in labels]
    if any(0 in varying_axes(each) for each in labels):
        own = [*itertools.compress(labels, map(operator.not_, serves_all))]
        out = unite_heads(recorder, own + _bias_of_heads(recorder, call, query))
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
    *bias, _, dense = call.args
    labels = recorder.labels_of(dense)
    if 0 in varying_axes(labels):
        recorder.freeze_all(call, "a sparse matrix times rows that are channels")
        return
    for tensor in bias:
        recorder.store.unite(labels.narrow(0, 0, 1), recorder.labels_of(tensor))
    recorder.set_labels(call.out, labels.narrow(0, 0, 1).expand(call.out.shape))
