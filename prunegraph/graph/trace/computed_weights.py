"""Weights that a forward computes from stored ones before a layer uses them.

Standardised weights (Qiao et al. 2019, "Micro-Batch Training with Batch-Channel Normalization and
Weight Standardization"), normalised, masked, rounded and scaled ones: what is computed has the
stored weight's own axes, so it is pruned as that is, and means over its inputs see the kept ones.

A forward is recorded as if no weight were so. A product with a tensor that was made of parameters
and buffers alone tells which they are; then the forward is recorded once more, by these rules.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from prunegraph.graph.rules.shared.weights import tie_parameter
from prunegraph.graph.rules.table import OVER_KEPT, RULES, is_sum, reduced_axes, reduction
from prunegraph.graph.trace.labels import along, is_neutral
from prunegraph.graph.trace.recorder import LabelRecorder, OpCall, Rule, unknown_op
from prunegraph.graph.trace.weight_views import WeightView

DRAWN = frozenset({"randn_like", "rand_like", "normal_", "uniform_", "bernoulli_"})
"""Noise as large as a weight, or in its place: it is one itself."""


def rules_for(names: Collection[str]) -> Mapping[str, Rule]:
    """Return rules by which tensors made of these parameters and buffers are weights still."""

    def follow(rule: Rule) -> Rule:
        def either(recorder: LabelRecorder, call: OpCall) -> None:
            if not (_on_weights(recorder, call, names) and _follow(recorder, call)):
                rule(recorder, call)

        return either

    return {name: follow(rule) for name, rule in (RULES | _OWN_RULES).items()}


def _on_weights(recorder: LabelRecorder, call: OpCall, names: Collection[str]) -> bool:
    """Return whether an op has such weights, and no activations."""
    found = False
    for tensor in call.tensors():
        view = recorder.weight_view(tensor)
        if view is None and not is_neutral(recorder.labels_of(tensor)):
            return False
        found |= view is not None and view.name in names
    return found


def _follow(recorder: LabelRecorder, call: OpCall) -> bool:
    """Say what an op on weights gives; return whether that is known."""
    if torch.Tag.pointwise in call.func.tags or call.name in DRAWN:
        return _pointwise(recorder, call)
    if RULES.get(call.name) is reduction:
        return _reduced(recorder, call)
    known = _OWN.get(call.name)
    return known is not None and known(recorder, call)


def _computed(recorder: LabelRecorder, tensor: Tensor, view: WeightView) -> bool:
    recorder.set_weight_view(tensor, replace(view, computed=True))
    return True


def _pointwise(recorder: LabelRecorder, call: OpCall) -> bool:
    """One weight with numbers for each of its inputs or outputs, or with a mask of its own size."""
    operands = [tensor for tensor in call.tensors() if tensor.numel() > 1]
    whole = [t for t in operands if recorder.weight_view(t) and t.shape == call.out.shape]
    if not whole:
        return False
    first = whole[0]
    for other in operands:
        if other is first or recorder.weight_view(other) is None:
            continue
        for axis in range(-min(first.ndim, other.ndim), 0):
            left, right = recorder.channels(first, axis), recorder.channels(other, axis)
            if left is not None and right is not None:
                recorder.store.unite(left, right)
            elif right is not None:
                recorder.store.freeze(right, recorder.cause(call, "lies along a kernel"))
    view = recorder.weight_view(first)
    assert view is not None
    return _computed(recorder, call.out, view)


def _reduced(recorder: LabelRecorder, call: OpCall) -> bool:
    """Means and the like see the kept inputs alone; a sum has nothing of the others."""
    source = call.args[0]
    view = recorder.weight_view(source)
    if view is None or (call.name not in OVER_KEPT and not is_sum(call)):
        return False
    axes = reduced_axes(call, source.ndim)
    for axis in axes if call.name in OVER_KEPT else ():
        channels = recorder.channels(source, axis)
        if channels is not None:
            recorder.note_mean(channels, axis - source.ndim)
    outputs = call.outputs()
    places = [None if axis in axes else axis for axis in range(source.ndim)]
    if outputs[0].ndim < source.ndim:
        places = [place for place in places if place is not None]
    for tensor in outputs:
        _computed(recorder, tensor, view.arranged(places))
    return True


def _batch_norm(recorder: LabelRecorder, call: OpCall) -> bool:
    """``F.batch_norm`` of ``weight.view(1, outputs, -1)`` in training mode standardises it."""
    source = call.args[0]
    view, channels = recorder.weight_view(source), recorder.channels(source, 1)
    if view is None or channels is None or not call.args[5]:
        return False
    for tensor in call.args[1:3]:
        tie_parameter(recorder, tensor, channels)
    for axis in (0, *range(2, source.ndim)):
        others = recorder.channels(source, axis)
        if others is not None:
            recorder.note_mean(others, axis - source.ndim)
    normed, *statistics = call.outputs()
    for tensor in statistics:
        recorder.set_labels(tensor, channels)
    return _computed(recorder, normed, view)


def _weight_norm(recorder: LabelRecorder, call: OpCall) -> bool:
    """``torch.nn.utils.parametrizations.weight_norm``: a length for each position of one axis."""
    direction, length, axis = (*call.args, 0)[:3]
    view = recorder.weight_view(direction)
    sides = [recorder.axis_labels(tensor, axis) for tensor in (direction, length)]
    if view is None or sides[0] is None or sides[1] is None:
        return False
    recorder.store.unite(sides[0], sides[1])
    weight, norms = call.outputs()
    recorder.set_labels(norms, along(sides[0], axis, norms.shape))
    return _computed(recorder, weight, view)


def _viewed(recorder: LabelRecorder, call: OpCall) -> bool:
    """Axes may be merged and divided again."""
    view = recorder.weight_view(call.args[0])
    shaped = None if view is None else view.merged(call.args[0].shape, call.out.shape)
    if shaped is None:
        return False
    recorder.set_weight_view(call.out, shaped)
    for axis in range(call.out.ndim):
        channels = recorder.channels(call.out, axis)
        if channels is not None:
            recorder.note_sizes(along(channels, axis, call.out.shape))
    return True


def _same(recorder: LabelRecorder, call: OpCall) -> bool:
    """A copy, or one that is repeated along axes of size 1."""
    view = recorder.weight_view(call.args[0])
    if view is None or call.out.ndim != call.args[0].ndim:
        return False
    recorder.set_weight_view(call.out, view)
    return True


_OWN: dict[str, Callable[[LabelRecorder, OpCall], bool]] = {
    "native_batch_norm": _batch_norm,
    "_weight_norm_interface": _weight_norm,
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _viewed),
    **dict.fromkeys(("clone", "contiguous", "_to_copy", "detach", "alias", "expand"), _same),
}
_OWN_RULES: dict[str, Rule] = {"_weight_norm_interface": unknown_op}
