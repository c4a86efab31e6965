"""What several comparisons found together: ``summary.json``, and the same as a page.

A summary is made of the reports alone, so that ``verify`` can make it anew.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from rich.markup import escape
from rich.table import Table

from prunegraph.core.files import file_digest, write_json, write_text
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.compare import ComparisonsConfig
from prunegraph.runs.options.yaml_file import command_line
from prunegraph.runs.report.page import render
from prunegraph.runs.report.plots import (
    SEED_COLOURS,
    SMALL,
    STYLE,
    Plot,
    draw_once,
    mark,
    new_figure,
    save_plots,
)
from prunegraph.runs.report.report import COSTS, SCHEMA, read_report, read_rows
from prunegraph.runs.report.tables import by_method, minutes, percent, spread
from prunegraph.runs.report.verdict import DENSE, best_baseline, column, is_agent

PAGE_TEMPLATE = "summary.html"

METRICS = {
    "search_accuracy": "Search split, recalibrated",
    "test_accuracy_recalibrated": "Test split, recalibrated",
    "test_accuracy_finetuned": "Test split, fine-tuned",
}
"""The accuracies of a row, and what a table of them is called."""

AVERAGES = (*COSTS, "networks_evaluated")
"""Of these a summary holds the mean over searches."""

REMAINS = {"macs": "Multiply-adds that remain", "params": "Parameters that remain"}
"""Costs of a row's network, and what a table of them is called."""

MINUTES = "Minutes to choose a mask"
"""Heading of the table of search times."""

NUM_RIVALS = 3
"""Baselines that are drawn beside the agent."""

Cells = tuple[Sequence[str], list[tuple[str, ...]]]
"""The heads of a table and its rows."""


def summarise(members: Sequence[RunFolder]) -> dict[str, Any]:
    """Return the summary of finished comparisons, made of their reports."""
    return {
        "schema": SCHEMA,
        "command": ComparisonsConfig.command,
        "comparisons": [_entry(member) for member in members],
    }


def _entry(member: RunFolder) -> dict[str, Any]:
    content = read_report(member)
    rows = read_rows(content)
    tuned = [row for row in rows if row.test_accuracy_finetuned is not None]
    return {
        "folder": member.path.name,
        "report": file_digest(member.file(RunFolder.REPORT)),
        "dense_weights": content["files"].get(RunFolder.DENSE),
        **{key: content[key] for key in ("arch", "dataset", "budget", "dense")},
        "stage_one_verdict": content.get("stage_one_verdict"),
        "verdict": [content["verdict"], content["verdict_reason"]],
        "finetuned_masks": len({row.seed for row in tuned if is_agent(row)}),
        "best_baseline": best_baseline(rows),
        "best_baseline_finetuned": best_baseline(tuned),
        "methods": {
            name: {
                **{metric: column(own, metric) for metric in METRICS},
                **{kind: float(np.mean(column(own, kind))) for kind in AVERAGES},
                "seconds": column(own, "seconds"),
                "role": own[0].role,
            }
            for name, own in by_method(rows)
        },
    }


def write_summary(
    config: ComparisonsConfig, folder: RunFolder, members: Sequence[RunFolder]
) -> dict[str, Any]:
    """Write the summary of all comparisons as JSON and as a page, and return it."""
    summary = summarise(members)
    plots = draw_budgets(summary)
    save_plots(plots, folder.file(folder.PLOTS))
    write_text(folder.file(RunFolder.PAGE), summary_page(config, summary, plots))
    write_json(folder.file(RunFolder.SUMMARY), summary)  # it says that all is finished
    return summary


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return the table that is printed: the agent beside the best baseline."""
    table = Table(title=escape(_title(summary)))
    heads, rows = digest_cells(summary)
    for head in heads:
        table.add_column(head, justify="right" if head != heads[0] else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def digest_cells(summary: Mapping[str, Any]) -> Cells:
    """Return dense, agent, best baseline and verdict of each comparison, before and after."""
    rows = []
    for entry in summary["comparisons"]:
        dense, name = entry["dense"], entry["folder"]
        cells = _digest(entry, "test_accuracy_recalibrated", entry["best_baseline"])
        verdict = (entry["stage_one_verdict"] or [None])[0]
        rows.append((name, "recalibration", spread([dense["test_accuracy"]]), *cells, verdict))
        if dense["test_accuracy_finetuned"] is not None:
            cells = _digest(entry, "test_accuracy_finetuned", entry["best_baseline_finetuned"])
            tuned = spread([dense["test_accuracy_finetuned"]])
            after = "fine-tuning" if entry["finetuned_masks"] != 1 else "fine-tuning one mask"
            rows.append((name, after, tuned, *cells, entry["verdict"][0]))
    heads = ("comparison", "after", "dense", "agent", "best baseline", "verdict")
    return heads, [(*row[:-1], row[-1] or "none") for row in rows]


def _digest(entry: Mapping[str, Any], metric: str, baseline: str | None) -> tuple[str, str]:
    """Return the agent's accuracy and the best baseline's."""
    methods = entry["methods"]
    agent = [v for own in methods.values() if own["role"] == "agent" for v in own[metric]]
    rival = "" if baseline is None else f"{baseline} {spread(methods[baseline][metric])}"
    return spread(agent), rival


def metric_cells(summary: Mapping[str, Any], metric: str) -> Cells:
    """Return the table of one accuracy: a row a method, a column a comparison.

    Methods that every comparison has come first, the best on the search split on average first.
    """
    return _cells(summary, lambda _, found: spread(found[metric]))


def minutes_cells(summary: Mapping[str, Any]) -> Cells:
    """Return the table of what the choice of a mask costs: a row a method, where it was timed."""
    return _cells(summary, lambda _, found: minutes(found["seconds"]))


def remaining_cells(summary: Mapping[str, Any], kind: str) -> Cells:
    """Return the table of one cost of the pruned networks, as a share of the dense one's."""
    return _cells(summary, lambda entry, found: percent(found[kind] / entry["dense"][kind]))


def _cells(
    summary: Mapping[str, Any], cell: Callable[[Mapping[str, Any], Mapping[str, Any]], str]
) -> Cells:
    """Return a row a method and a column a comparison; ``cell`` gets that, and its method."""
    entries = summary["comparisons"]
    search = _mean_search(entries)
    count = {name: sum(name in entry["methods"] for entry in entries) for name in search}
    rows = []
    for name in sorted(search, key=lambda each: (-count[each], -search[each], each)):
        found = [(entry, entry["methods"].get(name)) for entry in entries]
        cells = ["" if method is None else cell(entry, method) for entry, method in found]
        if any(cells):
            rows.append((name, *cells))
    return ["method", *(entry["folder"] for entry in entries)], rows


def _mean_search(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return each method's search accuracy, on average over the comparisons that have it."""
    found: dict[str, list[float]] = {}
    for entry in entries:
        for name, values in entry["methods"].items():
            found.setdefault(name, []).append(float(np.mean(values["search_accuracy"])))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _tables(summary: Mapping[str, Any]) -> list[tuple[str, Sequence[str], list[tuple[str, ...]]]]:
    tables = [(label, *metric_cells(summary, metric)) for metric, label in METRICS.items()]
    tables += [(label, *remaining_cells(summary, kind)) for kind, label in REMAINS.items()]
    tables.append((MINUTES, *minutes_cells(summary)))
    return [table for table in tables if table[2]]


def _title(summary: Mapping[str, Any]) -> str:
    entries = summary["comparisons"]
    names = ", ".join(dict.fromkeys(entry["arch"] for entry in entries))
    return f"{names} on {entries[0]['dataset']}: {len(entries)} comparisons"


def summary_page(
    config: ComparisonsConfig, summary: Mapping[str, Any], plots: Mapping[str, Plot]
) -> str:
    """Return the page of several comparisons as HTML."""
    found = [item for entry in summary["comparisons"] for item in entry["methods"].items()]
    return render(
        PAGE_TEMPLATE,
        title=_title(summary),
        digest=digest_cells(summary),
        folders=[entry["folder"] for entry in summary["comparisons"]],
        tables=_tables(summary),
        own=[*{name for name, method in found if method["role"] == "agent"}],
        command=command_line(config),
        plots=plots,
    )


def draw_budgets(summary: Mapping[str, Any]) -> dict[str, Plot]:
    """Draw accuracy against multiply-adds for each network that was compared at several budgets."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for entry in summary["comparisons"]:
        groups.setdefault((entry["arch"], entry["dense_weights"]), []).append(entry)
    several = [entries for entries in groups.values() if len(entries) > 1]
    with mpl.rc_context(STYLE):
        return {f"pareto{number}": _draw(each) for number, each in enumerate(several)}


def _draw(entries: Sequence[Mapping[str, Any]]) -> Plot:
    """Draw one network's lines: the agent and the baselines that are best on the search split."""
    dense = entries[0]["dense"]
    common = [name for name in entries[0]["methods"] if all(name in e["methods"] for e in entries)]
    search, methods = _mean_search(entries), entries[0]["methods"]
    agents = [name for name in common if methods[name]["role"] == "agent"]
    baselines = [name for name in common if methods[name]["role"] == "baseline"]
    rivals = sorted(baselines, key=lambda name: -search[name])[:NUM_RIVALS]
    figure, axes = new_figure(3.6)
    words = []
    for name, colour in zip([*agents, *rivals], SEED_COLOURS, strict=False):
        points = [(100 * e["methods"][name]["macs"] / dense["macs"], e) for e in entries]
        points.sort(key=lambda point: point[0])
        axes.plot([], [], color=colour, label=name)
        for metric, line in (("recalibrated", ":"), ("finetuned", "-")):
            found = [e["methods"][name][f"test_accuracy_{metric}"] for _, e in points]
            known = [[100 * value for value in values] for values in found]
            if not all(known):
                continue
            axes.errorbar(
                [macs for macs, _ in points],
                [np.mean(values) for values in known],
                yerr=[np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in known],
                color=colour,
                linestyle=line,
                marker="o",
                markersize=4,
                markerfacecolor=colour if line == "-" else "none",
            )
            if metric == "recalibrated":
                means = zip(points, known, strict=True)
                shown = (f"{macs:.0f} %: {np.mean(values):.1f} %" for (macs, _), values in means)
                words.append(f"{name} {', '.join(shown)}")
    tuned = dense["test_accuracy_finetuned"]
    axes.plot(100, 100 * dense["test_accuracy"], **mark(DENSE, tuned is None))
    if tuned is not None:
        axes.plot(100, 100 * tuned, **mark(DENSE, True))
    axes.set_xlim(right=104)
    axes.set_xlabel("multiply-adds that remain, %")
    axes.set_ylabel("test accuracy, %")
    figure.legend(loc="outside upper center", ncols=2, fontsize=SMALL)
    draw_once(figure)
    after = "; solid, filled: after fine-tuning" if tuned is not None else ""
    return Plot(
        figure=figure,
        caption=f"{entries[0]['arch']}, {len(entries)} budgets: "
        f"{'the agent and ' * bool(agents)}the best baselines. "
        f"Dotted, hollow: after recalibration{after}; star: dense.",
        text=f"Line plot of test accuracy after recalibration against multiply-adds. "
        f"{'; '.join(words)}; dense {percent(dense['test_accuracy'])}.",
    )
