"""Rebuild a run from its files and check every figure that it reports."""

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prunegraph.artefacts.pruned import PRETRAINED_FILE, WEIGHTS_FILE, artefact_paths
from prunegraph.core.console import Console
from prunegraph.core.errors import ArtefactError, ConfigError
from prunegraph.core.precision import as_elsewhere
from prunegraph.core.user_code import is_factory
from prunegraph.runs.conclude import derived
from prunegraph.runs.context import RunContext
from prunegraph.runs.folder import MEMBER, RunFolder, existing_run
from prunegraph.runs.measure import Measured, measure_rows
from prunegraph.runs.options.checks import check_trusted
from prunegraph.runs.options.compare import RunConfig
from prunegraph.runs.options.tools import VerifyConfig
from prunegraph.runs.options.yaml_file import load_config, read_yaml
from prunegraph.runs.parallel.machine import num_cores
from prunegraph.runs.plan import applied_policy, make_plan, plan_finetunes
from prunegraph.runs.predicted_latency import predicting
from prunegraph.runs.report.report import machine, machine_differences, read_report, read_rows
from prunegraph.runs.report.verdict import ACCURACIES, DENSE, MethodRow, Unit
from prunegraph.runs.store import read_masks
from prunegraph.runs.tasks.registry import load_begun
from prunegraph.runs.verify.rows import (
    Check,
    candidates_of,
    check_handed_on,
    check_mask,
    check_rows,
    compare,
)

KINDS = {kind.command: kind for kind in typing.get_args(RunConfig)}
"""Commands whose run folders can be verified."""

WRONG_SHARE = 5 / 10_000
"""On another machine, or with other threads, this share of the images is answered otherwise."""

WRONG_SHARE_RECALIBRATED = 20 / 10_000
"""The same for networks that were pruned and not fine-tuned: their statistics are measured anew and
their answers are less certain. Between one thread and two, 8 images of 10,000 were seen, and 3 of
450."""

ELSEWHERE = 0.01
"""A score that is no share of samples differs by so much of itself there."""

READ = ("schema", "search", "methods", "precision", "machine", "files")
"""Entries of a report that are checked in parts, or that say how to check the others."""

NOT_VERIFIABLE = ("networks_evaluated", "seconds", "bytes_up", "bytes_down")
"""Figures of a row that no file tells."""

SPREAD = 3.0
"""Standard deviations of a count of such images that are no difference either."""


def verify_run(config: VerifyConfig, console: Console) -> dict[str, Any]:
    """Check a run folder, print what was checked and return it.

    Raises:
        ArtefactError: a file is damaged, or a figure is wrong; the message names it.
    """
    folder = existing_run(config.run)
    content = read_report(folder)
    if config.threads is None:  # with the same number, the last digits are the same
        torch.set_num_threads(min(max(content["machine"]["threads"], 1), num_cores()))
    _check_listed(folder, content["files"])
    folder.check_digests(content["files"])
    checks: list[Check] = []
    for member in [folder, *_other_members(folder)]:
        told = read_report(member)
        with as_elsewhere(bfloat16=told["precision"] == "bfloat16"):
            checks += _check_member(config, folder, member, told, console)
    others = machine_differences(content)
    elsewhere = f"; the machine differs from the run's: {', '.join(others)}" if others else ""
    wrong = [check for check in checks if not check.holds]
    if wrong:
        first = wrong[0]
        msg = (
            f"{folder.file(RunFolder.REPORT)}: {first.name} is reported as {first.reported}, "
            f"found {first.found} ({len(wrong)} of {len(checks)} figures are wrong){elsewhere}"
        )
        raise ArtefactError(msg)
    known = {*READ, *(check.name.partition(".")[0] for check in checks)}
    unknown = [f"search.{key}" for key in content["search"] or () if key != "seeds"]
    unknown += [n for n, value in content.items() if n not in known and value not in (None, {})]
    unknown += ["methods[].networks_evaluated", "methods[].seconds"]
    unknown += [f"{cell} (no weights)" for cell in _cells_without_weights(folder, content)]
    unknown += [n for n in (RunFolder.HISTORY, RunFolder.LATENCY) if n in content["files"]]
    unknown += [RunFolder.PAGE] * folder.file(RunFolder.PAGE).is_file()
    console.say(
        f"{len(checks)} figures and {len(content['files'])} files of {folder.path} are right; "
        f"not verifiable: {', '.join(unknown)}{elsewhere}"
    )
    return {
        "command": config.command,
        "run": str(folder.path),
        "figures": len(checks),
        "files": len(content["files"]),
        "same_machine": _same_machine(content),
        "machine_differences": others,
        "not_verifiable": unknown,
    }


def _check_listed(folder: RunFolder, files: Mapping[str, str]) -> None:
    """Raise ArtefactError if a file that every report rests on could be swapped unseen."""
    names = (
        RunFolder.CONFIG,
        RunFolder.MASKS,
        RunFolder.DENSE,
        RunFolder.HISTORY,
        RunFolder.LATENCY,
    )
    missing = [n for n in names if n not in files and folder.file(n).is_file()]
    if missing:
        msg = f"{folder.file(RunFolder.REPORT)} does not list {missing[0]} among its files"
        raise ArtefactError(msg)


def _cells_without_weights(folder: RunFolder, content: Mapping[str, Any]) -> list[str]:
    """Return the fine-tuned networks that another machine made and did not hand on."""
    cells = [row.cell for row in read_rows(content) if row.cell is not None]
    return [cell for cell in cells if not artefact_paths(folder.file(cell))[1].is_file()]


def _other_members(folder: RunFolder) -> list[RunFolder]:
    """Return the folders of a family's other networks."""
    reports = sorted(folder.path.glob(f"*/{RunFolder.REPORT}"))
    return [RunFolder(path=path.parent) for path in reports if MEMBER.fullmatch(path.parent.name)]


def _check_member(
    config: VerifyConfig,
    folder: RunFolder,
    member: RunFolder,
    content: Mapping[str, Any],
    console: Console,
) -> list[Check]:
    context, as_then = _rebuild(config, folder, member, content)
    run, rows = typing.cast(RunConfig, context.options), read_rows(content)
    masks = read_masks(member.file(RunFolder.MASKS), context.target.structure)
    plan, candidates = make_plan(run), candidates_of(rows, masks)
    if not candidates or all(row.name != DENSE for row in rows):
        msg = f"{member.file(RunFolder.REPORT)} holds too few rows: the file is damaged"
        raise ArtefactError(msg)
    checks = check_rows(plan, content, rows)
    for candidate in candidates:
        where = f"methods[{candidate.name}, seed {candidate.seed}]"
        checks += check_mask(context, candidate.mask, where)
    cells = plan_finetunes(context, candidates)
    again = measure_rows(Measured(context, member, fresh=True), candidates, cells, console)
    checks += _compare_rows(context, rows, again, exact=_same_machine(content) and as_then)
    for row in rows:
        cell = None if row.cell is None else member.inside(row.cell)
        if cell is not None and artefact_paths(cell)[0].is_file():
            where = f"methods[{row.name}, seed {row.seed}]"
            checks += check_handed_on(context, cell, where)
    unit = Unit.of(content)
    checks += [
        Check(
            name=f"methods[{row.name}, seed {row.seed}].score",
            reported=told.get("score"),
            found=unit.score(row.last),
        )
        for told, row in zip(content["methods"], rows, strict=True)
    ]
    found = derived(run, context, candidates, rows, content["repaired"])
    reported = {name: content.get(name) for name in found}
    checks += compare("", reported, found)
    checks.append(_weights_once(context, content))
    prefix = "" if member is folder else f"{member.path.name}: "
    return [dataclasses.replace(check, name=f"{prefix}{check.name}") for check in checks]


def _weights_once(context: RunContext, content: Mapping[str, Any]) -> Check:
    """Return the check that no two fine-tunes have the same weights."""
    weights = [
        digest
        for name, digest in content["files"].items()
        if name.startswith(f"{RunFolder.CELLS}/")
        and name.endswith((f"/{WEIGHTS_FILE}", f"/{PRETRAINED_FILE}"))
    ]
    twice = (len(weights) - len({*weights})) * context.trains
    return Check(name="cells with the same weights", reported=twice, found=0)


def _compare_rows(
    context: RunContext, rows: Sequence[MethodRow], again: Sequence[MethodRow], *, exact: bool
) -> list[Check]:
    """Check that a report has the rows that were measured again, and their figures."""
    keys = [sorted(map(_key, some)) for some in (rows, again)]
    checks = [Check(name="fine-tunes", reported=keys[0], found=keys[1])]
    known = {(row.name, row.seed, row.finetune_seed): row for row in again}
    for row in rows:
        other = known.get((row.name, row.seed, row.finetune_seed))
        if other is None:
            continue
        where = f"methods[{row.name}, seed {row.seed}]"
        for name, found in other.to_json().items():
            if name in NOT_VERIFIABLE:
                continue
            reported, tolerance = getattr(row, name), 0.0
            if name in ACCURACIES and found is not None:
                loose = name != "test_accuracy_finetuned" and row.name != DENSE
                tolerance = 1e-9 if exact else _tolerance(context, name, found, loose=loose)
            checks.append(
                Check(name=f"{where}.{name}", reported=reported, found=found, tolerance=tolerance)
            )
    return checks


def _key(row: MethodRow) -> tuple[str, int, int]:
    return row.name, row.seed, -1 if row.finetune_seed is None else row.finetune_seed


def _tolerance(context: RunContext, name: str, found: float, *, loose: bool) -> float:
    """Return what a score may differ by on another machine."""
    target = context.target
    if target.task.score_name != "accuracy":
        return ELSEWHERE * abs(found)
    samples = len(target.splits[name.partition("_")[0]])
    share = WRONG_SHARE_RECALIBRATED if loose else WRONG_SHARE
    return most_wrong(samples, share) / samples + 1e-9


def _rebuild(
    config: VerifyConfig, folder: RunFolder, member: RunFolder, content: Mapping[str, Any]
) -> tuple[RunContext, bool]:
    """Build the network, its images and its structure anew, from the run's files.

    Returns:
        The context, and whether it is on the run's own device.
    """
    command = _command(folder)
    run: RunConfig = load_config(KINDS[command], folder.file(RunFolder.CONFIG))
    arch, trusted = content["arch"], content["arch"] in config.arch
    others = f" --arch {arch}" if is_factory(arch) and not trusted else ""
    report = member.file(RunFolder.REPORT)
    check_trusted(content["dataset"], config.dataset, report, "dataset", others)
    target = load_begun(
        run,
        content["arch"],
        member.file(RunFolder.DENSE),
        run.budget(),
        device=run.device if config.device == "auto" else config.device,
        threads=torch.get_num_threads(),
        dataset=config.dataset if is_factory(content["dataset"]) else None,  # else of the weights
        data_dir=config.data_dir or run.data_dir,
        arch=arch if trusted else None,
    )
    if run.max_latency is not None and applied_policy(run) is None:
        target = predicting(target, member.file(RunFolder.LATENCY))
    as_then = config.device in ("auto", run.device)
    return RunContext(target=target, options=run, seed=run.seed), as_then


def _command(folder: RunFolder) -> str:
    """Return which command made a run."""
    command = read_yaml(folder.file(RunFolder.CONFIG)).get("command")
    if not isinstance(command, str) or command not in KINDS:
        msg = f"{folder.path} is a run of {command!r}; verify takes {', '.join(KINDS)}"
        raise ConfigError(msg)
    return command


def most_wrong(images: int, share: float) -> int:
    """Return how many images of a split may be answered otherwise on another machine.

    Each may be by itself, with a chance of ``share``: few images vary more around their mean than
    many do, by a Poisson count's standard deviation.
    """
    mean = share * images
    return math.ceil(mean + SPREAD * math.sqrt(mean))


def _same_machine(content: Mapping[str, Any]) -> bool:
    """Return whether the report was made where this runs, with as many threads."""
    return dict(content["machine"]) == machine()
