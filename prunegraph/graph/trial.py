"""The trial that ends an analysis: prune a part of every group and run the forward.

Sizes written as numbers in the user's forward (``F.pad(.., 16, 16)``, ``view(b, 512)``) cannot be
told from computed ones in one run. A slim network that raises, or whose output differs from the
zero-masked one, names the groups that must stay whole.
"""

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunegraph.errors import SurgeryError
from prunegraph.graph.recording import Recording
from prunegraph.graph.structure import FrozenOp, Group, StructureGraph
from prunegraph.graph.surgery import apply_mask, zero_mask
from prunegraph.types import BoolArray, IntArray

SUSPICIOUS = 1e-5
"""From this difference on, relative to the output's largest value, float64 decides."""

EXACT, ROUGH = 1e-8, 1e-3
"""Largest accepted difference in float64, and where the forward cannot run in float64."""

Forward = Callable[[nn.Module, torch.dtype | None], Any]
"""Calls a network of the model's type on the example inputs, cast to a precision or as they are."""

ERRORS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError, SurgeryError)
"""What a forward may raise that cannot follow."""

Parts = list[tuple[Group, IntArray]]
"""Groups, each with the classes of it to remove."""


def _part(group: Group, rng: np.random.Generator) -> IntArray:
    """Return the classes to remove: a random part, so that no two sizes agree by chance."""
    wanted = max(1, round(len(group.classes) * rng.uniform(0.2, 0.7)))
    removable = min(len(group.classes) - group.min_keep, wanted)
    return rng.permutation(group.classes)[: max(removable, 0)]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a forward cannot follow a mask.

    Attributes:
        reason: in words.
        module: path of the module in whose forward it fails; None if it runs, but wrongly.
    """

    reason: str
    module: str | None = None


def failing_frame(
    model: nn.Module, error: BaseException
) -> tuple[str, traceback.FrameSummary] | None:
    """Return the path of the innermost module that an error comes from, and the line there."""
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner, code = frame.f_locals.get("self"), frame.f_code
        if id(owner) in names and code.co_name not in {"_wrapped_call_impl", "_call_impl"}:
            found = names[id(owner)], traceback.FrameSummary(code.co_filename, line, code.co_name)
    return found


def _failure(
    model: nn.Module, graph: StructureGraph, keep: BoolArray, run: Forward
) -> Failure | None:
    """Return why the forward cannot follow a mask, or None if it can."""
    mask, slim_model = graph.mask(keep), model
    try:
        slim_model = apply_mask(model, graph, mask)
        slim = _tensors(run(slim_model, None))
    except ERRORS as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        frame = failing_frame(slim_model, error)
        return Failure(
            reason=f"the forward needs its full width: {first_line}",
            module=None if frame is None else frame[0],
        )
    silent = zero_mask(model, graph, mask)
    zero = _tensors(run(silent, None))
    if any(one.shape != other.shape for one, other in zip(slim, zero, strict=True)):
        return Failure(reason="the forward's output changes its shape")
    difference, limit = _difference(slim, zero), SUSPICIOUS
    if difference > limit:
        try:
            double = [_tensors(run(m.double(), torch.float64)) for m in (slim_model, silent)]
            difference, limit = _difference(*double), EXACT
        except ERRORS:  # a forward that casts to float32 itself
            limit = ROUGH
    if difference <= limit:
        return None
    return Failure(reason="the pruned forward computes something else than the masked one")


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _difference(pruned: list[Tensor], masked: list[Tensor]) -> float:
    """Return the largest difference relative to each output's largest value; infinite for NaN."""
    worst = 0.0
    for one, other in zip(pruned, masked, strict=True):
        if one.is_floating_point() and one.numel():
            scale = float(other.abs().max().clamp_min(1e-6))
            found = float((one - other).abs().max()) / scale
            worst = max(worst, found if found == found else math.inf)
    return worst


class Remedies:
    """What is tried, before channels are frozen, when a module's forward cannot follow.

    In this order, for all modules of its class: its integer attributes are no sizes after all; they
    are, but its heads must match its input (see ``Recording.tie_heads_to_inputs``); both.

    Args:
        model: the network.
        recording: what its forward left behind.

    Attributes:
        literal: paths of modules whose attributes surgery leaves as they are.
    """

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self._model, self._recording = model, recording
        self._tried: dict[type, int] = {}
        self.literal: set[str] = set()

    def apply(self, failure: Failure, graph: StructureGraph) -> bool:
        """Change something for the module that failed; return False if nothing is left to try."""
        if failure.module is None:
            return False
        kind = type(self._model.get_submodule(failure.module))
        alike = {name for name, module in self._model.named_modules() if type(module) is kind}
        step = self._tried[kind] = self._tried.get(kind, 0) + 1
        if step == 1:
            if any(attribute.module in alike for attribute in graph.size_attributes):
                self.literal |= alike
                return True
            step = self._tried[kind] = 2
        if step == 2:
            self.literal -= alike
            return self._recording.tie_heads_to_inputs(alike)
        if step == 3:
            self.literal |= alike
            return True
        return False


class Trial:
    """Removes a part of every group of a network, and finds what cannot be removed.

    Args:
        model: the network, in eval mode.
        graph: its structure.
        run: calls a network of the model's type on the example inputs.
    """

    def __init__(self, model: nn.Module, graph: StructureGraph, run: Forward) -> None:
        rng = np.random.default_rng(0)
        self._model, self._graph, self._run = model, graph, run
        self._keep = np.ones(graph.num_classes, dtype=bool)
        self._found: list[tuple[Group, IntArray, Failure]] = []
        groups = [group for group in graph.groups if group.frozen is None]
        self._parts = [(group, _part(group, rng)) for group in groups]
        self.failure = self._try(self._parts) if groups else None

    def literal_sizes(self, failure: Failure) -> list[tuple[IntArray, FrozenOp]]:
        """Return the classes that the forward cannot lose, with the reason; by bisection.

        Where some fail in modules of the class in which ``failure`` happened, those alone: others
        may have remedies.
        """
        self._bisect(self._parts, failure)
        same = [item for item in self._found if self._kind(item[2]) is self._kind(failure)]
        return [
            (group.classes, FrozenOp(op="trial", module=group.name, reason=reason.reason))
            for group, _, reason in same or self._found
        ]

    def _kind(self, failure: Failure) -> type | None:
        """Return the class of the module that a failure came from."""
        return None if failure.module is None else type(self._model.get_submodule(failure.module))

    def _try(self, parts: Parts) -> Failure | None:
        """Remove parts of groups on top of what is removed already, if the forward can follow."""
        trial = self._keep.copy()
        for _, removed in parts:
            trial[removed] = False
        failure = _failure(self._model, self._graph, trial, self._run)
        if failure is None:
            self._keep = trial
        return failure

    def _bisect(self, parts: Parts, failure: Failure) -> None:
        """Remove what can go of ``parts``, which together cannot."""
        if len(parts) == 1:
            self._found.append((*parts[0], failure))
            return
        middle = len(parts) // 2
        first = self._try(parts[:middle])
        if first is not None:
            self._bisect(parts[:middle], first)
        # with the first half gone as a whole, all of ``parts`` is what failed before
        second = failure if first is None else self._try(parts[middle:])
        if second is not None:
            self._bisect(parts[middle:], second)
