"""Rebuild a run from its files and check every figure that it reports."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

import torch

from prunegraph.artefacts.pruned import artefact_paths
from prunegraph.core.console import Console
from prunegraph.core.errors import ArtefactError, ConfigError
from prunegraph.core.masks import ChannelMask
from prunegraph.core.precision import as_elsewhere
from prunegraph.core.user_code import is_factory
from prunegraph.runs.conclude import finetuned_mean, mask_widths, peak_memory
from prunegraph.runs.context import Mask, RunContext
from prunegraph.runs.finetune import load_finetuned
from prunegraph.runs.folder import MEMBER, RunFolder, existing_run
from prunegraph.runs.measure import mask_figures
from prunegraph.runs.options.checks import check_trusted
from prunegraph.runs.options.compare import RunConfig
from prunegraph.runs.options.tools import VerifyConfig
from prunegraph.runs.options.yaml_file import load_config, read_yaml
from prunegraph.runs.parallel.machine import num_cores
from prunegraph.runs.plan import applied_policy, make_plan, rank_of
from prunegraph.runs.predicted_latency import predicting
from prunegraph.runs.report.report import machine, machine_differences, read_report, read_rows
from prunegraph.runs.report.verdict import (
    DENSE,
    MethodRow,
    Metric,
    Unit,
    judge,
    mean_by_name,
    proxy_correlation,
    pruned_rows,
)
from prunegraph.runs.store import Candidate, choose, read_masks
from prunegraph.runs.tasks import load_begun
from prunegraph.runs.verify.rows import (
    Check,
    candidates_of,
    check_finetunes,
    check_handed_on,
    check_mask,
    check_rows,
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
        checks += _check_member(config, folder, member, console)
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
    unknown = [f"search.{key}" for key in ("seconds", "evaluation_seconds", "networks_evaluated")]
    unknown += ["search.health", "repaired", "methods[].networks_evaluated", "methods[].seconds"]
    unknown.append(RunFolder.HISTORY)
    unknown += [f"{cell} (no weights)" for cell in _cells_without_weights(folder, content)]
    unknown += [RunFolder.LATENCY] * (RunFolder.LATENCY in content["files"])
    unknown += ["latency_ms", "versions", *sorted({"decision", "policy"} & content.keys())]
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
    config: VerifyConfig, folder: RunFolder, member: RunFolder, console: Console
) -> list[Check]:
    content = read_report(member)
    with as_elsewhere(bfloat16=content["precision"] == "bfloat16"):
        return _measure_again(config, folder, member, content, console)


def _measure_again(
    config: VerifyConfig,
    folder: RunFolder,
    member: RunFolder,
    content: Mapping[str, Any],
    console: Console,
) -> list[Check]:
    context, as_then = _rebuild(config, folder, member, content)
    rows = read_rows(content)
    masks = read_masks(member.file(RunFolder.MASKS), context.target.structure)
    judge_of = _Judge(context, masks, member, _same_machine(content) and as_then)
    checks = [
        Check(name="command", reported=content["command"], found=_command(folder)),
    ]
    checks += _check_data(context, content)
    checks += _check_options(context, content)
    plan = make_plan(typing.cast(RunConfig, context.options))
    checks += check_rows(plan, content, rows)
    checks += check_finetunes(context, plan, content, rows, masks)
    with console.progress(f"measure {content['arch']} again", len(rows)) as report:
        for number, row in enumerate(rows, start=1):
            checks += judge_of.row(row)
            report(number, row.name)
    chosen = choose(candidates_of(rows, masks), rank_of(context.options))
    checks += _check_summary(context, content, rows, chosen, member)
    prefix = "" if member is folder else f"{member.path.name}: "
    return [dataclasses.replace(check, name=f"{prefix}{check.name}") for check in checks]


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
        member.file(RunFolder.DENSE),
        run.budget(),
        device=run.device if config.device == "auto" else config.device,
        threads=torch.get_num_threads(),
        dataset=content["dataset"],
        data_dir=config.data_dir or run.data_dir,
        arch=arch if trusted else None,
    )
    if run.max_latency is not None and applied_policy(run) is None:
        target = predicting(target, member.file(RunFolder.LATENCY))
    as_then = config.device in ("auto", run.device)
    return RunContext(target=target, options=run, seed=run.seed), as_then


def _check_data(context: RunContext, content: Mapping[str, Any]) -> list[Check]:
    splits, told = context.target.splits, content["data"]
    return [
        Check(name="data", reported=sorted(told), found=sorted(splits)),
        *(
            Check(name=f"data.{name}.{key}", reported=told[name][key], found=found)
            for name, split in splits.items()
            if name in told
            for key, found in (("fingerprint", split.fingerprint()), ("samples", len(split)))
        ),
    ]


def _command(folder: RunFolder) -> str:
    """Return which command made a run."""
    command = read_yaml(folder.file(RunFolder.CONFIG)).get("command")
    if not isinstance(command, str) or command not in KINDS:
        msg = f"{folder.path} is a run of {command!r}; verify takes {', '.join(KINDS)}"
        raise ConfigError(msg)
    return command


def _check_options(context: RunContext, content: Mapping[str, Any]) -> list[Check]:
    """Check what a report says of the run's options."""
    target, graph = context.target, context.target.structure
    found = {
        "arch": target.arch,
        "task": target.task.kind,
        "score_name": target.task.score_name,
        "higher_is_better": target.task.higher_is_better,
        "seed": context.seed,
        "budget": context.budget.as_dict(),
        "recipe": context.recipe_record(),
    }
    if graph is not None:
        found["graph"] = graph.fingerprint()
        found["dense_widths"] = graph.group_widths(graph.dense_mask())
    return [Check(name=name, reported=content[name], found=found[name]) for name in found]


class _Judge:
    """Measures rows again.

    Args:
        context: the rebuilt network.
        masks: by digest.
        member: the folder of its files.
        exact: whether accuracies must be equal to the last image.
    """

    def __init__(
        self, context: RunContext, masks: Mapping[str, Mask], member: RunFolder, exact: bool
    ) -> None:
        self._context = context
        self._masks = masks
        self._member = member
        self._exact = exact
        self._measured: dict[str, tuple[float, float]] = {}

    def row(self, row: MethodRow) -> list[Check]:
        """Return the checks of one row."""
        context = self._context
        mask = None if row.name == DENSE else self._masks[row.digest]
        where = f"methods[{row.name}, seed {row.seed}]"
        search, test = self._before(mask)
        loose = WRONG_SHARE if mask is None else WRONG_SHARE_RECALIBRATED
        checks = [
            *(
                Check(name=f"{where}.{name}", reported=getattr(row, name), found=found)
                for name, found in mask_figures(context, mask).items()
            ),
            *check_mask(context, mask, where),
            self._accuracy(where, "search_accuracy", row, search, loose),
            self._accuracy(where, "test_accuracy_recalibrated", row, test, loose),
        ]
        cell = None if row.cell is None else self._member.inside(row.cell)
        if cell is None or not artefact_paths(cell)[0].is_file():
            return checks
        checks += check_handed_on(context, cell, where)
        if artefact_paths(cell)[1].is_file():
            model, digest = load_finetuned(context, cell)
            checks.append(Check(name=f"{where}.cell", reported=row.digest, found=digest))
            if row.test_accuracy_finetuned is not None:
                found = context.test_accuracy(model)
                name = "test_accuracy_finetuned"
                checks.append(self._accuracy(where, name, row, found, WRONG_SHARE))
        return checks

    def _before(self, mask: Mask | None) -> tuple[float, float]:
        """Return the accuracies of a mask's network before a fine-tune."""
        context, key = self._context, DENSE if mask is None else mask.digest()
        if key not in self._measured:
            if mask is None:
                model = context.target.model
                found = context.search_accuracy(model), context.test_accuracy(model)
            else:
                search = context.recalibrated_search_accuracy(mask)
                found = search, context.recalibrated_test_accuracy(mask)
            self._measured[key] = found
        return self._measured[key]

    def _accuracy(
        self, where: str, name: str, row: MethodRow, found: float, wrong_share: float
    ) -> Check:
        """Return the check of an accuracy, within what another machine may differ by."""
        reported, target = getattr(row, name), self._context.target
        tolerance = 1e-9
        if not self._exact and target.task.score_name == "accuracy":
            samples = len(target.splits[name.partition("_")[0]])
            tolerance += most_wrong(samples, wrong_share) / samples
        elif not self._exact:
            tolerance += ELSEWHERE * abs(found)
        return Check(name=f"{where}.{name}", reported=reported, found=found, tolerance=tolerance)


def most_wrong(images: int, share: float) -> int:
    """Return how many images of a split may be answered otherwise on another machine.

    Each may be by itself, with a chance of ``share``: few images vary more around their mean than
    many do, by a Poisson count's standard deviation.
    """
    mean = share * images
    return math.ceil(mean + SPREAD * math.sqrt(mean))


def _check_summary(
    context: RunContext,
    content: Mapping[str, Any],
    rows: list[MethodRow],
    chosen: Candidate,
    member: RunFolder,
) -> list[Check]:
    """Check what a report says beside its rows, by recomputing it from them."""
    metric: Metric = content["verdict_metric"]
    unit, target, digest = Unit.of(content), context.target, chosen.mask.digest()
    verdict, reason = judge(rows, metric, repaired=content["repaired"], unit=unit)
    own = next(iter(pruned_rows(rows, digest)), None)
    dense = next((row for row in rows if row.name == DENSE), None)
    if own is None or dense is None:
        what = "dense" if dense is None else "the pruned network's"
        msg = f"{member.file(RunFolder.REPORT)} holds no row that is {what}: the file is damaged"
        raise ArtefactError(msg)
    found: dict[str, Any] = {
        "dense.macs": target.cost.macs,
        "dense.params": target.cost.params,
        "dense.test_accuracy": dense.test_accuracy_recalibrated,
        "dense.test_accuracy_finetuned": mean_by_name(rows, "test_accuracy_finetuned").get(DENSE),
        "pruned.macs": own.macs,
        "pruned.params": own.params,
        "pruned.search_accuracy": own.search_accuracy,
        "pruned.test_accuracy_recalibrated": own.test_accuracy_recalibrated,
        "pruned.test_accuracy_finetuned": finetuned_mean(rows, digest),
        "pruned.mask_digest": digest,
        "pruned.seed": chosen.seed,
        **{f"pruned.{name}": told for name, told in mask_widths(target, chosen.mask).items()},
        "verdict": verdict,
        "verdict_reason": reason,
    }
    if isinstance(chosen.mask, ChannelMask):
        found["peak_memory"] = peak_memory(target.graph, chosen.mask)
    if "stage_one_verdict" in content:
        recalibrated: Metric = "test_accuracy_recalibrated"
        first = judge(rows, recalibrated, repaired=content["repaired"], unit=unit)
        found["stage_one_verdict"] = [*first]
    if "proxy_rank_correlation" in content:
        found["proxy_rank_correlation"] = proxy_correlation(rows)
    return [
        Check(name=name, reported=_at(content, name), found=value) for name, value in found.items()
    ]


def _at(content: Mapping[str, Any], name: str) -> Any:
    value: Any = content
    for key in name.split("."):
        value = value[key]
    return value


def _same_machine(content: Mapping[str, Any]) -> bool:
    """Return whether the report was made where this runs, with as many threads."""
    return dict(content["machine"]) == machine()
