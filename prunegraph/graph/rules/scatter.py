"""What writes at places that are computed: messages added up by node, outputs of experts."""

from torch import Tensor

from prunegraph.graph.rules.shared.combine import combine
from prunegraph.graph.rules.shared.indexing import indexed_axes
from prunegraph.graph.trace.labels import is_neutral, varying_axes
from prunegraph.graph.trace.recorder import LabelRecorder, OpCall

COMPUTED = "written at places that are computed"


def scatter(recorder: LabelRecorder, call: OpCall) -> None:
    """``target.index_add(axis, places, source)`` and the like: channels lie along other axes.

    ``scatter`` has a place for each number; they are the same for all channels.
    """
    target, axis, places, source = call.args[:4]
    axis %= max(target.ndim, 1)
    sides = [side for side in (source, places) if isinstance(side, Tensor)]
    labels = [recorder.labels_of(side) for side in sides if side.ndim == target.ndim]
    labels = [recorder.labels_of(target), *(own for own in labels if varying_axes(own))]
    if any(axis in varying_axes(own) for own in labels):
        recorder.freeze_all(call, COMPUTED)
        return
    united = labels[0].narrow(axis, 0, 1)
    for own in labels[1:]:
        united = combine(recorder, call, united, own.narrow(axis, 0, 1))
    _write(recorder, call, united)


def put(recorder: LabelRecorder, call: OpCall) -> None:
    """``x[places] = values``: channels lie along axes that no place picks, or a mask is as x."""
    target, indices, values = call.args[:3]
    labels, written = recorder.labels_of(target), recorder.labels_of(values)
    first = indices[0]
    if not values.numel():  # no sample was sent to an expert
        recorder.set_labels(call.out, labels)
        return
    if len(indices) == 1 and first.shape == target.shape and not varying_axes(written):
        _write(recorder, call, combine(recorder, call, labels, recorder.labels_of(first)))
        return
    axes = indexed_axes(indices)
    own = values.ndim - (target.ndim - len(axes))  # axes of ``values`` that run over the places
    at_front = axes == list(range(len(axes)))
    picked = set(axes) & set(varying_axes(labels)) or any(a < own for a in varying_axes(written))
    if picked or not at_front:
        recorder.freeze_all(call, COMPUTED)
        return
    for _ in range(own):
        written = written[0]
    for axis in axes:
        labels = labels.narrow(axis, 0, 1)
    _write(recorder, call, combine(recorder, call, labels, written))


def masked_scatter(recorder: LabelRecorder, call: OpCall) -> None:
    """``words.masked_scatter(places, images)``: whole rows, one after the other, as of images."""
    target, mask, source = call.args[:3]
    labels, written = recorder.labels_of(target), recorder.labels_of(source)
    in_rows = (
        target.ndim > 1
        and source.shape[-1:] == target.shape[-1:]
        and bool((mask == mask[..., :1]).all())
    )
    across = {axis - own.ndim for own in (labels, written) for axis in varying_axes(own)}
    if not in_rows or across - {-1}:
        recorder.freeze_all(call, COMPUTED)
        return
    channels = [recorder.channel_labels(own, -1) for own in (labels, written)]
    _write(recorder, call, combine(recorder, call, *channels))


def _write(recorder: LabelRecorder, call: OpCall, labels: Tensor) -> None:
    """Label what was written to; a view of a constant cannot be followed back to it."""
    target = call.args[0]
    if call.out is target and target._base is not None and is_neutral(recorder.labels_of(target)):
        recorder.freeze_inputs(call, "written in place into a view of a constant")
        return
    recorder.set_labels(call.out, labels.expand(call.out.shape))
