"""Heads that a forward puts along the batch: ``torch.cat(q.split(width, -1), 0)``."""

import torch
from torch import Tensor

from prunegraph.graph.trace.labels import labelled, narrow_alike
from prunegraph.graph.trace.recorder import LabelRecorder
from prunegraph.graph.trace.recording import RecordedParts


def note_parts(recorder: LabelRecorder, parts: list[Tensor], *, sliced: bool = False) -> None:
    """Note equal parts of an axis: they are tied position by position, unless they are heads."""
    noted = RecordedParts(parts=[*map(narrow_alike, parts)], sliced=sliced)
    recorder.recording.parts_of_axes.append(noted)


def joined_along_batch(recorder: LabelRecorder, parts: list[Tensor], axis: int) -> Tensor | None:
    """Return the labels of all parts of an axis, joined along the batch; None if it knows none."""
    alike = [narrow_alike(part) for part in parts]
    for each in recorder.recording.parts_of_axes:
        same = len(each.parts) == len(alike) and all(map(torch.equal, each.parts, alike))
        if same and all(part.shape[0] == 1 for part in alike):
            each.batched = True
            recorder.note_sizes(torch.stack(alike))  # as a view of heads and their width
            pairs = zip(alike, parts, strict=True)
            return torch.cat([one.expand(len(part), *one.shape[1:]) for one, part in pairs], axis)
    return None


def joined_heads(recorder: LabelRecorder, parts: list[Tensor], axis: int) -> Tensor | None:
    """Return the labels of heads that lay along the batch, joined along another axis.

    None if the parts are others: each has one label, that of a head.
    """
    known = _along_batch(recorder)
    if known is None:
        return None
    alike = [narrow_alike(part) for part in parts]
    if any(part.numel() > 1 for part in alike):
        return None
    heads = torch.stack([part.reshape(-1)[0] for part in alike])
    if len(heads.unique()) < len(heads) or not bool(torch.isin(heads, known).all()):
        return None
    return torch.cat([one.expand(part.shape) for one, part in zip(alike, parts, strict=True)], axis)


def is_batched(recorder: LabelRecorder, labels: Tensor) -> bool:
    """Return whether heads lie along axis 0 of these labels."""
    known = _along_batch(recorder)
    return known is not None and bool(torch.isin(narrow_alike(labels), known).all())


def _along_batch(recorder: LabelRecorder) -> Tensor | None:
    """Return the labels of heads, and of what was put along the batch; None if nothing was."""
    batched = [each for each in recorder.recording.parts_of_axes if each.batched]
    if not batched:
        return None
    parts = [*recorder.recording.heads, *(part for each in batched for part in each.parts)]
    return torch.cat([labelled(part) for part in parts])
