"""Tensors that are added or multiplied position by position."""

import torch
from torch import Tensor

from prunegraph.graph.rules.shared.constants import note_filled
from prunegraph.graph.rules.shared.copied_heads import SHARED
from prunegraph.graph.trace.labels import (
    NEUTRAL,
    distinct,
    is_neutral,
    narrow_constant,
    varying_axes,
)
from prunegraph.graph.trace.recorder import LabelRecorder, OpCall
from prunegraph.graph.trace.recording import RecordedShare

ELSEWHERE = "its axis carries no channels"


def _aligned_sizes(labels: Tensor, ndim: int) -> list[int]:
    return [1] * (ndim - labels.ndim) + list(labels.shape)


def combine(recorder: LabelRecorder, call: OpCall, left: Tensor, right: Tensor) -> Tensor:
    """Return the labels of a broadcast binary op, uniting what belongs together.

    A side of size 1 along all axes on which the other varies (a gate of one channel, a spatial
    map) says nothing about the other's channels, nor about constants that are wider.
    """
    for one, other in ((left, right), (right, left)):
        if is_neutral(one):
            if one.numel() > 1:
                note_filled(recorder, one, other)
            return one if _is_wider(one, other) else other
    known = [one for one, other in ((left, right), (right, left)) if _flat_along(one, other)]
    if known:  # of an outer product, where both are, the channels of one side can be told
        product = call.name.rstrip("_") == "mul"
        one = min(known, key=lambda side: narrow_constant(side).numel()) if product else known[0]
        if varying_axes(one):
            recorder.store.freeze(one, recorder.cause(call, ELSEWHERE))
        return right if one is left else left
    for one, other in ((left, right), (right, left)):
        if _stays_beside(recorder, call, one, other):
            return other
    _note_sum(recorder, call, left, right)
    recorder.store.unite(left, right)
    if bool((left == NEUTRAL).any()) or bool((right == NEUTRAL).any()):
        return torch.where(left == NEUTRAL, right, left)
    ranks = len(varying_axes(left)), len(varying_axes(right))
    if ranks[0] != ranks[1]:  # they are equal now, and the simpler one shows it
        return left if ranks[0] < ranks[1] else right
    return left if left.numel() >= right.numel() else right


def _stays_beside(recorder: LabelRecorder, call: OpCall, one: Tensor, other: Tensor) -> bool:
    """Keep ``one`` if it is no channels where ``other`` has some: tokens, or what heads share."""
    if _along_others(one, other) and recorder.is_raw(one):
        recorder.store.freeze(one, recorder.cause(call, ELSEWHERE))
        return True
    shared = _shared_by_heads(recorder, one, other)
    if shared is not None:
        cause = recorder.cause(call, SHARED)
        recorder.recording.shared.append(
            RecordedShare(one=narrow_constant(shared), parts=narrow_constant(other), cause=cause)
        )
    return shared is not None


def _flat_along(one: Tensor, other: Tensor) -> bool:
    """Return whether ``one`` has size 1 along all axes along which ``other`` varies."""
    ndim = max(one.ndim, other.ndim)
    axes = [axis + ndim - other.ndim for axis in varying_axes(other)]
    return bool(axes) and all(_aligned_sizes(one, ndim)[axis] == 1 for axis in axes)


def _along_others(one: Tensor, other: Tensor) -> bool:
    """Return whether both vary, along axes that they do not share: tokens, and channels."""
    axes = [{axis - labels.ndim for axis in varying_axes(labels)} for labels in (one, other)]
    return all(axes) and not axes[0] & axes[1]


def _is_wider(constant: Tensor, other: Tensor) -> bool:
    """Return whether constants are spread along an axis on which one channel is not."""
    ndim = max(constant.ndim, other.ndim)
    sizes = zip(_aligned_sizes(constant, ndim), _aligned_sizes(other, ndim), strict=True)
    return not varying_axes(other) and any(own > its == 1 for own, its in sizes)


def _note_sum(recorder: LabelRecorder, call: OpCall, left: Tensor, right: Tensor) -> None:
    """Note channels that an addition unites; a head turned by rotary angles adds up itself."""
    if call.name.rstrip("_") in ("add", "sub"):
        own, others = distinct(left), distinct(right)
        if not torch.equal(own, others):
            recorder.recording.sums.append(own)


def _shared_by_heads(recorder: LabelRecorder, one: Tensor, other: Tensor) -> Tensor | None:
    """Return the labels of ``one`` if it varies inside parts of a divided axis, ``other`` over all.

    Along tokens, as a table of rotary angles has them, those of a part become one.
    """
    ndim = max(one.ndim, other.ndim)
    inner, all_axes = (
        {axis + ndim - labels.ndim for axis in varying_axes(labels)} for labels in (one, other)
    )
    within = inner & all_axes
    if not within or within == all_axes or min(all_axes) in within or not recorder.is_head(other):
        return None
    for axis in (axis - ndim + one.ndim for axis in inner - all_axes):
        recorder.store.unite(one, one.narrow(axis, 0, 1))
        one = one.narrow(axis, 0, 1)
    return one
