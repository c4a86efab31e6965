"""What pooling, resampling and reading at places in space do to labels."""

from dataclasses import replace
from math import prod

from torch import Tensor

from prunegraph.graph.rules.shared.constants import freeze_if_constant
from prunegraph.graph.rules.shared.products import record_product
from prunegraph.graph.rules.shared.tokens import mix_tokens, mixes_tokens
from prunegraph.graph.rules.shared.weights import record, tie_parameter
from prunegraph.graph.trace.labels import along, is_neutral, varying_axes
from prunegraph.graph.trace.recorder import LabelRecorder, OpCall


def _computed_convolution(recorder: LabelRecorder, call: OpCall) -> None:
    """A weight that is made in the forward: channels pass where each has a kernel of its own."""
    source, weight, bias = call.args[:3]
    blurs = weight.shape[:2] == (source.shape[1], 1) and call.args[8] == source.shape[1]
    kernels = recorder.labels_of(weight)
    own = bool(varying_axes(kernels)) and set(varying_axes(kernels)) <= {0}
    if own and not recorder.is_constant(kernels):
        recorder.recording.computed |= recorder.sources.of(weight)
    if not (blurs and (own or recorder.is_constant(kernels))):
        recorder.recording.computed |= recorder.sources.of(weight)
        recorder.freeze_all(call, "convolution with a computed weight")
        record_product(recorder, _positions(call) * weight.numel())
        return
    channels = recorder.channel_labels(recorder.labels_of(source), 1)
    tie_parameter(recorder, bias, channels)
    if own:  # features of a template, looked for in those of an image
        recorder.store.unite(channels, recorder.channel_labels(kernels, 0))
    recorder.set_labels(call.out, along(channels, 1, call.out.shape))
    if recorder.modules.running_own_code:
        recorder.note_sizes(channels)  # `groups`
    _record(recorder, call, channels[:0], channels, depthwise=True)


def convolution(recorder: LabelRecorder, call: OpCall) -> None:
    """Unite the input's channels with the weight's input axis; the output's are fresh."""
    (source, weight, bias), transposed, groups = call.args[:3], call.args[6], call.args[8]
    if recorder.weight_view(weight) is None:
        _computed_convolution(recorder, call)
        return
    labels = recorder.labels_of(source)
    pointwise = prod(weight.shape[2:]) == 1 and source.shape[2:] == call.out.shape[2:]
    if pointwise and groups == 1 and mixes_tokens(recorder, labels, 1):
        mix_tokens(recorder, call, 1, source, weight, bias)
        return
    channels = recorder.channel_labels(labels, 1)
    depthwise = groups > 1 and weight.shape[1] == 1
    if transposed:
        depthwise &= weight.shape[0] == groups
    in_axis = 0 if transposed else 1
    out_labels = recorder.stored_labels(weight, 1 - in_axis)
    in_labels = recorder.stored_labels(weight, in_axis)
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
    inputs = in_labels[:0] if depthwise else in_labels
    _record(recorder, call, inputs, out_labels, depthwise=depthwise)


def _positions(call: OpCall) -> int:
    """Return at how many positions a convolution reads each tap of its kernel."""
    source: Tensor = call.args[0]
    return source.shape[0] * prod((source if call.args[6] else call.out).shape[2:])


def _record(
    recorder: LabelRecorder, call: OpCall, inputs: Tensor, outputs: Tensor, *, depthwise: bool
) -> None:
    """Count a convolution."""
    weight, stride, transposed, groups = (call.args[place] for place in (1, 3, 6, 8))
    kernel = prod(weight.shape[2:])
    record(
        recorder,
        "conv",
        _positions(call) * kernel,
        inputs,
        outputs,
        weight,
        1 if transposed and not depthwise else 0,
        kernel_size=kernel,
        stride=stride[0],
        groups=groups,
        depthwise=depthwise,
        spatial=prod(call.out.shape[2:]),
    )


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
