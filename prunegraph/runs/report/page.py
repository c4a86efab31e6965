"""The page of a run: ``report.html``, one file that needs no network, made from the run's folder.

It is derived: the report does not list it, and the same command on a finished run makes it anew.
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prunegraph.artefacts.pruned import artefact_paths
from prunegraph.core.console import Console, seconds_in_words
from prunegraph.core.errors import ArtefactError
from prunegraph.core.files import write_text
from prunegraph.core.reading import checked, read_json
from prunegraph.core.user_code import is_factory
from prunegraph.graph import StructureGraph
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.config import CommonConfig
from prunegraph.runs.options.yaml_file import command_line
from prunegraph.runs.report.plots import Findings, Plot, draw, to_svg
from prunegraph.runs.report.report import pruned_folder, read_report, read_rows
from prunegraph.runs.report.speed import latency_warning
from prunegraph.runs.report.tables import (
    IN_PLACE,
    custom_labels,
    custom_seed,
    gains,
    method_cells,
    method_columns,
    methods_table,
    percent,
    title,
)
from prunegraph.runs.report.verdict import (
    DENSE,
    VERDICTS,
    Unit,
    is_agent,
    verdict_line,
)
from prunegraph.runs.store import read_masks

HISTORY = dict[str, dict[str, list[float]]]
"""What it holds: name of a search -> name of a figure -> its value in each update."""

LIMITS = {
    "keep_macs": "at most {:.4g} of the multiply-adds",
    "keep_params": "at most {:.4g} of the parameters",
    "max_memory": "at most {:,} bytes of activations",
    "max_latency": "at most {:g} ms a forward",
    "round_to": "widths in multiples of {}",
    "depth": "whole sub-layers may be removed",
    "uniform": "the same widths in every layer of a kind",
    "sparsity": "{:.4g} of the weights zero",
    "pattern": "zeros in the pattern {}",
}
"""What each limit of a budget asks, in words."""

COSTS = {"macs": "multiply-adds", "params": "parameters"}
"""Costs of a network and what they are called."""

MOST = 1e9
"""The largest value of a learning curve that can be drawn beside others."""

Facts = list[tuple[str, ...]]
"""Rows of a table, the first cell of each its heading."""


def show_finished(
    config: CommonConfig,
    members: Sequence[RunFolder],
    graphs: Sequence[StructureGraph | None],
    console: Console,
) -> dict[str, Any]:
    """Print the table of a finished run, make its pages anew, and return its report.

    Args:
        config: the run's options.
        members: the run folder, and those of further networks.
        graphs: the structure of each network.
        console: where the table goes.
    """
    members[0].finish(members[1:])  # in case that the run was killed before it did
    findings = [read_findings(member, graph) for member, graph in zip(members, graphs, strict=True)]
    content = dict(findings[0].content)
    path = members[0].path
    console.say(f"{path} is finished; this is its report (a new --out runs it anew)")
    show_end(content, console)
    if is_judged(content):
        console.say(verdict_line(content))
    try:
        for member, found in zip(members, findings, strict=True):
            write_page(config, member, found, draw(found))
    except ArtefactError as error:  # its medium may be read-only
        console.say(f"warning: the report's page stays as it is: {error}")
    console.say(f"the report as a page: {members[0].file(RunFolder.PAGE)}")
    return content


def show_end(content: Mapping[str, Any], console: Console) -> None:
    """Print the table of a run, what was got, and a warning if that is too slow."""
    console.table(methods_table(content))
    for line in gains(content):
        console.say(line)
    warning = latency_warning(content)
    if warning is not None:
        console.say(f"warning: {warning}")


def read_findings(folder: RunFolder, graph: StructureGraph | None) -> Findings:
    """Read what a finished run found.

    Args:
        folder: of one network.
        graph: its structure, analysed anew; None where single weights became zero.

    Raises:
        ArtefactError: a file is missing or damaged, or the network is built in another way now.
    """
    content = read_report(folder)
    if graph is not None and content.get("graph") != graph.fingerprint():
        msg = (
            f"{folder.path} was made of another {content['arch']}: its structure was "
            f"{content.get('graph')}, it is {graph.fingerprint()} now; name a new --out"
        )
        raise ArtefactError(msg)
    masks = read_masks(folder.file(RunFolder.MASKS), graph)
    digests = [row.digest for row in read_rows(content) if row.name != DENSE]
    for digest in [*digests, content["pruned"]["mask_digest"]]:
        masks[digest]  # raises if it is not there
    path = folder.file(RunFolder.HISTORY)
    history = checked(read_json(path), HISTORY, str(path)) if path.is_file() else {}
    for run, figures in history.items():
        _check_curves(figures, f"{path}: {run}")
    return Findings(content=content, structure=graph, masks=masks, history=history)


def _check_curves(figures: dict[str, list[float]], where: str) -> None:
    """Raise ArtefactError if the learning curves of a search lack figures or points."""
    checked(figures, {"networks": list[float], "accuracy": list[float]}, where)
    updates = {len(values) for values in figures.values()}
    if len(updates) > 1 or 0 in updates:
        msg = f"{where}: its figures have not equally many points: the file is damaged"
        raise ArtefactError(msg)
    if any(abs(value) > MOST for values in figures.values() for value in values):
        msg = f"{where}: a figure lies beyond {MOST:.0e}: the file is damaged"
        raise ArtefactError(msg)


def write_page(
    config: CommonConfig, folder: RunFolder, findings: Findings, plots: Mapping[str, Plot]
) -> None:
    """Write ``report.html`` into a run folder."""
    write_text(folder.file(RunFolder.PAGE), page(config, folder, findings, plots))


def page(
    config: CommonConfig, folder: RunFolder, findings: Findings, plots: Mapping[str, Plot]
) -> str:
    """Return the page of a run as HTML; all text is escaped by the template.

    Args:
        config: the run's options, for the command that repeats it.
        folder: where its files are.
        findings: what is shown.
        plots: its figures.
    """
    content = findings.content
    environment = Environment(
        loader=PackageLoader("prunegraph.runs.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(RunFolder.PAGE).render(
        title=title(content),
        content=content,
        asked=", ".join(LIMITS[name].format(value) for name, value in content["budget"].items()),
        judged=is_judged(content),
        verdict=VERDICTS.get(content["verdict"]),
        first_verdict=first_verdict(content),
        warning=latency_warning(content),
        in_place=IN_PLACE,
        results=result_rows(content, weights_on_disk(folder, content)),
        columns=method_columns(content),
        methods=method_cells(content),
        own=sorted(custom_labels(content)),
        seed=custom_seed(content),
        unit=findings.unit,
        widths=[] if findings.structure is None else width_rows(findings),
        rivals=[] if findings.structure is None else list(findings.rivals),
        zeros=zero_rows(content),
        selected=selection_rows(content),
        groups=group_rows(content),
        clients=client_rows(content),
        cost=cost_rows(content),
        origin=origin_rows(content),
        next_steps=next_steps(folder, content),
        command=command_line(config),
        plots=plots,
        svgs={name: Markup(to_svg(plot, name)) for name, plot in plots.items()},
    )


def is_judged(content: Mapping[str, Any]) -> bool:
    """Return whether a report has rows of the agent, of which a verdict tells."""
    return any(map(is_agent, read_rows(content)))


def weights_on_disk(folder: RunFolder, content: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the bytes of the dense and of the pruned weights; None if a file is not there."""
    where = pruned_folder(folder, content)
    if where is None:
        return None
    dense, pruned = folder.file(RunFolder.DENSE), artefact_paths(where)[1]
    if not (dense.is_file() and pruned.is_file()):
        return None
    return dense.stat().st_size, pruned.stat().st_size


def next_steps(folder: RunFolder, content: Mapping[str, Any]) -> Facts:
    """Return what can be done with a run, each with its command.

    ``RUN`` stands for the run's folder: the page is the same wherever that lies.
    """
    trust = ["--arch", content["arch"]] if is_factory(content["arch"]) else []
    run = folder.path if folder.file(RunFolder.CONFIG).is_file() else folder.path.parent
    where = pruned_folder(folder, content)
    if where is not None and where.name == folder.PRUNED:
        where = where.parent  # which the command knows
    steps = [("Write the pruned network as a file for other programs", "export", where, trust)]
    data = ["--dataset", content["dataset"]] if is_factory(content["dataset"]) else []
    steps.append(("Check every figure of this page from the files", "verify", run, trust + data))
    return [
        (what, shlex.join(["prunegraph", command, str("RUN" / path.relative_to(run)), *named]))
        for what, command, path, named in steps
        if path is not None
    ]


def result_rows(content: Mapping[str, Any], weights: tuple[int, int] | None = None) -> Facts:
    """Return what the network was and is: name, before, after, what remains.

    Args:
        content: the report.
        weights: bytes of the weights on disk, before and after.
    """
    dense, pruned, unit = content["dense"], content["pruned"], Unit.of(content)
    rows: Facts = []
    if "sparsity" in pruned:
        for what, name in (("prunable weights", "sparsity"), ("network", "network_sparsity")):
            rows.append((f"zeros of the {what}", "0.00 %", percent(pruned[name], 2), ""))
    else:
        rows += [_sizes(what, dense[name], pruned[name], "") for name, what in COSTS.items()]
    if weights is not None:
        rows.append(_sizes("weights on disk", *weights, "B"))
    if "latency_ms" in content:
        memory, times = content["peak_memory"], content["latency_ms"]
        before, after = times["dense"], times["pruned"]
        rows += [
            _sizes("activations alive at once", memory["dense"], memory["pruned"], "B"),
            _times("time of one image", before, after),
        ]
        if many := times.get("batch"):
            rows.append(_times(f"of {many} at once", times["dense_batch"], times["pruned_batch"]))
    for name, before, after in (
        (f"test {unit.name}", "test_accuracy", "test_accuracy_recalibrated"),
        ("the same, fine-tuned", "test_accuracy_finetuned", "test_accuracy_finetuned"),
    ):
        if dense[before] is not None and pruned[after] is not None:
            change = unit.shown(pruned[after]) - unit.shown(dense[before])
            points = " pts" * (unit.scale > 1.0)
            words = unit.words(dense[before], 2), unit.words(pruned[after], 2)
            rows.append((name, *words, f"{change:+.2f}{points}"))
    return rows


def zero_rows(content: Mapping[str, Any]) -> Facts:
    """Return the share of zeros in each weight of the pruned network."""
    densities = content["pruned"].get("densities", {})
    return [(name, percent(1.0 - density, 2)) for name, density in densities.items()]


def selection_rows(content: Mapping[str, Any]) -> Facts:
    """Return what selecting among candidates brought each method, in its last level."""
    rows: Facts = []
    for name, record in content.get("selection", {}).items():
        told, gain = record["rank_correlation"], record["gain"]
        numbers = (
            "too few" if told is None else f"{told:.2f}",
            f"{gain[0]:.4f}",
            f"{gain[-1]:.4f}",
        )
        rows.append((name, str(len(gain)), *numbers))
    return rows


def group_rows(content: Mapping[str, Any]) -> Facts:
    """Return what methods tell of the masks of groups, below a row of headings; often nothing."""
    told = content.get("groups", {})
    names = list(dict.fromkeys(name for group in told.values() for name in group["scores"]))
    unit = Unit.of(content)
    rows: Facts = [("method", "active", "stored", "overlap", *names)] * bool(told)
    for method, group in told.items():
        scores = [unit.text(unit.score(group["scores"][name])) for name in names]
        shares = [percent(group[share]) for share in ("active", "stored", "overlap")]
        rows.append((method, *shares, *scores))
    return rows


def client_rows(content: Mapping[str, Any]) -> Facts:
    """Return how good a federation's network is for its clients; often nothing."""
    unit, rows = Unit.of(content), list[tuple[str, ...]]()
    for method, told in content.get("clients", {}).items():
        samples = f"{min(told['samples'])} to {max(told['samples'])}"
        shown = [f"{unit.scale * told[name]:.2f}" for name in ("mean", "deviation", "min", "max")]
        rows.append((method, str(len(told["samples"])), samples, *shown))
    return rows


def _sizes(name: str, before: float, after: float, unit: str) -> tuple[str, ...]:
    return (name, _large(before, unit), _large(after, unit), percent(after / before))


def _times(name: str, before: float, after: float) -> tuple[str, ...]:
    return (name, f"{before:.3g} ms", f"{after:.3g} ms", percent(after / before))


def _large(value: float, unit: str) -> str:
    """Return a number with four digits and a prefix: ``40.55 M``."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000 or prefix == "T":
            break
        value /= 1000
    return f"{value:.4g} {prefix}{unit}".strip()


def width_rows(findings: Findings) -> Facts:
    """Return the widths of each group: dense, pruned, of the best baselines."""
    graph = findings.graph
    kept = graph.group_widths(findings.mask)
    return [
        (name, str(size), *(str(widths[name]) for widths in (kept, *findings.rivals.values())))
        for name, size in graph.group_widths(graph.dense_mask()).items()
    ]


def cost_rows(content: Mapping[str, Any]) -> Facts:
    """Return what the search cost."""
    search = content["search"]
    if search is None:
        return []
    rows: Facts = [
        ("pruned networks run", f"{search['networks_evaluated']:,}"),
        (
            "time" if "decision" in content else "time, one search after the other",
            seconds_in_words(search["seconds"]),
        ),
    ]
    if search["evaluation_seconds"]:
        share = search["evaluation_seconds"] / search["seconds"]
        words = f"{seconds_in_words(search['evaluation_seconds'])} ({percent(share, 0)})"
        rate = 60 * search["networks_evaluated"] / search["seconds"]
        rows += [
            ("in evaluations, all workers together", words),
            ("networks a minute", f"{rate:.3g}"),
        ]
    decision = content.get("decision")
    if decision is not None:  # of an applied policy
        rows += [
            ("the policy starts from", decision["start"]),
            ("of what it learned, it adds", percent(decision["share"], 0)),
        ]
    if "seeds" in search:
        rows.insert(0, ("seeds", ", ".join(map(str, search["seeds"]))))
    correlation = content.get("proxy_rank_correlation")
    if correlation is not None:
        name = f"rank correlation of search and fine-tuned {content['score_name']}"
        rows.append((name, f"{correlation:.2f}"))
    return rows


def first_verdict(content: Mapping[str, Any]) -> str | None:
    """Return the verdict of a comparison before its fine-tunes; None if that is the verdict."""
    verdict, reason = content.get("stage_one_verdict", (None, content["verdict_reason"]))
    if reason == content["verdict_reason"]:
        return None
    return str(reason) if verdict is None else f"{verdict}: {reason}"


def origin_rows(content: Mapping[str, Any]) -> Facts:
    """Return where a run's figures come from."""
    rows = [(name, str(value)) for name, value in content["machine"].items() if value is not None]
    rows += content["versions"].items()
    rows += [
        (f"{name} samples", f"{split['samples']:,}, fingerprint {split['fingerprint']}")
        for name, split in content["data"].items()
    ]
    return [
        ("seed", str(content["seed"])),
        *rows,
        ("fine-tune", ", ".join(f"{name} {value}" for name, value in content["recipe"].items())),
        *([("structure", content["graph"])] if "graph" in content else []),
    ]
