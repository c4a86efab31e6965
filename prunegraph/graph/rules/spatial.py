"""What pooling, resampling and reading at places in space do to labels."""

from dataclasses import replace

from prunegraph.graph.rules.layers import convolution
from prunegraph.graph.trace.labels import along, is_neutral, varying_axes
from prunegraph.graph.trace.recorder import LabelRecorder, OpCall

WINDOWED = {
    *("avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("max_pool2d", "max_pool2d_with_indices", "max_pool3d_with_indices"),
}
"""Pooling by ``kernel_size, stride, padding``."""


def spatial(recorder: LabelRecorder, call: OpCall) -> None:
    """Pooling and resampling: channels (axis -3 or before) pass, spatial positions are united."""
    spatial_rank = call.name.count("1d") + 2 * call.name.count("2d") + 3 * call.name.count("3d")
    _resample(recorder, call, call.args[0].ndim - spatial_rank)


def unpool(recorder: LabelRecorder, call: OpCall) -> None:
    """Put values where a pooling found its maxima, which has as many channels."""
    values, places = (recorder.labels_of(tensor) for tensor in call.args[:2])
    axis = values.ndim - 2 - call.name.count("3d") - 1
    recorder.store.unite(
        recorder.channel_labels(values, axis), recorder.channel_labels(places, axis)
    )
    spatial(recorder, call)


def grid_sample(recorder: LabelRecorder, call: OpCall) -> None:
    """Read at places ``[B, h, w, 2]`` that are the same for all channels, and stay whole."""
    _keep_places(recorder, call, 1)
    _resample(recorder, call, 2)


def regions(recorder: LabelRecorder, call: OpCall) -> None:
    """Read boxes ``[K, 5]``, the same for all channels, out of images ``[B, C, H, W]``."""
    _keep_places(recorder, call, 1)
    channels = recorder.channel_labels(recorder.labels_of(call.args[0]), 1)
    for tensor in call.outputs():
        recorder.set_labels(tensor, along(channels, 1, tensor.shape))


def deformable_convolution(recorder: LabelRecorder, call: OpCall) -> None:
    """A convolution that reads at offset places, which parts of its input channels may differ in.

    Offsets ``[B, parts * 2 * kernel, H, W]``, and what modulates them, stay whole.
    """
    source, weight, _, _, bias, *steps = call.args
    groups, parts = steps[6:8]
    _keep_places(recorder, call, 2)
    _keep_places(recorder, call, 3)
    if parts > 1:  # each keeps as many channels as the others
        channels = recorder.channel_labels(recorder.labels_of(source), 1).view(parts, -1)
        recorder.store.unite(channels, channels[:1])
    plain = (source, weight, bias, steps[0:2], steps[2:4], steps[4:6], False, [0, 0], groups)
    convolution(recorder, replace(call, name="convolution", args=plain))


def _keep_places(recorder: LabelRecorder, call: OpCall, position: int) -> None:
    """Keep an argument whole that says where in space to read."""
    places = recorder.labels_of(call.args[position])
    if not is_neutral(places):
        recorder.store.freeze(places, recorder.cause(call, "places in space"))


def _resample(recorder: LabelRecorder, call: OpCall, first: int) -> None:
    """Pass channels on, and unite the positions along the axes from ``first`` on.

    Those of a parameter, as a table of position embeddings that is resized, differ until then.
    """
    labels = recorder.labels_of(call.args[0])
    varying = varying_axes(labels)
    axes = range(first, labels.ndim)
    if varying and varying[0] >= first:  # channels lie along an axis that may stay as it is
        moved = [axis for axis in axes if not _keeps(call, axis, first)]
    else:
        moved = [*axes]
    for axis in filter(lambda axis: axis in moved, varying):
        if varying[0] == axis:
            recorder.freeze_inputs(call, "channels lie along a spatial axis")
            break
        recorder.store.unite(labels, labels.narrow(axis, 0, 1))
    for axis in moved:
        labels = labels.narrow(axis, 0, 1)
    for tensor in call.outputs():
        recorder.set_labels(tensor, labels.expand(tensor.shape))


def _keeps(call: OpCall, axis: int, first: int) -> bool:
    """Return whether an axis stays as it is: of as many positions, made of one each."""
    if call.name not in WINDOWED:
        resizes = "upsample" in call.name or "adaptive" in call.name
        return resizes and call.outputs()[0].shape[axis] == call.args[0].shape[axis]
    kernel, stride, padding = [*call.args[1:4], [], []][:3]
    sizes = (kernel, stride or kernel, padding or [0])
    return [own[(axis - first) % len(own)] for own in sizes] == [1, 1, 0]


def transform(recorder: LabelRecorder, call: OpCall) -> None:
    """A Fourier transform over axes without channels."""
    labels = recorder.labels_of(call.args[0])
    axes = {axis % labels.ndim for axis in call.args[1]}
    if axes & set(varying_axes(labels)):
        recorder.freeze_all(call, "a Fourier transform over channels")
        return
    for axis in axes:
        labels = labels.narrow(axis, 0, 1)
    recorder.set_labels(call.out, labels.expand(call.out.shape))
