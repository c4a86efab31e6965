"""``prunegraph compare``: one comparison, or one of each network at each budget and a summary."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prunegraph.core.console import Console, seconds_in_words
from prunegraph.core.errors import ArtefactError, ConfigError
from prunegraph.core.files import write_bytes
from prunegraph.runs.choose import check_names
from prunegraph.runs.context import RunContext
from prunegraph.runs.duration import Duration, predict_duration
from prunegraph.runs.folder import RunFolder, open_run, slug
from prunegraph.runs.options.compare import CompareConfig, ComparisonsConfig
from prunegraph.runs.options.yaml_file import save_config
from prunegraph.runs.plan import budget_name, make_plan
from prunegraph.runs.report.report import read_report
from prunegraph.runs.report.summary import summarise, summary_table, write_summary
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
    check_names(make_plan(parts[0]).methods)
    names = folder_names(parts, [arch_of(part) for part in parts])
    folder = open_run(config, config.out, f"compare-{'+'.join(names)}"[:MAX_NAME])
    members = [RunFolder(path=folder.path / name) for name in names]
    parts = tuple(
        replace(part, out=member.path) for part, member in zip(parts, members, strict=True)
    )
    for part, member in zip(parts, members, strict=True):
        if member.finished:
            open_run(part, part.out, "")  # raises if it was made with other options
    if folder.finished and all(member.finished for member in members):
        folder.finish(members)  # in case that the run was killed before it did
        console.say(f"{folder.path} is finished; this is its summary (a new --out runs it anew)")
        check_same_dense(parts, members)
        try:
            summary = write_summary(config, folder, members)
        except ArtefactError as error:  # its medium may be read-only
            console.say(f"warning: the summary stays as it is: {error}")
            summary = summarise(members)
    else:
        summary = _run(config, parts, folder, members, console)
    console.table(summary_table(summary))
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


def _run(
    config: ComparisonsConfig,
    parts: Sequence[CompareConfig],
    folder: RunFolder,
    members: Sequence[RunFolder],
    console: Console,
) -> dict[str, Any]:
    """Make the comparisons that are missing, and the summary."""
    missing = [
        (number, part)
        for number, (part, member) in enumerate(zip(parts, members, strict=True), start=1)
        if not member.finished
    ]
    seconds = look_ahead([part for _, part in missing])  # finds what is wrong before anything long
    folder.file(RunFolder.SUMMARY).unlink(missing_ok=True)  # of a folder that has lost a comparison
    with folder.started(config):
        console.say(f"run folder: {folder.path}")
        console.say(
            f"plan of {len(missing)} of {len(parts)} comparisons: about "
            f"{seconds_in_words(seconds)} of evaluations and fine-tunes, one after the other"
        )
        for number, part in missing:
            console.say(f"comparison {number} of {len(parts)}")
            _share_dense(parts, members, number - 1)
            run_plan(part, console)
        check_same_dense(parts, members)
        summary = write_summary(config, folder, members)
        folder.finish(members)
    return summary


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


def look_ahead(parts: Sequence[CompareConfig]) -> float:
    """Check networks, images and budgets, and predict the seconds that all comparisons take.

    Raises:
        PruneGraphError: something is missing, damaged, contradictory, or cannot be met.
    """
    seconds, datasets = 0.0, set()
    plans: dict[tuple[str | None, Path | None], Duration] = {}
    targets: dict[tuple[str | None, Path | None], Target] = {}
    for part in parts:
        network = (part.arch, part.weights)
        if network not in plans:
            target = targets[network] = load_target(part, part.budget())
            datasets.add(target.data_name)
            plans[network] = predict_duration(
                RunContext(target=target, options=part, seed=part.seed), part
            )
        graph = targets[network].structure
        if graph is not None:
            limits = part.budget().without_latency()
            graph.project(np.zeros(graph.num_units, dtype=np.float32), limits)
        check_run(make_plan(part), part, [targets[network]])
        seconds += plans[network].seconds
    if len(datasets) > 1:
        msg = f"the networks are for {', '.join(sorted(datasets))}: compare those of one data set"
        raise ConfigError(msg)
    return seconds


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
