"""The page of a run: ``report.html``, one file that needs no network, made from the run's folder.

It is derived: the report does not list it, and the same command on a finished run makes it anew.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prunegraph.errors import ArtefactError
from prunegraph.experiment.candidates import MASKS_FILE, read_masks
from prunegraph.experiment.config import CommonConfig
from prunegraph.experiment.console import Console, seconds_in_words
from prunegraph.experiment.folder import PAGE_FILE, RunFolder
from prunegraph.experiment.options import command_line
from prunegraph.experiment.plots import Findings, Plot, draw, to_svg
from prunegraph.experiment.report import (
    METHOD_COLUMNS,
    method_cells,
    methods_table,
    percent,
    read_report,
    title,
)
from prunegraph.experiment.speed import latency_warning
from prunegraph.experiment.verdict import is_agent, verdict_line
from prunegraph.files import write_text
from prunegraph.graph import StructureGraph
from prunegraph.reading import checked, read_json

HISTORY_FILE = "history.json"
"""Learning curves of a run's searches."""

HISTORY = dict[str, dict[str, list[float]]]
"""What it holds: name of a search -> name of a figure -> its value in each update."""

LIMITS = {
    "keep_macs": "at most {:.4g} of the multiply-adds",
    "keep_params": "at most {:.4g} of the parameters",
    "max_memory": "at most {:,} bytes of activations",
    "max_latency": "at most {:g} ms a forward",
    "round_to": "widths in multiples of {}",
}
"""What each limit of a budget asks, in words."""

Facts = list[tuple[str, ...]]
"""Rows of a table, the first cell of each its heading."""


def show_finished(
    config: CommonConfig,
    members: Sequence[RunFolder],
    graphs: Sequence[StructureGraph],
    console: Console,
) -> dict[str, Any]:
    """Print the table of a finished run, make its pages anew, and return its report.

    Args:
        config: the run's options.
        members: the run folder, and those of further networks.
        graphs: the structure of each network.
        console: where the table goes.
    """
    members[0].finish()  # in case that the run was killed before it did
    findings = [read_findings(member, graph) for member, graph in zip(members, graphs, strict=True)]
    content = dict(findings[0].content)
    path = members[0].path
    console.say(f"{path} is finished; this is its report (a new --out runs it anew)")
    console.table(methods_table(content))
    console.say(verdict_line(content))
    for member, found in zip(members, findings, strict=True):
        write_page(config, member, found, draw(found))
    console.say(f"the report as a page: {members[0].file(PAGE_FILE)}")
    return content


def read_findings(folder: RunFolder, graph: StructureGraph) -> Findings:
    """Read what a finished run found.

    Args:
        folder: of one network.
        graph: its structure, analysed anew.

    Raises:
        ArtefactError: a file is missing or damaged, or the network is built in another way now.
    """
    content = read_report(folder)
    if content["graph"] != graph.fingerprint():
        msg = (
            f"{folder.path} was made of another {content['arch']}: its structure was "
            f"{content['graph']}, it is {graph.fingerprint()} now; name a new --out"
        )
        raise ArtefactError(msg)
    path = folder.file(HISTORY_FILE)
    return Findings(
        content=content,
        graph=graph,
        masks=read_masks(folder.file(MASKS_FILE), graph),
        history=checked(read_json(path), HISTORY, str(path)) if path.is_file() else {},
    )


def write_page(
    config: CommonConfig, folder: RunFolder, findings: Findings, plots: Mapping[str, Plot]
) -> None:
    """Write ``report.html`` into a run folder."""
    write_text(folder.file(PAGE_FILE), page(config, findings, plots))


def page(config: CommonConfig, findings: Findings, plots: Mapping[str, Plot]) -> str:
    """Return the page of a run as HTML; all text is escaped by the template.

    Args:
        config: the run's options, for the command that repeats it.
        findings: what is shown.
        plots: its figures.
    """
    content = findings.content
    methods = method_cells(content)
    environment = Environment(
        loader=PackageLoader("prunegraph.experiment"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(PAGE_FILE).render(
        title=title(content),
        content=content,
        asked=", ".join(LIMITS[name].format(value) for name, value in content["budget"].items()),
        warning=latency_warning(content),
        results=result_rows(content),
        columns=METHOD_COLUMNS,
        methods=methods,
        own=[row[0] for row in methods if is_agent(row[0].partition(" ")[0])],
        widths=width_rows(findings),
        rivals=list(findings.rivals),
        agreement=agreement_rows(content),
        cost=cost_rows(content),
        origin=origin_rows(content),
        command=command_line(config),
        plots=plots,
        svgs={name: Markup(to_svg(plot, name)) for name, plot in plots.items()},
    )


def result_rows(content: Mapping[str, Any]) -> Facts:
    """Return what the network was and is: name, before, after, what remains."""
    dense, pruned = content["dense"], content["pruned"]
    if pruned is None:
        return []
    rows = [
        _sizes("multiply-adds", dense["macs"], pruned["macs"], ""),
        _sizes("parameters", dense["params"], pruned["params"], ""),
    ]
    if "peak_memory" in content:
        memory = content["peak_memory"]
        rows.append(_sizes("activations alive at once", memory["dense"], memory["pruned"], "B"))
    if "latency_ms" in content:
        times = content["latency_ms"]
        before, after = times["dense"], times["pruned"]
        rows.append(
            ("time of one image", f"{before:.3g} ms", f"{after:.3g} ms", percent(after / before))
        )
    for name, before, after in (
        ("test accuracy", "test_accuracy", "test_accuracy_recalibrated"),
        ("the same, fine-tuned", "test_accuracy_finetuned", "test_accuracy_finetuned"),
    ):
        if dense[before] is not None and pruned[after] is not None:
            change = 100 * (pruned[after] - dense[before])
            rows.append(
                (name, percent(dense[before], 2), percent(pruned[after], 2), f"{change:+.2f} pts")
            )
    return rows


def _sizes(name: str, before: float, after: float, unit: str) -> tuple[str, ...]:
    return (name, _large(before, unit), _large(after, unit), percent(after / before))


def _large(value: float, unit: str) -> str:
    """Return a number with four digits and a prefix: ``40.55 M``."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000 or prefix == "T":
            break
        value /= 1000
    return f"{value:.4g} {prefix}{unit}".strip()


def width_rows(findings: Findings) -> Facts:
    """Return the widths of each group: dense, pruned, of the best baselines."""
    if findings.mask is None:
        return []
    graph = findings.graph
    kept = graph.group_widths(findings.mask)
    return [
        (name, str(size), *(str(widths[name]) for widths in (kept, *findings.rivals.values())))
        for name, size in graph.group_widths(graph.dense_mask()).items()
    ]


def agreement_rows(content: Mapping[str, Any]) -> Facts:
    """Return how far the mask agrees with criteria at its own widths."""
    return [
        (
            name,
            percent(found["overlap"]),
            percent(found["chance"]),
            percent((found["overlap"] - found["chance"]) / (1 - found["chance"]), 0),
        )
        for name, found in content.get("agreement", {}).items()
        if found
    ]


def cost_rows(content: Mapping[str, Any]) -> Facts:
    """Return what the search cost."""
    search = content["search"]
    if search is None:
        return []
    rows: Facts = [
        ("pruned networks run", f"{search['networks_evaluated']:,}"),
        ("wall time", seconds_in_words(search["seconds"])),
    ]
    if search["evaluation_seconds"]:
        rows.append(("of it in evaluations", seconds_in_words(search["evaluation_seconds"])))
    if "seeds" in search:
        rows.insert(0, ("seeds", ", ".join(map(str, search["seeds"]))))
    if content["repaired"] is not None:
        rows.append(("bits that the budget repaired", percent(content["repaired"])))
    return rows


def origin_rows(content: Mapping[str, Any]) -> Facts:
    """Return where a run's figures come from."""
    rows = [(name, str(value)) for name, value in content["machine"].items() if value is not None]
    rows += content.get("versions", {}).items()
    rows += [
        (f"{name} images", f"{split['images']:,}, fingerprint {split['fingerprint']}")
        for name, split in content["data"].items()
    ]
    recipe = ", ".join(f"{name} {value}" for name, value in content["recipe"].items())
    return [
        ("seed", str(content["seed"])),
        *rows,
        ("fine-tune", recipe),
        ("structure", content["graph"]),
    ]
