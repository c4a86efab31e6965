"""What becomes of constants that a forward makes from sizes and numbers.

They have no channels of their own. Where a layer reads some as its channels, these stay, unless
they are those that a layer makes later: a recurrent cell of a user's own begins with zeros.
"""

from collections.abc import Sequence

from torch import Tensor

from prunegraph.graph.graph import FrozenOp
from prunegraph.graph.trace.labels import NEUTRAL, is_neutral, narrow_alike, neutral, varying_axes
from prunegraph.graph.trace.recorder import LabelRecorder, OpCall
from prunegraph.graph.trace.recording import RecordedConstant, SizeUse

ONE_ALONE = "a channel of constants, or one alone"


FILLED = frozenset({"zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "rand", "randn"})
"""Ops that make what a state begins with, or noise, channel for channel."""


def constant(recorder: LabelRecorder, call: OpCall) -> None:
    """A tensor made from sizes and numbers: neutral."""
    own = call.name in FILLED and recorder.modules.running_own_code  # torch's set theirs themselves
    makers = _running(recorder) if own else set()
    for tensor in call.outputs():
        recorder.set_labels(tensor, neutral(tensor.shape))
        if own:
            recorder.recording.beside[tensor] = {}
        for size in tensor.shape if makers else ():
            recorder.recording.makers.setdefault(size, set()).update(makers)


def tie_beside(recorder: LabelRecorder, tensors: Sequence[Tensor], labels: Tensor) -> None:
    """Tie channels to those that the same constant met before: it has one width.

    As the heads of several layers that add one bias of zeros.

    Args:
        recorder: of the forward.
        tensors: what was combined, constants or not.
        labels: of the result.
    """
    for tensor in tensors:
        met: dict[int, Tensor] | None = recorder.recording.beside.get(tensor)
        if met is None or not is_neutral(recorder.labels_of(tensor)):
            continue
        for axis in varying_axes(labels):
            place = axis - labels.ndim
            if -place <= tensor.ndim and tensor.shape[place] > 1:
                channels = labels.movedim(axis, -1)[(0,) * (labels.ndim - 1)]
                recorder.store.unite(met.setdefault(place, channels), channels)


def freeze_if_constant(
    recorder: LabelRecorder, call: OpCall, channels: Tensor, in_labels: Tensor
) -> None:
    """Keep the columns of a layer that reads a constant, and the one channel that a layer reads."""
    if in_labels.numel() == channels.numel() == 1:
        recorder.store.freeze(channels, recorder.cause(call, ONE_ALONE))
    elif in_labels.numel() > 1 and bool((channels == NEUTRAL).all()):
        note_constant(recorder, in_labels, recorder.cause(call, "reads a constant"))


def note_constant(recorder: LabelRecorder, labels: Tensor, cause: FrozenOp) -> None:
    """Keep constants that are read as channels ``[size]``, unless a layer makes these later."""
    makers = recorder.recording.makers.get(labels.numel(), set())
    readers = makers | _running(recorder)
    read = RecordedConstant(labels=labels, cause=cause, readers=readers)
    recorder.recording.constants.append(read)


def note_filled(recorder: LabelRecorder, constant: Tensor, labels: Tensor) -> None:
    """Note that constants stand beside channels: an attribute may say how many."""
    compact = narrow_alike(labels)
    for axis, size in enumerate(compact.shape):
        place = axis - labels.ndim
        if size > 1 and -place <= constant.ndim and constant.shape[place] == size:
            recorder.recording.filled += [
                SizeUse(module=path, labels=compact, axis=axis, by_name=True)
                for path in sorted(recorder.recording.makers.get(size, ()))
            ]


def _running(recorder: LabelRecorder) -> set[str]:
    """Return the path of the module whose code runs, and those of the modules that it is in."""
    path = recorder.modules.caller() or recorder.modules.current
    parts = path.split(".") if path else []
    return {".".join(parts[:end]) for end in range(len(parts) + 1)}
