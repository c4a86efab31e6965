"""What pointwise ops do to labels: they pass them on, and unite those of their inputs."""

from torch import Tensor

from prunegraph.graph.rules.shared.combine import combine
from prunegraph.graph.rules.shared.constants import constant, tie_beside
from prunegraph.graph.rules.shared.indexing import write_slices
from prunegraph.graph.trace.labels import is_neutral, neutral, varying_axes
from prunegraph.graph.trace.recorder import LabelRecorder, OpCall


def _unexpanded(recorder: LabelRecorder, tensor: Tensor) -> Tensor:
    """Return a tensor's labels of size 1 where it was expanded, as if it were broadcast instead."""
    labels = recorder.labels_of(tensor)
    strides = zip(tensor.stride(), labels.stride(), strict=True)
    for axis, (stride, label_stride) in enumerate(strides):
        if stride == label_stride == 0 and tensor.shape[axis] > 1:
            labels = labels.narrow(axis, 0, 1)
    return labels


def pointwise(recorder: LabelRecorder, call: OpCall) -> None:
    """Unite all inputs, broadcast; the outputs carry the result."""
    inputs = [t for t in call.tensors() if t.numel() > 1 or t.ndim > 0]
    labels = _unexpanded(recorder, inputs[0]) if inputs else neutral(())
    for tensor in inputs[1:]:
        labels = combine(recorder, call, labels, _unexpanded(recorder, tensor))
    tie_beside(recorder, inputs, labels)
    for tensor in call.outputs():
        recorder.set_labels(tensor, labels.expand(tensor.shape))


def scale(recorder: LabelRecorder, call: OpCall) -> None:
    """A stored weight times a number is that weight still; all else is pointwise."""
    wide = [tensor for tensor in call.tensors() if tensor.numel() > 1]
    stored = recorder.weight_view(wide[0]) if len(wide) == 1 else None
    if stored is not None and wide[0].shape == call.out.shape:
        recorder.set_weight_view(call.out, stored)
    else:
        pointwise(recorder, call)


def divided(recorder: LabelRecorder, call: OpCall) -> None:
    """A quotient, or another function without a value at zero, of what is stored perhaps."""
    divisor = call.args[1 if call.name == "div" else 0]
    if isinstance(divisor, Tensor) and varying_axes(recorder.labels_of(divisor)):
        recorder.recording.divisors |= recorder.sources.of(divisor)
    (scale if call.name == "div" else pointwise)(recorder, call)


def pointwise_inplace(recorder: LabelRecorder, call: OpCall) -> None:
    """Unite all inputs; a constant target takes the labels of what is written into it.

    What is written into slices of a constant labels their part of it; any other view of a constant
    cannot be followed back to it, so what enters it is frozen.
    """
    target: Tensor = call.args[0]
    sources = [t for t in call.tensors()[1:] if t.numel() > 1]
    if call.name == "copy_" and write_slices(recorder, call):
        return
    labels = recorder.labels_of(target)
    if is_neutral(labels) and target._base is not None and sources:
        recorder.freeze_inputs(call, "written in place into a view of a constant")
        return
    for tensor in sources:
        labels = combine(recorder, call, labels, recorder.labels_of(tensor))
    recorder.set_labels(target, labels.expand(target.shape))


def zeros(recorder: LabelRecorder, call: OpCall) -> None:
    """``zeros_like`` of an activation is as wide as that, whatever is written into it."""
    source = call.args[0]
    if recorder.is_stored(source):
        constant(recorder, call)
    else:
        recorder.set_labels(call.out, recorder.labels_of(source).expand(call.out.shape))
