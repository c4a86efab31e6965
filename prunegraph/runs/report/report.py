"""The record of a run: ``report.json`` and the table that people see."""

import contextlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table

from prunegraph.core.budget import Budget, Cost, short
from prunegraph.core.errors import ArtefactError
from prunegraph.core.files import write_json
from prunegraph.core.precision import computes_bfloat16
from prunegraph.core.reading import checked, read_json
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.report.verdict import DENSE, MethodRow, Metric, column, is_method, pruned_rows

SCHEMA = 1

History = Mapping[str, Mapping[str, Sequence[float]]]
"""Learning curves: name of a search -> name of a figure -> its value in each update."""

PACKAGES = (
    *("prunegraph", "torch", "torchvision", "torch-geometric", "stable-baselines3", "numpy"),
    "matplotlib",
)
"""Packages whose versions a report names."""


MOST_SHOWN = 60
"""So many letters of a value are shown where two machines differ."""


@dataclass(frozen=True, kw_only=True)
class DenseResult:
    """The network before pruning.

    Attributes:
        cost: of the whole network.
        test_accuracy: as it was given.
        test_accuracy_finetuned: after the fine-tune that every row gets: the control.
    """

    cost: Cost
    test_accuracy: float
    test_accuracy_finetuned: float | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "macs": self.cost.macs,
            "params": self.cost.params,
            "test_accuracy": self.test_accuracy,
            "test_accuracy_finetuned": self.test_accuracy_finetuned,
        }


@dataclass(frozen=True, kw_only=True)
class PrunedResult:
    """The network that the run ends with.

    Attributes:
        cost: of the pruned network.
        seed: of the search that found it.
        search_accuracy: on the search split after recalibration; its mask was chosen by it.
        test_accuracy_recalibrated: on the test split after recalibration.
        test_accuracy_finetuned: on the test split after fine-tuning.
        widths: channels kept, by group.
        digest: name of the mask.
    """

    cost: Cost
    seed: int
    search_accuracy: float
    test_accuracy_recalibrated: float
    test_accuracy_finetuned: float | None
    widths: Mapping[str, int]
    digest: str

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "macs": self.cost.macs,
            "params": self.cost.params,
            "search_accuracy": self.search_accuracy,
            "test_accuracy_recalibrated": self.test_accuracy_recalibrated,
            "test_accuracy_finetuned": self.test_accuracy_finetuned,
            "widths": dict(self.widths),
            "seed": self.seed,
            "mask_digest": self.digest,
        }


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What the search cost.

    Attributes:
        seconds: wall times of all search seeds together, one after the other.
        networks_evaluated: pruned networks run, everything counted.
        evaluation_seconds: time inside surgery, recalibration and evaluation.
        details: further figures (entropy, repaired bits, ...), by name.
    """

    seconds: float
    networks_evaluated: int
    evaluation_seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "seconds": round(self.seconds, 2),
            "networks_evaluated": self.networks_evaluated,
            "evaluation_seconds": round(self.evaluation_seconds, 2),
            **self.details,
        }


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a run reports; ``to_json`` has the keys that others may rely on.

    Attributes:
        command: the command that made it.
        arch: the network.
        dataset: the data set.
        seed: the run's seed.
        budget: what may remain.
        dense: the network before.
        pruned: the network after: the agent's, or where none searched the best baseline's.
        search: what the search cost; None without one.
        methods: every compared row.
        verdict: LEARNED, NOT LEARNED, or None.
        verdict_reason: why.
        details: further entries, by name.
    """

    command: str
    arch: str
    dataset: str
    seed: int
    budget: Budget
    dense: DenseResult
    pruned: PrunedResult
    search: SearchResult | None
    methods: Sequence[MethodRow]
    verdict: str | None
    verdict_reason: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "schema": SCHEMA,
            "command": self.command,
            "arch": self.arch,
            "dataset": self.dataset,
            "seed": self.seed,
            "budget": self.budget.as_dict(),
            "dense": self.dense.to_json(),
            "pruned": self.pruned.to_json(),
            "search": None if self.search is None else self.search.to_json(),
            "methods": [row.to_json() for row in self.methods],
            "verdict": self.verdict,
            "verdict_reason": self.verdict_reason,
            **self.details,
        }


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


def write_report(report: Report, path: Path, files: Mapping[str, str]) -> dict[str, Any]:
    """Write the report with the SHA-256 of the run's files, and return what was written."""
    content = report.to_json() | {"files": dict(files)}
    write_json(path, content)
    return content


COSTS = {"macs": int, "params": int}
ACCURACIES = {"test_accuracy": float, "test_accuracy_finetuned": float | None}
REPORT = {
    "command": str,
    "arch": str,
    "dataset": str,
    "budget": dict[str, float | str],
    "task": str,
    "score_name": str,
    "higher_is_better": bool,
    "dense": COSTS | ACCURACIES,
    "pruned": {
        **COSTS,
        "search_accuracy": float,
        "test_accuracy_recalibrated": float,
        "test_accuracy_finetuned": float | None,
        "widths": dict[str, int],
        "seed": int,
        "mask_digest": str,
    },
    "methods": list[MethodRow],
    "verdict": str | None,
    "verdict_reason": str,
    "verdict_metric": Metric,
    "repaired": float | None,
    "search": Any,
    "graph": str,
    "data": {name: {"fingerprint": str, "images": int} for name in ("train", "search", "test")},
    "recipe": dict[str, Any],
    "precision": str,
    "peak_memory": {"dense": int, "pruned": int},
    "latency_ms": {"dense": float, "pruned": float, "on": str},
    "versions": dict[str, str],
    "dense_widths": dict[str, int],
    "seed": int,
    "machine": {"threads": int},
    "files": dict[str, str],
}
"""What a report must hold to be shown and verified."""

PARTS: dict[str, Any] = {
    "search": {"seconds": float, "networks_evaluated": int, "evaluation_seconds": float},
    "stage_one_verdict": list[str | None],
    "proxy_rank_correlation": float,
    "decision": {"start": str, "share": float, "divergence": dict[str, float]},
}
"""What may be missing, and its shape where it is there."""

NULL = ("search", "proxy_rank_correlation")
"""Which of them may be null."""

HEALTH = dict.fromkeys(("first", "mean", "last"), float)
"""What is told of each figure of a policy's health."""


def read_report(folder: RunFolder) -> dict[str, Any]:
    """Return the report of a run, which anybody may have written.

    Raises:
        ArtefactError: it is damaged, or no report; names the place.
    """
    path = folder.file(RunFolder.REPORT)
    content: dict[str, Any] = read_json(path)
    dense = checked(content, REPORT, str(path))["dense"]
    costs = [dense[name] for name in COSTS]
    if min(costs) < 1:
        msg = f"{path}: no network has {costs[0]} multiply-adds and {costs[1]} parameters"
        raise ArtefactError(msg)
    _check_parts(content, path)
    return content


def _check_parts(content: Mapping[str, Any], path: Path) -> None:
    """Raise ArtefactError for a part that not every report has, if it is damaged."""
    for name, shape in PARTS.items():
        if name in content and not (content[name] is None and name in NULL):
            checked(content[name], shape, f"{path}: {name}")
    search = content["search"] or {}
    for name, figure in checked(search.get("health", {}), dict[str, Any], str(path)).items():
        checked(figure, HEALTH, f"{path}: search.health.{name}")
    checked(search.get("seeds", []), list[int], f"{path}: search.seeds")
    odd = [
        *["methods"] * (not any(map(is_method, read_rows(content)))),
        *["proxy_rank_correlation"] * (abs(content.get("proxy_rank_correlation") or 0.0) > 1.0),
        *["search.seconds"] * (search.get("evaluation_seconds", 0.0) > 0.0 >= search["seconds"]),
        *["stage_one_verdict"] * (len(content.get("stage_one_verdict", "12")) != 2),
        *(f"budget.{name}" for name in content["budget"].keys() - {f.name for f in fields(Budget)}),
        *(
            f"latency_ms.{name}"
            for name, time in content["latency_ms"].items()
            if not isinstance(time, str) and time <= 0.0
        ),
    ]
    if odd:
        msg = f"{path}: {odd[0]} is damaged: no run writes that"
        raise ArtefactError(msg)


def read_rows(content: Mapping[str, Any]) -> list[MethodRow]:
    """Return the rows of a written report."""
    return [MethodRow(**row) for row in content["methods"]]


ACCURACY_COLUMNS = ("search acc.", "test acc. recal.", "test acc. fine-tuned")


def method_columns(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns of the one table that a run prints."""
    memory = ("memory, bytes",) if "max_memory" in content["budget"] else ()
    return ("method", "MACs", "params", *memory, *ACCURACY_COLUMNS, "nets", "minutes")


def methods_table(content: Mapping[str, Any]) -> Table:
    """Return the one table that a run prints, best rows on the search split first."""
    table = Table(title=escape(title(content)))
    dense, *others = method_cells(content)
    for name in method_columns(content):
        if name == "method":  # the others fold where the terminal is narrow
            table.add_column(name, no_wrap=True, min_width=max(len(row[0]) for row in others))
        else:
            table.add_column(name, justify="right", overflow="fold")
    table.add_row(*dense, end_section=True)
    own = custom_labels(content)
    for cells in others:
        table.add_row(*map(escape, cells), style="bold" if cells[0] in own else None)
    return table


def custom_labels(content: Mapping[str, Any]) -> set[str]:
    """Return what ``method_cells`` calls the methods that chose the pruned network."""
    own = {row.name for row in pruned_rows(read_rows(content), content["pruned"]["mask_digest"])}
    return {label for label, *_ in method_cells(content) if label.partition(" ")[0] in own}


def custom_seed(content: Mapping[str, Any]) -> int | None:
    """Return the seed of the pruned mask, if its method has chosen with several."""
    rows = read_rows(content)
    own = {row.name for row in pruned_rows(rows, content["pruned"]["mask_digest"])}
    several = len({row.seed for row in rows if row.name in own}) > 1
    return int(content["pruned"]["seed"]) if several else None


def method_cells(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of that table: the dense network, then methods by search accuracy."""
    dense = Cost(macs=content["dense"]["macs"], params=content["dense"]["params"])
    controls = [row for row in read_rows(content) if row.name == DENSE]
    shown = [
        spread(column(controls, "search_accuracy")),
        spread([content["dense"]["test_accuracy"]]),
        spread(column(controls, "test_accuracy_finetuned")),
    ]
    whole = content.get("peak_memory", {}).get("dense", 1)
    limited = "max_memory" in content["budget"]

    def costs(macs: int, params: int, memory: int) -> tuple[str, ...]:
        pairs = [(macs, dense.macs), (params, dense.params), *[(memory, whole)] * limited]
        return tuple(f"{cost:,} ({percent(cost / of)})" for cost, of in pairs)

    table = [("dense", *costs(dense.macs, dense.params, whole), *shown, "", "")]
    for name, rows in by_method(read_rows(content)):
        seeds = {row.seed for row in rows}
        cells = (
            spread(column(rows, "search_accuracy")),
            spread(column(rows, "test_accuracy_recalibrated")),
            f"{spread(column(rows, 'test_accuracy_finetuned'))}{_tuned_share(rows)}",
            str(round(float(np.mean(column(rows, "networks_evaluated"))))),
            minutes(column(rows, "seconds")),
        )
        kinds = [column(rows, kind) or [0.0] for kind in (*COSTS, "memory")]
        means = [round(float(np.mean(values))) for values in kinds]
        label = name if len(seeds) == 1 else f"{name} (x{len(seeds)})"
        table.append((label, *costs(*means), *cells))
    return table


def _tuned_share(rows: Sequence[MethodRow]) -> str:
    """Return which of a method's masks were fine-tuned how often, where it is not each once."""
    tuned = [row for row in rows if row.test_accuracy_finetuned is not None]
    masks, seeds = len({row.seed for row in tuned}), len({row.seed for row in rows})
    if not 0 < masks < seeds:
        return ""
    often = f", {len(tuned)} times" if len(tuned) > masks else ""
    return f" ({masks} of {seeds}{often})"


def title(content: Mapping[str, Any]) -> str:
    """Return network, data set and budget in one line."""
    limits = ", ".join(f"{name} {short(value)}" for name, value in content["budget"].items())
    return f"{content['arch']} on {content['dataset']}: {limits}"


def by_method(rows: Sequence[MethodRow]) -> list[tuple[str, list[MethodRow]]]:
    """Return the rows by method, in descending mean search accuracy, the dense control left out."""
    groups: dict[str, list[MethodRow]] = {}
    for row in rows:
        if row.name != DENSE:
            groups.setdefault(row.name, []).append(row)
    return sorted(
        groups.items(),
        key=lambda item: (-float(np.mean(column(item[1], "search_accuracy"))), item[0]),
    )


def percent(share: float, digits: int = 1) -> str:
    """Return a share as ``12.3 %``."""
    return f"{100 * share:.{digits}f} %"


def minutes(seconds: Sequence[float]) -> str:
    """Return the mean time in minutes."""
    return f"{np.mean(seconds) / 60:.1f}" if seconds else ""


def spread(values: Sequence[float]) -> str:
    """Return the mean in percent, with the standard deviation of several."""
    shares = [100 * value for value in values]
    if not shares:
        return ""
    deviation = "" if len(shares) == 1 else f" ± {np.std(shares, ddof=1):.2f}"
    return f"{np.mean(shares):.2f}{deviation}"
