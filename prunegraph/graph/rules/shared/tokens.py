"""Layers along the tokens of a sequence: MLP-mixers and their like."""

from math import prod

from torch import Tensor

from prunegraph.graph.rules.shared.products import record_product
from prunegraph.graph.trace.labels import varying_axes
from prunegraph.graph.trace.recorder import LabelRecorder, OpCall


def mixes_tokens(recorder: LabelRecorder, labels: Tensor, axis: int) -> bool:
    """Return whether channels lie along other axes than the one that a layer mixes or scales.

    What was made of a stored table alone has none yet: it may vary along tokens.
    """
    varying = varying_axes(labels)
    if labels.shape[axis] == 1 or not varying or axis % labels.ndim in varying:
        return False
    return not recorder.is_raw(labels)


def keep_tokens(recorder: LabelRecorder, call: OpCall, *parameters: Tensor | None) -> None:
    """Keep parameters whole that lie along tokens."""
    for tensor in (each for each in parameters if each is not None):
        for axis in range(tensor.ndim):
            labels = recorder.channels(tensor, axis)
            if labels is not None:
                recorder.store.freeze(labels, recorder.cause(call, "lies along tokens"))


def mix_tokens(
    recorder: LabelRecorder,
    call: OpCall,
    axis: int,
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> None:
    """A layer over tokens (MLP-Mixer's): what it makes of a channel is of that channel alone.

    Its weight stays whole, and is used for each channel that is left.
    """
    labels = recorder.labels_of(source).narrow(axis, 0, 1)
    keep_tokens(recorder, call, weight, bias)
    recorder.set_labels(call.out, labels.expand(call.out.shape))
    matrix = weight.shape[:2] if call.name == "convolution" else weight.shape[-2:]
    record_product(recorder, prod(matrix), labels.reshape(-1))
