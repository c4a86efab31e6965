"""The trial that ends an analysis: prune a part of every group once and see whether the forward follows.

Sizes written as numbers in the user's forward (``F.pad(.., 16, 16)``, ``view(b, 512)``) cannot be
told from computed ones in one run. A slim network that raises, or whose output differs from the
zero-masked one, names the groups that must stay whole.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunegraph.errors import SurgeryError
from prunegraph.graph.structure import FrozenOp, Group, StructureGraph
from prunegraph.graph.surgery import apply_mask, zero_mask
from prunegraph.types import BoolArray, IntArray

TOLERANCE = 1e-3
"""Largest accepted difference relative to the output's largest value; float32 noise is 1e-6."""

Forward = Callable[[nn.Module], Any]


def _part(group: Group, rng: np.random.Generator) -> IntArray:
    """Return the classes to remove: a random part, so that no two sizes agree by chance."""
    wanted = max(1, round(len(group.classes) * rng.uniform(0.2, 0.7)))
    removable = min(len(group.classes) - group.min_keep, wanted)
    return rng.permutation(group.classes)[: max(removable, 0)]


def _failure(model: nn.Module, graph: StructureGraph, keep: BoolArray, run: Forward) -> str | None:
    """Return why the forward cannot follow a mask, or None if it can."""
    mask = graph.mask(keep)
    try:
        slim = [
            t for t in tree_leaves(run(apply_mask(model, graph, mask))) if isinstance(t, Tensor)
        ]
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError, SurgeryError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        return f"the forward needs its full width: {first_line}"
    zero = [t for t in tree_leaves(run(zero_mask(model, graph, mask))) if isinstance(t, Tensor)]
    for pruned, masked in zip(slim, zero, strict=True):
        if pruned.shape != masked.shape:
            return "the forward's output changes its shape"
        if not pruned.is_floating_point():
            continue
        difference = (pruned - masked).abs().max() if pruned.numel() else torch.zeros(())
        if not bool(difference <= TOLERANCE * masked.abs().max().clamp_min(1e-6)):
            return "the pruned forward computes something else than the masked one"
    return None


def find_literal_sizes(
    model: nn.Module, graph: StructureGraph, run: Forward
) -> list[tuple[IntArray, FrozenOp]]:
    """Return the classes that the forward cannot lose, with the reason.

    Args:
        model: the network, in eval mode.
        graph: its structure.
        run: calls a network of the model's type on the example inputs.
    """
    rng = np.random.default_rng(0)
    groups = [group for group in graph.groups if group.frozen is None]
    removals = [(group, _part(group, rng)) for group in groups]
    found: list[tuple[IntArray, FrozenOp]] = []
    keep = np.ones(graph.num_classes, dtype=bool)

    def remove(part: list[tuple[Group, IntArray]], reason: str | None) -> None:
        """Remove what can go; ``reason`` says that all of ``part`` together cannot."""
        nonlocal keep
        trial = keep.copy()
        for _, removed in part:
            trial[removed] = False
        reason = reason or _failure(model, graph, trial, run)
        if reason is None:
            keep = trial
        elif len(part) == 1:
            group = part[0][0]
            found.append((group.classes, FrozenOp(op="trial", module=group.name, reason=reason)))
        else:
            middle = len(part) // 2
            before = len(found)
            remove(part[:middle], None)
            clean = len(found) == before  # then the fault lies in the other half
            remove(part[middle:], reason if clean else None)

    if removals:
        remove(removals, None)
    return found
