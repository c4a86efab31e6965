"""How far a mask agrees with what a criterion would keep at the same widths."""

from typing import Any

from prunegraph.experiment.bench import Bench
from prunegraph.graph import StructureGraph
from prunegraph.pruners.criteria import importance
from prunegraph.types import Float64Array, KeepMask

CRITERIA = ("l1", "taylor")
"""Criteria that a report compares the agent's choice of channels with."""


def agreement(graph: StructureGraph, mask: KeepMask, values: Float64Array) -> dict[str, float]:
    """Return which share of the kept channels a criterion would keep too, and what chance gives.

    Only groups from which some channels are removed count: the others leave no choice.

    Args:
        graph: the structure.
        mask: which classes stay.
        values: ``[N]`` importances, higher = keep.

    Returns:
        ``overlap``: the share of kept classes that are also among the most important ones of their
        group, as many as are kept; ``chance``: what a random choice of that many would share on
        average. Nothing where no group was pruned.
    """
    kept = shared = expected = 0.0
    for group in graph.groups:
        classes = group.classes
        chosen = mask.keep[classes]
        width = int(chosen.sum())
        if width == len(classes):
            continue
        best = (-values[classes]).argsort(kind="stable")[:width]
        kept += width
        shared += int(chosen[best].sum())
        expected += width**2 / len(classes)
    return {"overlap": shared / kept, "chance": expected / kept} if kept else {}


def agreements(bench: Bench, mask: KeepMask) -> dict[str, Any]:
    """Return the agreement of a mask with each criterion, by name."""
    graph = bench.target.graph
    return {
        name: agreement(graph, mask, importance(name, bench.statistics, graph.num_classes, 0))
        for name in CRITERIA
    }
