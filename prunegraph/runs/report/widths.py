"""Figures of what a mask keeps: of each group of channels, or of each weight."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from prunegraph.core.masks import ChannelMask
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import StructureGraph
from prunegraph.runs.report.groups import FREE, removed_look, short_name
from prunegraph.runs.report.style import INK, PAPER, SMALL, new_figure

LANES = (-0.25, 0.0, 0.25)
"""Where the marks of each rival stand on a bar, in rows, so that equal widths hide no mark."""


def draw_widths(
    graph: StructureGraph, mask: ChannelMask, rivals: Mapping[str, Mapping[str, int]] | None = None
) -> Figure:
    """Draw the kept share of each group that may be pruned.

    Args:
        graph: the structure.
        mask: which units stay.
        rivals: widths of other masks, by name, which are marks on the bars.
    """
    dense, widths = graph.group_widths(graph.dense_mask()), graph.group_widths(mask)
    shares = {name: widths[name] / size for name, size in dense.items()}
    figure = _draw(shares, {name: f"{size} → {widths[name]}" for name, size in dense.items()})
    (axes,) = figure.axes
    for (name, others), marker, lane in zip((rivals or {}).items(), "o^s", LANES, strict=False):
        axes.scatter(
            [100 * others[group] / size for group, size in dense.items()],
            np.arange(len(dense)) + lane,
            s=16,
            marker=marker,
            facecolor=PAPER,
            edgecolor=INK,
            linewidth=0.8,
            label=name,
            zorder=3,
        )
    axes.set_xlabel("units kept, %")
    figure.legend(loc="outside upper center", ncols=2, columnspacing=1.0)
    return figure


def draw_zeros(mask: WeightMask) -> Figure:
    """Draw the share of each weight that is not zero."""
    shares = {name: float(keep.float().mean()) for name, keep in mask.keep.items()}
    figure = _draw(shares, {name: f"{mask.keep[name].numel():,}" for name in shares})
    figure.axes[0].set_xlabel("weights kept, %")
    figure.legend(loc="outside upper center", ncols=2, columnspacing=1.0)
    return figure


def _draw(kept: Mapping[str, float], told: Mapping[str, str]) -> Figure:
    """Draw a bar for each name, with a word beside it."""
    figure, axes = new_figure(1.1 + 0.26 * len(kept))
    places = np.arange(len(kept))
    shares = 100 * np.array([*kept.values()])
    axes.barh(places, shares, color=FREE, height=0.72, label="kept")
    look = removed_look(PAPER, shares < 100)
    axes.barh(places, 100 - shares, left=shares, height=0.72, label="removed", **look)
    for place, name in enumerate(kept):
        axes.text(103, place, told[name], va="center", fontsize=SMALL)
    axes.set_yticks(places, [short_name(name) for name in kept], fontsize=SMALL)
    axes.tick_params("y", length=0)
    axes.set_ylim(len(kept) - 0.4, -0.6)
    axes.set_xlim(0, 103)
    axes.set_xticks([0, 25, 50, 75, 100])
    return figure
