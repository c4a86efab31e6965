"""Weights that layers read, by name and axis."""

from torch import Tensor

from prunegraph.graph.trace.recorder import LabelRecorder
from prunegraph.graph.trace.recording import RecordedOp


def tie_parameter(recorder: LabelRecorder, tensor: Tensor | None, channels: Tensor) -> None:
    """Unite a 1-D parameter (or buffer) with the channels."""
    if tensor is None:
        return
    labels = recorder.axis_labels(tensor, 0)
    recorder.store.unite(recorder.labels_of(tensor) if labels is None else labels, channels)


def weight_name(recorder: LabelRecorder, weight: Tensor) -> str | None:
    """Return the name of the stored weight that a tensor is a view of."""
    stored = recorder.weight_view(weight)
    return None if stored is None else stored.name


def is_computed(recorder: LabelRecorder, weight: Tensor) -> bool:
    """Return whether the forward makes a weight of stored ones."""
    stored = recorder.weight_view(weight)
    return stored is not None and stored.computed


def stored_axis(recorder: LabelRecorder, weight: Tensor, position: int) -> int:
    """Return which axis of the stored weight an axis of its view is."""
    stored = recorder.weight_view(weight)
    axis = None if stored is None else stored.axes[position]
    return axis if isinstance(axis, int) else position


def record_linear(
    recorder: LabelRecorder,
    weight: Tensor,
    in_labels: Tensor,
    out_labels: Tensor,
    rows: int,
    out_position: int = 0,
) -> None:
    """Count a product of ``rows`` rows with a weight, whose outputs lie along ``out_position``."""
    recorder.recording.ops.append(
        RecordedOp(
            module=recorder.modules.current,
            kind="linear",
            in_labels=in_labels,
            out_labels=out_labels,
            macs_coefficient=float(rows),
            param=weight_name(recorder, weight),
            spatial=rows,
            out_axis=stored_axis(recorder, weight, out_position),
            computed=is_computed(recorder, weight),
        )
    )
