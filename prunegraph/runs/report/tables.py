"""The one table that a run prints, and how its cells are written."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from prunegraph.core.budget import short
from prunegraph.runs.report.report import read_rows
from prunegraph.runs.report.verdict import (
    ACCURACY,
    DENSE,
    MethodRow,
    Unit,
    column,
    pruned_rows,
    ranked,
)

IN_PLACE = (
    "PyTorch runs the network no faster for it; `prunegraph export --format sparse` writes it small"
)
"""What zeros are good for."""

SHORT = {"accuracy": "acc."}
"""Names of scores, shorter where a table has no room."""


def method_columns(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns of the one table that a run prints."""
    score = SHORT.get(content["score_name"], content["score_name"])
    scores: tuple[str, ...] = ("search {}", "test {} recal.", "test {} fine-tuned")
    if not _has_finetunes(content):
        scores = ("search {}", "test {}")
    named = (name.format(score) for name in scores)
    return ("method", *_cost_columns(content), *named, "nets", "minutes")


def _has_finetunes(content: Mapping[str, Any]) -> bool:
    return any(row.test_accuracy_finetuned is not None for row in read_rows(content))


def _cost_columns(content: Mapping[str, Any]) -> tuple[str, ...]:
    if "sparsity" in content["budget"]:
        sent = any(row["bytes_up"] is not None for row in content["methods"])
        return ("zeros", *("bytes up", "bytes down") * sent)
    memory = ("memory, bytes",) if "max_memory" in content["budget"] else ()
    return ("MACs", "params", *memory)


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
    unit, rows = Unit.of(content), read_rows(content)
    controls = [row for row in rows if row.name == DENSE]
    shown = [
        spread(column(controls, "search_accuracy"), unit),
        spread([content["dense"]["test_accuracy"]], unit),
        *[spread(column(controls, "test_accuracy_finetuned"), unit)] * _has_finetunes(content),
    ]
    table = [("dense", *_costs(content, controls), *shown, "", "")]
    for name, own in by_method(rows):
        seeds = {row.seed for row in own}
        tuned = f"{spread(column(own, 'test_accuracy_finetuned'), unit)}{_tuned_share(own)}"
        cells = (
            spread(column(own, "search_accuracy"), unit),
            spread(column(own, "test_accuracy_recalibrated"), unit),
            *[tuned] * _has_finetunes(content),
            str(round(float(np.mean(column(own, "networks_evaluated"))))),
            minutes(column(own, "seconds")),
        )
        label = name if len(seeds) == 1 else f"{name} (x{len(seeds)})"
        table.append((label, *_costs(content, own), *cells))
    return table


def _costs(content: Mapping[str, Any], rows: Sequence[MethodRow]) -> tuple[str, ...]:
    """Return the cells of ``_cost_columns``: means over a method's rows."""

    def mean(name: str, default: float = 0.0) -> float:
        return float(np.mean(column(rows, name) or [default]))

    kinds = [name.replace(" ", "_") for name in _cost_columns(content)]
    if kinds[0] == "zeros":
        sent = (f"{mean(name):,.0f}" if column(rows, name) else "" for name in kinds[1:])
        return (percent(mean("sparsity"), 2), *sent)
    dense = content["dense"]
    wholes = {"macs": dense["macs"], "params": dense["params"]}
    if len(kinds) > len(wholes):
        wholes["memory"] = content["peak_memory"]["dense"]
    return tuple(
        f"{round(mean(name, whole)):,} ({percent(mean(name, whole) / whole)})"
        for name, whole in wholes.items()
    )


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
    return f"{content['arch']} on {content['dataset']}: {limits_in_words(content['budget'])}"


def gains(content: Mapping[str, Any]) -> list[str]:
    """Return what a run has got, in lines: size, speed, score."""
    dense, pruned, unit = content["dense"], content["pruned"], Unit.of(content)
    if "sparsity" in pruned:
        zeros, all_zeros = (percent(pruned[name], 2) for name in ("sparsity", "network_sparsity"))
        lines = [
            f"zeros: {zeros} of the prunable weights, {all_zeros} of the network, in place: "
            f"{IN_PLACE}"
        ]
    else:
        macs, params = (percent(pruned[name] / dense[name]) for name in ("macs", "params"))
        lines = [f"size: {macs} of the multiply-adds, {params} of the parameters are left"]
    if times := content.get("latency_ms"):
        line = f"speed: x{times['dense'] / times['pruned']:.2f} for one input"
        if many := times.get("batch"):
            line += f", x{times['dense_batch'] / times['pruned_batch']:.2f} for {many} at once"
        lines.append(f"{line}, on {times['on']}")
    scores = [
        f"{unit.words(pruned[after], 2)}{where} (dense {unit.words(dense[before], 2)})"
        for before, after, where in (
            ("test_accuracy", "test_accuracy_recalibrated", ""),
            ("test_accuracy_finetuned", "test_accuracy_finetuned", " after a fine-tune"),
        )
        if dense[before] is not None and pruned[after] is not None
    ]
    return [*lines, f"test {unit.name}: {', '.join(scores)}"]


def limits_in_words(budget: Mapping[str, Any]) -> str:
    """Return the limits of a budget in one line."""
    told = {name: "" if value is True else short(value) for name, value in budget.items()}
    return ", ".join(f"{name} {value}".strip() for name, value in told.items())


def by_method(rows: Sequence[MethodRow]) -> list[tuple[str, list[MethodRow]]]:
    """Return the rows by method, in descending mean search accuracy, the dense control left out."""
    names = ranked(rows, {row.name for row in rows if row.name != DENSE})
    return [(name, [row for row in rows if row.name == name]) for name in names]


def percent(share: float, digits: int = 1) -> str:
    """Return a share as ``12.3 %``."""
    return f"{100 * share:.{digits}f} %"


def minutes(seconds: Sequence[float]) -> str:
    """Return the mean time in minutes."""
    return f"{np.mean(seconds) / 60:.1f}" if seconds else ""


def spread(values: Sequence[float], unit: Unit = ACCURACY) -> str:
    """Return the mean as a table shows it, with the standard deviation of several."""
    if not values:
        return ""
    deviation = unit.scale * float(np.std(values, ddof=1)) if len(values) > 1 else None
    return unit.text(float(np.mean(values))) + ("" if deviation is None else f" ± {deviation:.2f}")
