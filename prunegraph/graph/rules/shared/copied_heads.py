"""Keys and values of one head, copied for each query head: the query heads can leave alone.

As multi-query attention (Shazeer 2019, arXiv 1911.02150) has them, and state space models whose
heads share their ``B`` and ``C`` (Mamba-2, arXiv 2405.21060). A label tensor holds one label a
position, so along such copies either the channels of what is copied can go, or the heads. The
first recording labels the channels. Where heads end up stuck by it, a second one labels the heads.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from prunegraph.graph.trace.labels import along, labelled, narrow_alike, varying_axes
from prunegraph.graph.trace.recorder import LabelRecorder, OpCall, Rule
from prunegraph.graph.trace.recording import RecordedCopy, Recording, SizeUse

SHARED = "shared by all heads"


def keep_shared(recorder: LabelRecorder, call: OpCall, shared: Tensor, heads: Tensor) -> None:
    """Keep whole what serves all heads; an attribute may tell how many of these it serves.

    Args:
        recorder: of the forward.
        call: the op that spreads it.
        shared: its labels.
        heads: ``[heads]`` labels.
    """
    recorder.store.freeze(shared, recorder.cause(call, SHARED))
    if (caller := recorder.modules.caller()) is not None:
        use = SizeUse(module=caller, labels=heads, axis=0, copies=True)
        recorder.recording.size_uses.append(use)


def note_copies(rule: Rule) -> Rule:
    """Return the rule of ``expand`` or ``repeat``, which notes where channels are copied."""

    def noting(recorder: LabelRecorder, call: OpCall) -> None:
        rule(recorder, call)
        recording = recorder.recording
        recording.num_expands += 1
        source = call.args[0]
        if (axis := _copied_axis(source, call.out)) is None or recorder.is_stored(source):
            return
        labels = recorder.labels_of(source)
        if varying_axes(labels):
            copy = RecordedCopy(
                index=recording.num_expands,
                module=recorder.modules.caller(),
                labels=narrow_alike(labels),
                size=call.out.shape[axis],
            )
            recording.copies.append(copy)

    return noting


def _copied_axis(source: Tensor, out: Tensor) -> int | None:
    """Return the only axis that was longer afterwards, if it was of size 1; else None."""
    before = [1] * (out.ndim - source.ndim) + list(source.shape)
    sizes = zip(before, out.shape, strict=True)
    longer = [axis for axis, (old, new) in enumerate(sizes) if old != new]
    return longer[0] if len(longer) == 1 and before[longer[0]] == 1 else None


def copies_for_heads(recording: Recording) -> set[int]:
    """Return the copies that are as many as heads of their module which cannot leave as it is."""
    if not recording.copies:
        return set()
    component = recording.store.components()
    frozen = component[torch.tensor([*recording.store.events], dtype=torch.int64)]

    def is_stuck(labels: Tensor) -> bool:
        own = component[labelled(labels)].unique()
        return own.numel() == 1 or bool(torch.isin(own, frozen).all())

    stuck: set[tuple[str | None, int]] = set()
    for use in recording.size_uses:
        axes = varying_axes(use.labels)
        if len(axes) > 1 and axes[0] == use.axis and is_stuck(use.labels):
            stuck.add((use.module, use.labels.shape[use.axis]))
    return {
        copy.index
        for copy in recording.copies
        if (copy.module, copy.size) in stuck and is_stuck(copy.labels)
    }


def heads_of_copies(rules: Mapping[str, Rule], copies: Collection[int]) -> dict[str, Rule]:
    """Return rules that label these copies as heads; what they are copies of stays whole."""

    def either(rule: Rule) -> Rule:
        def labelling(recorder: LabelRecorder, call: OpCall) -> None:
            rule(recorder, call)
            if recorder.recording.num_expands not in copies:
                return
            axis = _copied_axis(call.args[0], call.out)
            assert axis is not None
            heads = recorder.store.fresh(call.out.shape[axis])
            keep_shared(recorder, call, recorder.labels_of(call.args[0]), heads)
            labels = along(heads, axis, call.out.shape)
            recorder.note_sizes(labels)
            recorder.set_labels(call.out, labels)

        return labelling

    return {**rules, **{name: either(rules[name]) for name in ("expand", "repeat")}}
