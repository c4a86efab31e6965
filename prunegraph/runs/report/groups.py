"""A picture of a structure graph: its groups from left to right, and the MACs of each."""

from typing import Any, NamedTuple

import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from prunegraph.core.masks import BoolArray, ChannelMask, IntArray
from prunegraph.graph import StructureGraph

MAX_COLUMNS = 9
"""Columns of groups in one row; deeper networks go on in the next row, as text does."""

MAX_LEFT = 2
"""Columns that the last row takes beyond that, rather than start another one."""

MAX_STACK = 10
"""Groups of one depth above each other; more of them stand in several columns."""

COLUMN_WIDTH, STACK_HEIGHT, BAR_WIDTH = 1.55, 0.75, 0.2
"""Inches a column, a group in a column, a bar."""

BARS_HEIGHT = 2.6
"""Inches of the bars, their labels left out."""

LABEL_SIZE = 7.5
LABEL_LENGTH = 24
LEAST_AREA, MOST_AREA = 25.0, 520.0
"""Areas of the narrowest and the widest group, in square points."""

FREE, FROZEN, REMOVED = "#4c8fc7", "#7d858e", "#c2611a"
"""Three of contrast to a white page and to a dark one."""


class Place(NamedTuple):
    """Where a disc is drawn: x in columns, y in stacked groups, and its row of columns."""

    x: float
    y: float
    row: int


def group_links(graph: StructureGraph) -> "nx.DiGraph[int]":
    """Return the groups as nodes and the operations as edges.

    Args:
        graph: the structure.

    Returns:
        A directed graph on the group indices. An edge leads from a group that an operation reads to
        one that it writes; it holds the name of the first such operation as ``op``, its position as
        ``order``. An operation that writes what it reads (a depthwise convolution, a layer applied
        to its own output) has none.
    """
    links: nx.DiGraph[int] = nx.DiGraph()
    links.add_nodes_from(range(len(graph.groups)))
    first = first_writes(graph)
    calls = [(op.name, op.in_units, op.out_units, op.depth) for op in graph.ops]
    calls += [
        (path, *ends, int(first[graph.group_of[ends[1]]].min()))
        for path, ends in graph.gathers.items()
    ]
    for name, in_units, out_units, order in calls:
        for source in np.unique(graph.group_of[in_units]).tolist():
            for target in np.unique(graph.group_of[out_units]).tolist():
                if source != target and not links.has_edge(source, target):
                    links.add_edge(source, target, op=name, order=order)
    return links


def first_writes(graph: StructureGraph) -> IntArray:
    """Return ``[G]`` the position of the first operation that writes each group; -1 = none does."""
    first = np.full(len(graph.groups), -1, dtype=np.int64)
    for op in reversed(graph.ops):
        first[graph.group_of[op.out_units]] = op.depth
    return first


def group_depths(links: "nx.DiGraph[int]") -> IntArray:
    """Return ``[G]`` the longest way from the inputs to each group, in operations.

    What is written into a group after it has been read (a residual stream) is no way to it.
    """
    first_read = [float("inf")] * len(links)
    for source, _, operation in links.edges(data=True):
        first_read[source] = min(first_read[source], operation["order"])
    depths = np.zeros(len(first_read), dtype=np.int64)
    for group in sorted(links, key=lambda one: first_read[one]):
        ways = [
            depths[source]
            for source, _, operation in links.in_edges(group, data=True)
            if operation["order"] < first_read[group]
        ]
        depths[group] = max(ways, default=-1) + 1
    return depths


def draw_groups(
    graph: StructureGraph, title: str, mask: ChannelMask | None = None, *, paper: str = "white"
) -> Figure:
    """Draw the groups, left to right by depth, and bars of their MACs.

    Args:
        graph: the structure.
        title: the picture's first line.
        mask: show what it keeps and removes; None = what is free and what is frozen.
        paper: colour behind the names.
    """
    links = group_links(graph)
    places, size = _places(group_depths(links), links)
    width = max(COLUMN_WIDTH * size[0], BAR_WIDTH * len(graph.groups) + 1.5, 8.0)
    heights = (STACK_HEIGHT * size[1], BARS_HEIGHT)
    figure = Figure(figsize=(width, sum(heights) + 2.2), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=heights)
    figure.suptitle(title, fontsize=11)
    _draw_links(above, graph, links, places, mask, paper)
    above.set_xlim(-0.6, size[0] - 0.4)
    above.set_ylim(-size[1], 0.5)
    _draw_bars(below, graph, mask, paper)
    return figure


def _places(depths: IntArray, links: "nx.DiGraph[int]") -> tuple[dict[int, Place], tuple[int, int]]:
    """Return the place of each group, and how many columns and stacked groups there are."""
    places: dict[int, Place] = {}
    widest = top = 0
    for row, depths_of_row in enumerate(_rows(depths, links)):
        stacks = [stack for depth in depths_of_row for stack in _stacks(depths == depth)]
        tallest = max(len(stack) for stack in stacks)
        for column, stack in enumerate(stacks):
            for position, group in enumerate(stack.tolist()):
                middle = (tallest - len(stack)) / 2
                places[group] = Place(float(column), -(top + middle + position), row)
        widest, top = max(widest, len(stacks)), top + tallest
    return places, (widest, top)


def _stacks(chosen: BoolArray) -> list[IntArray]:
    """Return the chosen groups in as few equal stacks as ``MAX_STACK`` allows."""
    groups = np.flatnonzero(chosen)
    return np.array_split(groups, -(-len(groups) // MAX_STACK))


def _rows(depths: IntArray, links: "nx.DiGraph[int]") -> list[range]:
    """Cut the depths into rows of about ``MAX_COLUMNS``, each where the fewest arrows cross."""
    crossing = np.zeros(depths.max() + 1, dtype=np.int64)  # arrows between depths <= d and > d
    for source, target in links.edges:
        low, high = sorted((depths[source], depths[target]))
        crossing[low:high] += 1
    rows, start = [], 0
    while len(crossing) - start > MAX_COLUMNS + MAX_LEFT:
        shortest = start + MAX_COLUMNS // 2
        ends = crossing[shortest : start + MAX_COLUMNS]
        end = start + MAX_COLUMNS - int(ends[::-1].argmin())  # of equal ones the longest row
        rows.append(range(start, end))
        start = end
    return [*rows, range(start, len(crossing))]


def _draw_links(
    axes: Axes,
    graph: StructureGraph,
    links: "nx.DiGraph[int]",
    places: dict[int, Place],
    mask: ChannelMask | None,
    paper: str,
) -> None:
    """Draw groups as discs with their names and widths, operations as arrows."""
    axes.set_axis_off()
    sizes = np.array([len(group.units) for group in graph.groups])
    areas = LEAST_AREA + (MOST_AREA - LEAST_AREA) * sizes / sizes.max()
    positions = {group: (place.x, place.y) for group, place in places.items()}
    within = [edge for edge in links.edges if places[edge[0]].row == places[edge[1]].row]
    between = [edge for edge in links.edges if places[edge[0]].row != places[edge[1]].row]
    for edges, style, alpha in ((within, "solid", 0.9), (between, "dashed", 0.5)):
        nx.draw_networkx_edges(
            links,
            positions,
            edgelist=edges,
            ax=axes,
            node_size=areas.tolist(),
            edge_color="#6f7780",
            width=0.7,
            style=style,
            alpha=alpha,
            arrowsize=7,
            connectionstyle="arc3,rad=0.12",
        )
    kept = np.bincount(graph.group_of[graph.dense_mask().keep if mask is None else mask.keep])
    x, y = np.array([positions[group] for group in range(len(sizes))]).T
    colours = [FREE if group.frozen is None else FROZEN for group in graph.groups]
    if mask is not None:
        axes.scatter(x, y, areas, **removed_look(paper), zorder=3)
    axes.scatter(x, y, areas * kept / sizes, color=colours, zorder=3.1)
    for group, structure in enumerate(graph.groups):
        count = (
            str(sizes[group]) if kept[group] == sizes[group] else f"{sizes[group]} → {kept[group]}"
        )
        axes.annotate(
            f"{short_name(structure.name)}\n{count}",
            (x[group], y[group]),
            xytext=(0, -np.sqrt(areas[group] / np.pi) - 2),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=LABEL_SIZE,
            linespacing=1.0,
            bbox={"boxstyle": "square,pad=0.05", "color": paper, "alpha": 0.75},
            zorder=4,
        )
    handles = [Patch(color=FREE, label="free" if mask is None else "kept")]
    if mask is not None:
        handles.append(Patch(**removed_look(paper), label="removed"))
    handles.append(Patch(color=FROZEN, label="frozen"))
    axes.set_title(
        "Groups of units (area: width) and the operations between them", fontsize=9, loc="right"
    )
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=len(handles),
        fontsize=8,
        frameon=False,
    )


def _draw_bars(axes: Axes, graph: StructureGraph, mask: ChannelMask | None, paper: str) -> None:
    """Draw the MACs of each group: whole, or what is kept and what is removed."""
    dense = graph.macs_by_group(graph.dense_mask().keep) / 1e6
    kept = dense if mask is None else graph.macs_by_group(mask.keep) / 1e6
    order = np.argsort(first_writes(graph), kind="stable")
    order = order[dense[order] > 0]
    groups = [graph.groups[index] for index in order]
    bars = np.arange(len(order))
    colours = [FREE if group.frozen is None else FROZEN for group in groups]
    axes.bar(bars, kept[order], color=colours, width=0.75)
    if mask is not None:
        removed = (dense - kept)[order]
        look = removed_look(paper, removed > 0)
        axes.bar(bars, removed, bottom=kept[order], width=0.75, **look)
    axes.set_xticks(bars, [short_name(group.name) for group in groups])
    axes.tick_params("x", labelrotation=90, labelsize=LABEL_SIZE, length=0)
    axes.tick_params("y", labelsize=8)
    axes.set_xlim(-0.7, len(bars) - 0.3)
    axes.set_ylabel("million MACs", fontsize=8)
    axes.set_title("Multiply-adds of the operations that write each group", fontsize=9, loc="right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def removed_look(paper: str, outlined: BoolArray | bool = True) -> dict[str, Any]:
    """Return how removed channels are drawn: hatched, so that it takes no colours to see them.

    Args:
        paper: the colour between the lines.
        outlined: which of the shapes have an edge; those without area need none.
    """
    return {
        "facecolor": paper,
        "edgecolor": REMOVED,
        "hatch": "/////",
        "linewidth": np.where(outlined, 0.8, 0.0),
    }


def short_name(name: str) -> str:
    """Return the end of a module path, which tells most, as far as it fits under a disc."""
    if len(name) <= LABEL_LENGTH:
        return name
    end = name[-LABEL_LENGTH:]
    whole_words = end.partition(".")[2]
    return whole_words if "." in whole_words else f"…{end[1:]}"
