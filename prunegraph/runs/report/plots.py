"""The figures of a run: drawn once, written as PNG files and into the page of the run.

Three colours stand for what a reader's light or dark page gives: ``INK``, ``PAPER``, ``MUTED``.
"""

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator

from prunegraph.core.files import write_bytes
from prunegraph.core.masks import ChannelMask
from prunegraph.graph import StructureGraph
from prunegraph.runs.context import Mask
from prunegraph.runs.report.groups import draw_groups
from prunegraph.runs.report.report import History, read_rows
from prunegraph.runs.report.style import INK, MUTED, PAPER, SMALL, STYLE, WIDTH, new_figure
from prunegraph.runs.report.tables import by_method, percent, title
from prunegraph.runs.report.verdict import (
    DENSE,
    MethodRow,
    Unit,
    column,
    is_baseline,
    mean_by_name,
    pruned_rows,
)
from prunegraph.runs.report.widths import draw_widths

MARKS = {
    "agent": ("#c2611a", "D"),
    "search": ("#4c8fc7", "s"),
    "no search": ("#4b9459", "o"),
    "control": (MUTED, "^"),
    DENSE: (INK, "*"),
}
"""Colour and marker of each kind of method."""

SEED_COLOURS = ("#c2611a", "#4c8fc7", "#4b9459", "#a06cb8", "#9a7b12")

LONGEST_NAME = 36
"""Letters of a method's name in a figure."""

MOST_METHODS = 20
"""Methods whose accuracies are drawn, the best on the search split."""

NUM_RIVALS = 3
"""Baselines whose widths are shown beside the agent's."""

PANELS = {
    "accuracy": "accuracy,\nmean",
    "best_accuracy": "accuracy,\nbest",
    "bar": "to be\nbeaten",
    "reward": "reward,\nmean",
    "entropy_per_bit": "entropy\na bit",
    "multiplier": "multiplier",
    "repaired": "repaired\nbits",
}
"""Learning curves and their labels; one that never changes is not drawn."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Findings:
    """What a run found, as its folder holds it.

    Attributes:
        content: the report.
        structure: that of the dense network; None where single weights became zero.
        masks: by digest.
        history: learning curves; empty without a search.
    """

    content: Mapping[str, Any]
    structure: StructureGraph | None
    masks: Mapping[str, Mask]
    history: History

    @cached_property
    def rows(self) -> list[MethodRow]:
        """The compared rows."""
        return read_rows(self.content)

    @property
    def unit(self) -> Unit:
        """How scores are written."""
        return Unit.of(self.content)

    @property
    def graph(self) -> StructureGraph:
        """The structure, where there is one."""
        assert self.structure is not None
        return self.structure

    @cached_property
    def mask(self) -> ChannelMask:
        """Which channels the pruned network keeps."""
        return self._channels(self.content["pruned"]["mask_digest"])

    def _channels(self, digest: str) -> ChannelMask:
        mask = self.masks[digest]
        assert isinstance(mask, ChannelMask)
        return mask

    @cached_property
    def rivals(self) -> dict[str, dict[str, int]]:
        """Widths of the best other baselines on the search split, each one's best mask."""
        own = {row.name for row in pruned_rows(self.rows, self.content["pruned"]["mask_digest"])}
        rows = [row for row in self.rows if is_baseline(row) and row.name not in own]
        found = dict(by_method(rows)[:NUM_RIVALS])
        best = {name: max(own, key=lambda row: row.search_accuracy) for name, own in found.items()}
        return {
            name: self.graph.group_widths(self._channels(row.digest)) for name, row in best.items()
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class Plot:
    """A figure and what it says.

    Attributes:
        figure: the figure.
        caption: what it shows.
        text: the same for those who cannot see it, with its main numbers.
    """

    figure: Figure
    caption: str
    text: str


def draw(findings: Findings) -> dict[str, Plot]:
    """Return the figures of a run by name; one that has nothing to show is left out."""
    drawers: dict[str, Callable[[Findings], Plot | None]]
    drawers = {"methods": _methods, "search": _search, "errors": _errors, "languages": _overlap}
    if findings.structure is not None:
        drawers |= {"widths": _widths, "groups": _groups}
    with mpl.rc_context(STYLE):
        drawn = {name: drawer(findings) for name, drawer in drawers.items()}
    plots = {name: plot for name, plot in drawn.items() if plot is not None}
    for plot in plots.values():
        draw_once(plot.figure)
    return plots


def draw_once(figure: Figure) -> None:
    """Solve a figure's layout once, so that it is the same in each file."""
    engine = figure.get_layout_engine()
    assert engine is not None, "made by new_figure"
    engine.execute(figure)
    with mpl.rc_context({"figure.autolayout": False, "figure.constrained_layout.use": False}):
        figure.set_layout_engine(None)  # "none" would draw each file twice


def save_plots(plots: Mapping[str, Plot], folder: Path) -> None:
    """Write figures as PNG files."""
    for name, plot in plots.items():
        save_figure(plot.figure, folder / f"{name}.png")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, atomically."""
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_bytes(path, content.getvalue())


def to_svg(plot: Plot, name: str) -> str:
    """Return a figure as an SVG element for a page that holds others too.

    Args:
        plot: the figure.
        name: prefix of its ids, so that no two figures of a page share one.
    """
    content = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        plot.figure.savefig(content, format="svg", transparent=True, metadata=nothing)
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration, which names a web address
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in ((INK, "ink"), (PAPER, "paper"), (MUTED, "muted")):
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(plot.text)}"', 1)


def _dense_marks(dense: Mapping[str, Any]) -> list[tuple[float, bool]]:
    """Return the dense network's accuracy before and after a fine-tune, and which is which."""
    found = ((dense["test_accuracy"], False), (dense["test_accuracy_finetuned"], True))
    return [(accuracy, filled) for accuracy, filled in found if accuracy is not None]


def _kind(row: MethodRow) -> str:
    if row.role != "baseline":
        return row.role
    return "search" if row.searches else "no search"


def mark(kind: str, filled: bool) -> dict[str, Any]:
    """Return how a method is drawn: a shape for its kind, hollow before the fine-tune."""
    colour, marker = MARKS[kind]
    return {
        "color": colour,
        "marker": marker,
        "markersize": 9 if marker == "*" else 5,
        "markerfacecolor": colour if filled else "none",
        "linestyle": "",
    }


def _add_kinds(figure: Figure, rows: Sequence[MethodRow]) -> None:
    """Add the legend: the kinds that are there, and what hollow and filled marks stand for."""
    kinds = {_kind(row) for row in rows} | {DENSE}
    handles = [Line2D([], [], label=kind, **mark(kind, True)) for kind in MARKS if kind in kinds]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=3,
        handletextpad=0.1,
        columnspacing=1.0,
        title=_fillings(rows),
        title_fontsize=SMALL,
    )


def _fillings(rows: Sequence[MethodRow]) -> str:
    """Return what hollow and filled marks stand for."""
    tuned = any(row.test_accuracy_finetuned is not None for row in rows)
    return "hollow: before the fine-tune, filled: after it" if tuned else "not fine-tuned"


def _methods(findings: Findings) -> Plot:
    """Draw the score of each method as dots, a line a method."""
    methods, unit = by_method(findings.rows), findings.unit
    groups = methods[:MOST_METHODS]
    shown = [row for _, rows in groups for row in rows]
    figure, axes = new_figure(1.5 + 0.2 * len(groups))
    dense = findings.content["dense"]
    axes.axvline(unit.shown(dense["test_accuracy"]), color=INK, linestyle=":", linewidth=0.8)
    for accuracy, filled in _dense_marks(dense):
        axes.plot(unit.shown(accuracy), 0, **mark(DENSE, filled))
    for place, (_, rows) in enumerate(groups, start=1):
        for metric, filled in (("recalibrated", False), ("finetuned", True)):
            known = [unit.shown(value) for value in column(rows, f"test_accuracy_{metric}")]
            if known:
                spread = np.std(known, ddof=1) if len(known) > 1 else None
                axes.errorbar(np.mean(known), place, xerr=spread, **mark(_kind(rows[0]), filled))
    names = [DENSE, *(_end(name) for name, _ in groups)]
    axes.set_yticks(range(len(names)), names, fontsize=SMALL)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params("y", length=0)
    axes.grid(axis="y", color=MUTED, alpha=0.3, linewidth=0.5)
    axes.set_xlabel(unit.label)
    _add_kinds(figure, shown)
    some = f"the {len(groups)} best of {len(methods)}" if len(methods) > len(groups) else "all"
    means = mean_by_name(shown, "test_accuracy_recalibrated")
    words = [f"{name} {unit.words(value)}" for name, value in means.items()]
    return Plot(
        figure=figure,
        caption=f"{unit.name.capitalize()} of {some} methods, best on the search split first; "
        "mean and standard deviation over seeds; the dotted line is the dense network.",
        text=f"Dot plot of test {unit.plural} before a fine-tune. {'; '.join(words)}; "
        f"dense {unit.words(dense['test_accuracy'])}.",
    )


class _PlainLog(LogFormatter):
    """Labels a logarithmic axis by 0.1 and 100, where others write 1e-01 or dollars."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Return the label of a tick; most minor ones have none."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def _errors(findings: Findings) -> Plot | None:
    """Draw by how much the outputs of each layer change, a line a method."""
    errors: Mapping[str, Mapping[str, float]] = findings.content.get("layer_errors", {})
    if not errors:
        return None
    figure, axes = new_figure(2.6)
    means = {}
    for (name, layers), colour in zip(errors.items(), itertools.cycle(SEED_COLOURS)):
        values = 100 * np.array([*layers.values()])
        axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=1, label=name)
        means[name] = float(values.mean())
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_PlainLog())
    axes.yaxis.set_minor_formatter(_PlainLog())
    axes.set_xlabel("layer, as they run")
    axes.set_ylabel("squared error of outputs, %")
    figure.legend(loc="outside upper center", ncols=3)
    words = "; ".join(f"{name} {value:.2g} %" for name, value in means.items())
    return Plot(
        figure=figure,
        caption="By how much the outputs of each layer change, on what it reads in the pruned "
        "network: squared error relative to the outputs, first seed.",
        text=f"Line plot over {len(next(iter(errors.values())))} layers. Means: {words}.",
    )


def _overlap(findings: Findings) -> Plot | None:
    """Draw how alike the masks of groups were while they changed, and how much all keep."""
    groups: Mapping[str, Mapping[str, Any]] = findings.content.get("groups", {})
    shown = {name: np.array(told["history"]).T for name, told in groups.items() if told["history"]}
    if not shown:
        return None
    figure, axes = new_figure(2.6)
    for (name, (steps, _, union, overlap)), colour in zip(
        shown.items(), itertools.cycle(SEED_COLOURS), strict=False
    ):
        axes.plot(steps, 100 * overlap, color=colour, linewidth=1, label=name)
        axes.plot(steps, 100 * union, color=colour, linewidth=1, linestyle=":")
    axes.set_xlabel("step")
    axes.set_ylabel("%")
    figure.legend(loc="outside upper center", ncols=2)
    words = "; ".join(f"{name} {percent(told['overlap'])}" for name, told in groups.items())
    return Plot(
        figure=figure,
        caption="Masks of languages over the steps of the training, first seed: the share that two "
        "of them have in common (solid), and the weights that any of them keeps (dotted).",
        text=f"Line plot over steps. Overlap at the end: {words}.",
    )


def _end(name: str) -> str:
    """Return a method's name, of a long one its end."""
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def _widths(findings: Findings) -> Plot:
    """Draw the kept share of each group: of the pruned network, of the best baselines."""
    graph = findings.graph
    dense, kept = graph.group_widths(graph.dense_mask()), graph.group_widths(findings.mask)
    narrowest = min(dense, key=lambda name: kept[name] / dense[name])
    return Plot(
        figure=draw_widths(graph, findings.mask, findings.rivals),
        caption="Kept width of each group, dense → pruned"
        f"{'; marks: what the best baselines keep' * bool(findings.rivals)}.",
        text=f"Bar chart of {len(dense)} groups: {sum(kept.values())} of {sum(dense.values())} "
        f"units stay; the most is removed from {narrowest}, {dense[narrowest]} to "
        f"{kept[narrowest]}.",
    )


def _search(findings: Findings) -> Plot | None:
    """Draw the learning curves of the searches, those that move."""
    runs = findings.history
    panels = [
        name
        for name in PANELS
        if all(name in figures for figures in runs.values())
        and any(len({*figures[name]}) > 1 for figures in runs.values())
    ]
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH, 0.7 + 0.95 * len(panels)), layout="constrained", dpi=200)
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(grid, panels, strict=True):
        for number, (run, figures) in enumerate(runs.items()):
            colour = SEED_COLOURS[number % len(SEED_COLOURS)]
            label = run if name == panels[0] else None
            points = figures["networks"], figures[name]
            axes.plot(*points, color=colour, lw=1.3, label=label)
        axes.set_ylabel(PANELS[name], fontsize=SMALL)
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.tick_params(labelsize=SMALL)
    grid[-1].set_xlabel("networks evaluated")
    figure.align_ylabels()
    figure.legend(loc="outside upper center", ncols=2)
    accuracies = [figures["accuracy"] for figures in runs.values()]
    ends = ", ".join(f"{percent(values[0])} to {percent(values[-1])}" for values in accuracies)
    return Plot(
        figure=figure,
        caption="Learning curves on search images, a point an update.",
        text=f"Line plots of {', '.join(runs)}. Mean accuracy of an update, first to last: {ends}.",
    )


def _groups(findings: Findings) -> Plot:
    """Draw the groups of units and what was kept of them."""
    graph = findings.graph
    frozen = sum(group.frozen is not None for group in graph.groups)
    return Plot(
        figure=draw_groups(graph, title(findings.content), findings.mask, paper=PAPER),
        caption="The groups of units, coloured by what was decided, and the multiply-adds of each.",
        text=f"Graph of {len(graph.groups)} groups of units ({frozen} frozen) and the "
        "operations between them, with the kept and the removed share of each; below, bars of "
        "each group's multiply-adds.",
    )
