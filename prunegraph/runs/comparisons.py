"""``prunegraph compare``: one comparison, or one of each network at each budget and a summary."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from prunegraph.core.console import Console
from prunegraph.core.errors import ArtefactError, ConfigError
from prunegraph.core.files import file_digest, write_bytes, write_json
from prunegraph.runs.choose import check_names
from prunegraph.runs.folder import RunFolder, open_run, slug
from prunegraph.runs.options.compare import CompareConfig, ComparisonsConfig
from prunegraph.runs.options.yaml_file import save_config
from prunegraph.runs.plan import budget_name, make_plan
from prunegraph.runs.report.report import SCHEMA, read_report, read_rows
from prunegraph.runs.report.tables import spread
from prunegraph.runs.report.verdict import Unit, best_baseline, column, is_agent
from prunegraph.runs.runner import check_run, run_plan
from prunegraph.runs.target import Target
from prunegraph.runs.tasks import arch_of, load_target

MAX_NAME = 100
"""Letters of a default run folder's name."""


def run_comparisons(config: ComparisonsConfig, console: Console) -> dict[str, Any]:
    """Make each comparison that is not made yet; return the only one's report, or the summary."""
    parts = config.comparisons()
    if len(parts) == 1:
        return run_plan(parts[0], console)
    plan = make_plan(parts[0])
    check_names([name for name in plan.methods if name != plan.agent])
    names = folder_names(parts, [arch_of(part) for part in parts])
    folder = open_run(config, config.out, f"compare-{'+'.join(names)}"[:MAX_NAME])
    members = [RunFolder(path=folder.path / name) for name in names]
    parts = tuple(
        replace(part, out=member.path) for part, member in zip(parts, members, strict=True)
    )
    missing = [n for n, member in enumerate(members) if not member.finished]
    for number in set(range(len(parts))) - {*missing}:
        open_run(parts[number], members[number].path, "")  # raises if its options were others
    if folder.finished and not missing:
        folder.finish(members)  # in case that the run was killed before it did
        console.say(f"{folder.path} is finished; this is its summary (a new --out runs it anew)")
    else:
        _look_ahead([parts[number] for number in missing])
        folder.file(RunFolder.SUMMARY).unlink(missing_ok=True)  # of one that lost a comparison
        with folder.started(config):
            for number in missing:
                console.say(f"comparison {number + 1} of {len(parts)}: {names[number]}")
                _share_dense(parts, members, number)
                run_plan(parts[number], console)
            check_same_dense(parts, members)
            write_json(folder.file(RunFolder.SUMMARY), summarise(members))  # it is finished
            folder.finish(members)
    check_same_dense(parts, members)
    summary = summarise(members)
    console.table(summary_table(summary, members))
    console.say(f"written to {folder.path}")
    return summary


def folder_names(parts: Sequence[CompareConfig], archs: Sequence[str]) -> list[str]:
    """Return the folder of each comparison: network and budget.

    The weights' name is part of it where networks of one name have several, and a number where even
    that repeats.
    """
    weights = Counter(arch for arch, _ in {*zip(archs, (p.weights for p in parts), strict=True)})
    names: list[str] = []
    for part, arch in zip(parts, archs, strict=True):
        stem = f"-{slug(part.weights.stem)}" if weights[arch] > 1 and part.weights else ""
        names.append(f"{slug(arch)}{stem}-{budget_name(part.budget())}")
    return [
        name if names.count(name) == 1 else f"{name}-{names[:number].count(name)}"
        for number, name in enumerate(names)
    ]


def _look_ahead(parts: Sequence[CompareConfig]) -> None:
    """Check networks, data and budgets of all comparisons before anything long.

    Raises:
        PruneGraphError: something is missing, damaged, contradictory, or cannot be met.
    """
    targets: dict[tuple[str | None, Path | None], Target] = {}
    for part in parts:
        network = (part.arch, part.weights)
        if network not in targets:
            targets[network] = load_target(part, part.budget())
        graph = targets[network].structure
        if graph is not None:
            scores = np.zeros(graph.num_units, dtype=np.float32)
            graph.project(scores, part.budget().without_latency())
        check_run(make_plan(part), part, [targets[network]])
    names = sorted({target.data_name for target in targets.values()})
    if len(names) > 1:
        msg = f"the networks are for {', '.join(names)}: compare those of one data set"
        raise ConfigError(msg)


def _share_dense(parts: Sequence[CompareConfig], members: Sequence[RunFolder], number: int) -> None:
    """Give a comparison the dense network that one of the same network was made with.

    Trained again, with other threads or on a GPU, it would differ in its last digits.
    """
    wanted, folder = parts[number], members[number]
    for part, member in zip(parts, members, strict=True):
        same = (part.arch, part.weights) == (wanted.arch, wanted.weights)
        dense = member.file(RunFolder.DENSE)
        if same and member.finished and not folder.file(RunFolder.DENSE).is_file():
            folder.path.mkdir(parents=True, exist_ok=True)
            save_config(wanted, folder.file(RunFolder.CONFIG))
            for path in (dense.with_suffix(".json"), dense):
                write_bytes(folder.file(path.name), path.read_bytes())
            return


def check_same_dense(parts: Sequence[CompareConfig], members: Sequence[RunFolder]) -> None:
    """Raise ArtefactError if comparisons of one network began with different weights."""
    seen: dict[tuple[str | None, Path | None], tuple[RunFolder, str | None]] = {}
    for part, member in zip(parts, members, strict=True):
        digest = read_report(member)["files"].get(RunFolder.DENSE)
        first, expected = seen.setdefault((part.arch, part.weights), (member, digest))
        if digest != expected:
            msg = (
                f"{member.path} was made of other weights than {first.path}: delete the older one "
                "and give the command again"
            )
            raise ArtefactError(msg)


def summarise(members: Sequence[RunFolder]) -> dict[str, Any]:
    """Return the summary of finished comparisons, made of their reports alone."""
    entries = []
    for member in members:
        content = read_report(member)
        entries.append(
            {
                "folder": member.path.name,
                "report": file_digest(member.file(RunFolder.REPORT)),
                **{key: content[key] for key in ("arch", "dataset", "budget", "score_name")},
                "best_baseline": best_baseline(read_rows(content)),
                "verdict": [content["verdict"], content["verdict_reason"]],
            }
        )
    return {"schema": SCHEMA, "command": ComparisonsConfig.command, "comparisons": entries}


def summary_table(summary: Mapping[str, Any], members: Sequence[RunFolder]) -> Table:
    """Return the table that is printed: dense network, agent, best baseline and verdict."""
    table = Table(title=f"{len(members)} comparisons, test split")
    for head in ("comparison", "dense", "agent", "best baseline", "verdict"):
        table.add_column(head, justify="left" if head == "comparison" else "right")
    for entry, member in zip(summary["comparisons"], members, strict=True):
        content = read_report(member)
        rows, unit, metric = read_rows(content), Unit.of(content), content["verdict_metric"]
        rival, tuned = entry["best_baseline"], metric.endswith("finetuned")
        theirs = [row for row in rows if row.name == rival]
        dense = content["dense"]["test_accuracy_finetuned" if tuned else "test_accuracy"]
        table.add_row(
            entry["folder"],
            spread([] if dense is None else [dense], unit),
            spread(column([*filter(is_agent, rows)], metric), unit),
            f"{rival or ''} {spread(column(theirs, metric), unit)}".strip(),
            entry["verdict"][0] or "none",
        )
    return table
