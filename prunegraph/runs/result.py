"""What ``pg.prune`` returns, as an object, a table and a figure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.console import Console
from prunegraph.core.masks import ChannelMask
from prunegraph.core.task import Task
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import StructureGraph
from prunegraph.runs.report.style import STYLE
from prunegraph.runs.report.tables import limits_in_words, percent
from prunegraph.runs.report.widths import draw_widths, draw_zeros


@dataclass(frozen=True, eq=False, kw_only=True)
class PruneResult:
    """What ``prune`` returns.

    Attributes:
        model: the pruned network in eval mode; fine-tune it next.
        mask: which prunable units, or single weights, were kept.
        graph: the structure of the dense network; None where single weights became zero.
        report: costs and scores before and after, and what the method says, as JSON values.
        task: what was pruned.
    """

    model: nn.Module
    mask: ChannelMask | WeightMask
    graph: StructureGraph | None
    report: Mapping[str, Any]
    task: Task

    def __repr__(self) -> str:
        return f"PruneResult({self.task.name}, {self.report['method']}: {self.mask!r})"

    def summary(self) -> None:
        """Print one table: costs and score, dense and pruned, before any fine-tune."""
        report = self.report
        name = f"{self.task.name}, {report['method']}: {limits_in_words(report['budget'])}"
        table = Table(title=escape(name))
        table.add_column("")
        for head in ("dense", "pruned", "left"):
            table.add_column(head, justify="right")
        for words, dense, pruned, share in compared(report):
            table.add_row(words, dense, pruned, share)
        Console().table(table)

    def plot(self) -> Figure:
        """Return a figure of what is left of each group of channels, or of each weight."""
        with mpl.rc_context(STYLE):
            if isinstance(self.mask, WeightMask):
                return draw_zeros(self.mask)
            assert self.graph is not None  # of channels
            return draw_widths(self.graph, self.mask)


COSTS = {"multiply-adds": "macs", "parameters": "params", "bytes of activations": "peak_memory"}
"""Costs of a report in words, and their keys."""

ZEROS = {"zeros, prunable weights": "sparsity", "zeros, whole network": "network_sparsity"}
"""Shares of a report of single weights in words, and their keys."""


def compared(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return the rows of the table: a word, dense, pruned, and which share is left."""
    dense, pruned = report["dense"], report["pruned"]
    rows = [
        (words, f"{dense[key]:,}", f"{pruned[key]:,}", percent(pruned[key] / dense[key]))
        for words, key in COSTS.items()
        if dense.get(key)
    ]
    if "sparsity" in pruned:
        for words, key in ZEROS.items():
            rows.append((words, "", percent(pruned[key], 2), ""))
    if times := report.get("latency_ms"):
        before, after = times["dense"], times["pruned"]
        rows.append(("ms a forward", f"{before:.3g}", f"{after:.3g}", percent(after / before)))
    scores = [f"{part['score']:.4g}" for part in (dense, pruned)]
    return [*rows, (f"{report['score_name']}, search split", scores[0], scores[1], "")]


def structure_report(graph: StructureGraph, mask: ChannelMask, budget: Budget) -> dict[str, Any]:
    """Return budget, costs and widths before and after, as JSON values."""
    cost, dense = graph.cost(mask), graph.dense_cost
    return {
        "budget": budget.as_dict(),
        "dense": {
            "macs": dense.macs,
            "params": dense.params,
            "peak_memory": graph.peak_memory(graph.dense_mask()),
        },
        "pruned": {
            "macs": cost.macs,
            "params": cost.params,
            "peak_memory": graph.peak_memory(mask),
            "widths": graph.group_widths(mask),
            "mask_digest": mask.digest(),
        },
    }


def scores_report(task: Task, small: nn.Module) -> dict[str, Any]:
    """Return the scores on the search split, before and after."""
    return {
        "task": task.kind,
        "score_name": task.score_name,
        "higher_is_better": task.higher_is_better,
        "dense": {"score": task.score(task.model).value},
        "pruned": {"score": task.score(small).value},
    }
