"""Weights that layers read, by name and axis."""

from typing import Any

from torch import Tensor

from prunegraph.graph.trace.recorder import LabelRecorder
from prunegraph.graph.trace.recording import RecordedOp


def tie_parameter(recorder: LabelRecorder, tensor: Tensor | None, channels: Tensor) -> None:
    """Unite a 1-D parameter (or buffer) with the channels."""
    if tensor is None:
        return
    labels = recorder.axis_labels(tensor, 0)
    recorder.store.unite(recorder.labels_of(tensor) if labels is None else labels, channels)


def record(
    recorder: LabelRecorder,
    kind: str,
    macs: float,
    in_labels: Tensor,
    out_labels: Tensor,
    weight: Tensor | None = None,
    out_position: int = 0,
    **sizes: Any,
) -> None:
    """Count an operation: multiply-adds for each position of its two axes.

    Args:
        recorder: of the forward.
        kind: as in ``OpNode``.
        macs: multiply-adds for a pair of positions.
        in_labels: of the axis that it reads.
        out_labels: of the axis that it writes.
        weight: a view of a stored weight, or None.
        out_position: the axis of this view along which the outputs lie.
        sizes: other fields of ``RecordedOp``.
    """
    view = None if weight is None else recorder.weight_view(weight)
    axis = None if view is None else view.axes[out_position]
    recorder.recording.ops.append(
        RecordedOp(
            module=recorder.modules.current,
            kind=kind,
            in_labels=in_labels,
            out_labels=out_labels,
            macs_coefficient=float(macs),
            param=None if view is None else view.name,
            out_axis=axis if isinstance(axis, int) else out_position,
            computed=view is not None and view.computed,
            **sizes,
        )
    )


def record_linear(
    recorder: LabelRecorder,
    weight: Tensor,
    in_labels: Tensor,
    out_labels: Tensor,
    rows: int,
    out_position: int = 0,
) -> None:
    """Count a product of ``rows`` rows with a weight, whose outputs lie along ``out_position``."""
    record(recorder, "linear", rows, in_labels, out_labels, weight, out_position, spatial=rows)
