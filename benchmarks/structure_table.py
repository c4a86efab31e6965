"""Rows of the benchmark ``structure.py``: which networks pass, and the table of all."""

import math
from collections.abc import Callable
from typing import Any

NUM_MASKS = 5
LEAST_SHARE = 0.9

Row = dict[str, Any]


def assemble(list_name: str, name: str, lines: list[Row], ending: str) -> Row:
    """Return the row of a network from the lines that its process wrote."""
    row: Row = {"list": list_name, "name": name, "ours": {}, "theirs": {}, "errors": {}}
    running = "start"
    for line in lines:
        running = line["stage"]
        part = row[running.split(".")[0]] if "." in running else row
        part.update(line.get("found", {}))
        if "error" in line:
            row["errors"][running] = line["error"]
    if ending:
        row["errors"][running] = ending
    row["reasons"] = reasons(row)
    return row


def share(row: Row, side: str) -> float | None:
    """Return the prunable share of the weights, or None where it is not known."""
    prunable = row[side].get("prunable")
    return None if prunable is None else prunable / max(row["layer_params"], 1)


def reasons(row: Row) -> list[str]:
    """Return why a network does not pass; none = it passes."""
    ours, errors = row["ours"], row["errors"]
    found = [f"{stage}: {text}" for stage, text in errors.items() if not stage.startswith("theirs")]
    own = share(row, "ours")
    if own is None:
        return found or ["it was not analysed"]
    if not ours.get("budget_met"):
        found.append(f"keeps {ours.get('kept_macs', 1.0):.1%} of the MACs at a budget of 50 %")
    if ours.get("equal_masks") != NUM_MASKS and "ours.compare" not in errors:
        found.append("masked and pruned networks were not compared")
    theirs = share(row, "theirs")
    least = min(LEAST_SHARE, LEAST_SHARE if theirs is None else theirs)
    if own < least:
        frozen = "; ".join(list(dict.fromkeys(ours["frozen"]))[:3])
        found.append(f"only {own:.1%} of the weights prunable, not {least:.1%} ({frozen})")
    return found


def table(rows: list[Row]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| network | params (M) | analysed | masked = pruned | prunable share "
        "| analysis (s) | pruning (s) | passes |",
        "|---|--:|:-:|:-:|--:|--:|--:|:-:|",
    ]
    for row in rows:
        cells = [
            f"{row['list']}/{row['name']}",
            f"{row.get('params', 0) / 1e6:.1f}",
            *(_both(row, cell) for cell in (_analysed, _equal, _share, _analysis, _pruning)),
            "no" if row["reasons"] else "yes",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    passed = sum(not row["reasons"] for row in rows)
    lines += ["", f"Each cell: prunegraph / Torch-Pruning. {passed} of {len(rows)} pass.", ""]
    for what, own in (
        ("Analysis", "analyse_seconds"),
        ("Analysis without the proof, `analyse(trial=False)`,", "unproven_seconds"),
    ):
        lines += ratio_lines(rows, what, own)
    for title, notes_of in (("Exceptions", _own_notes), ("Torch-Pruning's errors", _peer_notes)):
        notes = [f"- {row['list']}/{row['name']}: {note}" for row in rows for note in notes_of(row)]
        lines += ["", f"{title}:", "", *notes] if notes else []
    return "\n".join(lines)


def ratio_lines(rows: list[Row], what: str, own: str) -> list[str]:
    """Return lines with the geometric means of the ratios of both sides' analysis times."""
    lines = []
    for peer, keys in (
        ("building Torch-Pruning's graph", ["analyse_seconds"]),
        ("that and listing its groups", ["analyse_seconds", "groups_seconds"]),
    ):
        ratios = [
            row["ours"][own] / sum(row["theirs"][key] for key in keys)
            for row in rows
            if own in row["ours"] and all(key in row["theirs"] for key in keys)
        ]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            lines.append(
                f"- {what} takes {mean:.2f} times as long as {peer} "
                f"(geometric mean of {len(ratios)})."
            )
    return lines


def _own_notes(row: Row) -> list[str]:
    return row["reasons"]


def _peer_notes(row: Row) -> list[str]:
    errors = row["errors"].items()
    return [f"{stage}: {text}" for stage, text in errors if stage.startswith("theirs")]


def _both(row: Row, cell: Callable[[Row, str], str]) -> str:
    return f"{cell(row, 'ours')} / {cell(row, 'theirs')}"


def _analysed(row: Row, side: str) -> str:
    return "yes" if "analyse_seconds" in row[side] else "no"


def _equal(row: Row, side: str) -> str:
    found = row[side]
    if side == "ours":
        return f"{found.get('equal_masks', 0)} of {NUM_MASKS}"
    if not found.get("runs"):
        return "does not run"
    if "difference" not in found:
        return "runs"
    equal = found["difference"] <= found["tolerance"]
    return "yes" if equal else f"differs by {found['difference']:.0e}"


def _share(row: Row, side: str) -> str:
    value = share(row, side) if "layer_params" in row else None
    return "-" if value is None else f"{100 * value:.1f} %"


def _analysis(row: Row, side: str) -> str:
    return _seconds(row[side].get("analyse_seconds"))


def _pruning(row: Row, side: str) -> str:
    return _seconds(row[side].get("prune_seconds"))


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
