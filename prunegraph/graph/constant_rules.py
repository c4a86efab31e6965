"""What becomes of constants that a forward makes from sizes and numbers.

They have no channels of their own. Where a layer reads some as its channels, these stay, unless
they are those that a layer makes later: a recurrent cell of a user's own begins with zeros.
"""

from torch import Tensor

from prunegraph.graph.labels import NEUTRAL, neutral
from prunegraph.graph.recorder import LabelRecorder, OpCall
from prunegraph.graph.recording import RecordedConstant
from prunegraph.graph.structure import FrozenOp

ONE_ALONE = "a channel of constants, or one alone"


def constant(recorder: LabelRecorder, call: OpCall) -> None:
    """A tensor made from sizes and numbers: neutral."""
    maker = recorder.modules.caller()
    for tensor in call.outputs():
        recorder.set_labels(tensor, neutral(tensor.shape))
        for size in tensor.shape if maker is not None else ():
            recorder.recording.makers.setdefault(size, set()).add(str(maker))


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
    readers = set(recorder.recording.makers.get(labels.numel(), ()))
    caller = recorder.modules.caller()
    if caller is not None:
        readers.add(caller)
    read = RecordedConstant(labels=labels, cause=cause, readers=readers)
    recorder.recording.constants.append(read)
