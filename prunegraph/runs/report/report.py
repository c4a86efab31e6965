"""The record of a run: ``report.json`` and the table that people see."""

import contextlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ArtefactError
from prunegraph.core.files import write_json
from prunegraph.core.precision import computes_bfloat16
from prunegraph.core.reading import check_schema, checked, read_json
from prunegraph.methods.randomized.run import Record
from prunegraph.methods.registry import BY_NAME
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.report.verdict import MethodRow, Metric, Unit, is_method, pruned_rows

SCHEMA = 1

History = Mapping[str, Mapping[str, Sequence[float]]]
"""Learning curves: name of a search -> name of a figure -> its value in each update."""

FIRST = (
    *("schema", "command", "arch", "dataset", "seed", "budget", "dense", "pruned", "search"),
    *("methods", "verdict", "verdict_reason", "task", "score_name", "higher_is_better"),
)
"""Keys of every report that others may rely on."""

PACKAGES = (
    *("prunegraph", "torch", "torchvision", "torch-geometric", "stable-baselines3", "numpy"),
    "matplotlib",
)
"""Packages whose versions a report names."""


MOST_SHOWN = 60
"""So many letters of a value are shown where two machines differ."""


def machine() -> dict[str, Any]:
    """Return what times and last digits depend on."""
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "bfloat16": computes_bfloat16("cpu"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that a run rests on, those that are installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine_differences(content: Mapping[str, Any]) -> list[str]:
    """Return what of the machine and the versions differs between a report and this process."""
    then = {**content.get("versions", {}), **content["machine"]}
    here = {**versions(), **machine()}
    return [
        f"{name} {ascii(then[name])[:MOST_SHOWN]} there, {ascii(here[name])[:MOST_SHOWN]} here"
        for name in sorted(then.keys() & here.keys())
        if then[name] != here[name]
    ]


def _processor() -> str:
    """Return the processor's name where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_report(
    content: Mapping[str, Any], path: Path, files: Mapping[str, str]
) -> dict[str, Any]:
    """Write a report with the SHA-256 of the run's files, and return what was written."""
    written = in_its_unit(content) | {"files": dict(files)}
    written = {name: written[name] for name in FIRST} | written
    write_json(path, written)
    return written


def in_its_unit(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report as files hold it: scores, in the task's own unit, in place of utilities."""
    unit = Unit.of(content)
    rows = [
        unit.written(row.to_json()) | {"score": unit.score(row.last)} for row in read_rows(content)
    ]
    parts = {name: unit.written(content[name]) for name in ("dense", "pruned")}
    metric = unit.key(content["verdict_metric"])
    return {**content, **parts, "methods": rows, "verdict_metric": metric}


def _as_utilities(content: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a report of a file as it is in memory: utilities under names of accuracies."""
    checked(content, OUTER, where)
    unit = Unit.of(content)
    parts = {name: unit.read(content[name]) for name in ("dense", "pruned")}
    metric = content["verdict_metric"].replace("score", "accuracy")
    rows = [unit.read(row) for row in content["methods"]]
    return {**content, **parts, "methods": rows, "verdict_metric": metric}


COSTS = {"macs": int, "params": int}
ACCURACIES = {"test_accuracy": float, "test_accuracy_finetuned": float | None}
REPORT = {
    "schema": int,
    "command": str,
    "arch": str,
    "dataset": str,
    "budget": dict[str, Any],
    "task": str,
    "score_name": str,
    "higher_is_better": bool,
    "dense": COSTS | ACCURACIES,
    "pruned": {
        **COSTS,
        "search_accuracy": float,
        "test_accuracy_recalibrated": float,
        "test_accuracy_finetuned": float | None,
        "seed": int,
        "mask_digest": str,
    },
    "methods": list[dict[str, Any]],
    "verdict": str | None,
    "verdict_reason": str,
    "verdict_metric": Metric,
    "repaired": float | None,
    "search": Any,
    "data": dict[str, dict[str, Any]],
    "recipe": dict[str, Any],
    "precision": str,
    "versions": dict[str, str],
    "seed": int,
    "machine": {"threads": int},
    "files": dict[str, str],
}
"""What a report must hold to be shown and verified."""

OUTER = {
    "score_name": str,
    "higher_is_better": bool,
    "verdict_metric": str,
    "methods": list[dict[str, Any]],
    "dense": dict[str, Any],
    "pruned": dict[str, Any],
}
"""What its scores are read by."""

OF_CHANNELS = {
    "graph": str,
    "peak_memory": {"dense": int, "pruned": int},
    "latency_ms": {"dense": float, "pruned": float, "on": str},
    "dense_widths": dict[str, int],
    "pruned": {"widths": dict[str, int]},
}
"""What it must hold besides where channels were cut out."""

OF_WEIGHTS = {
    "pruned": {
        "sparsity": float,
        "network_sparsity": float,
        "pattern": str,
        "densities": dict[str, float],
    }
}
"""What it must hold besides where single weights became zero."""

SPLIT = {"fingerprint": str, "samples": int}
"""What is told of each split."""

GROUP = {
    "active": float,
    "stored": float,
    "overlap": float,
    "scores": dict[str, float],
    "history": list[tuple[float, float, float, float]],
}
"""What is told of masks of groups: shares of the weights that one keeps, and all together; the
overlap of two, at the end and over time; the score of each group on the search split."""

CLIENTS = {
    "samples": list[int],
    "scores": list[float],
    **dict.fromkeys(("mean", "deviation", "min", "max"), float),
}
"""What is told of a federation: train samples of each client, and what they score on their search
samples, with the mean over clients, the standard deviation, and both ends."""

PARTS: dict[str, Any] = {
    "search": {"seconds": float, "networks_evaluated": int, "evaluation_seconds": float},
    "stage_one_verdict": list[str | None],
    "proxy_rank_correlation": float,
    "layer_errors": dict[str, dict[str, float]],
    "selection": dict[str, Record],
    "groups": dict[str, dict[str, Any]],
    "clients": dict[str, dict[str, Any]],
    "decision": {"start": str, "share": float, "divergence": dict[str, float]},
}
"""What may be missing, and its shape where it is there."""

NULL = ("search", "proxy_rank_correlation")
"""Which of them may be null."""


def read_report(folder: RunFolder) -> dict[str, Any]:
    """Return the report of a run, which anybody may have written.

    Raises:
        ArtefactError: it is damaged, or no report; names the place.
    """
    path = folder.file(RunFolder.REPORT)
    content = _as_utilities(read_json(path), str(path))
    dense = checked(content, REPORT, str(path))["dense"]
    check_schema(content["schema"], SCHEMA, path)
    checked(content, OF_WEIGHTS if "sparsity" in content["budget"] else OF_CHANNELS, str(path))
    for name, split in content["data"].items():
        checked(split, SPLIT, f"{path}: data.{name}")
    checked([*map(_figures, content["methods"])], list[MethodRow], f"{path}: methods")
    costs = [dense[name] for name in COSTS]
    if min(costs) < 1:
        msg = f"{path}: no network has {costs[0]} multiply-adds and {costs[1]} parameters"
        raise ArtefactError(msg)
    _check_parts(content, path)
    return content


BUDGET_TYPES: Mapping[str, tuple[type, ...]] = {
    "pattern": (str,),
    "uniform": (bool,),
    "depth": (bool,),
}
"""What entries of a budget are that are no numbers."""


def _check_parts(content: Mapping[str, Any], path: Path) -> None:
    """Raise ArtefactError for a part that not every report has, if it is damaged."""
    for name, shape in PARTS.items():
        if name in content and not (content[name] is None and name in NULL):
            checked(content[name], shape, f"{path}: {name}")
    groups = content.get("groups", {})
    for part, shape in (("groups", GROUP), ("clients", CLIENTS)):
        for name, told in content.get(part, {}).items():
            checked(told, shape, f"{path}: {part}.{name}")
    search = content["search"] or {}
    checked(search.get("seeds", []), list[int], f"{path}: search.seeds")
    rows = read_rows(content)
    ends = any(is_method(row) or row.name in BY_NAME for row in rows)  # a control may be alone
    odd = [
        *["methods"] * (not ends),
        *["groups"] * (len({tuple(sorted(group["scores"])) for group in groups.values()}) > 1),
        *["proxy_rank_correlation"] * (abs(content.get("proxy_rank_correlation") or 0.0) > 1.0),
        *["search.seconds"] * (search.get("evaluation_seconds", 0.0) > 0.0 >= search["seconds"]),
        *["stage_one_verdict"] * (len(content.get("stage_one_verdict", "12")) != 2),
        *(f"budget.{name}" for name in content["budget"].keys() - {f.name for f in fields(Budget)}),
        *(
            f"budget.{name}"
            for name, value in content["budget"].items()
            if type(value) not in BUDGET_TYPES.get(name, (int, float))
        ),
        *(
            f"latency_ms.{name}"
            for name, time in content.get("latency_ms", {}).items()
            if isinstance(time, int | float) and time <= 0.0
        ),
        *["latency_ms.batch"] * (not _all_timed(content.get("latency_ms", {}))),
    ]
    if odd:
        msg = f"{path}: {odd[0]} is damaged: no run writes that"
        raise ArtefactError(msg)


def _all_timed(times: Mapping[str, Any]) -> bool:
    """Return whether a batch was timed with both networks, or none."""
    given = [times.get(name) for name in ("batch", "dense_batch", "pruned_batch")]
    return given == [None] * 3 or all(type(time) in (int, float) for time in given)


def read_rows(content: Mapping[str, Any]) -> list[MethodRow]:
    """Return the rows of a written report."""
    return [MethodRow(**_figures(row)) for row in content["methods"]]


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without its ``score``, which repeats the last of its accuracies."""
    return {name: value for name, value in row.items() if name != "score"}


def pruned_folder(folder: RunFolder, content: Mapping[str, Any]) -> Path | None:
    """Return the folder of the pruned network: the run's own, a cell, or what a method chose."""
    rows = pruned_rows(read_rows(content), content["pruned"]["mask_digest"])
    cell = next((row.cell for row in rows if row.cell is not None), None)
    if cell is not None:
        return folder.inside(cell)
    chosen = [folder.chosen(row.name, row.seed) for row in rows]
    return next((path for path in chosen if path.is_dir()), None)
