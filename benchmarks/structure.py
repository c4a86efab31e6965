"""What prunegraph and Torch-Pruning make of the same networks, in one run.

For every network of the lists: can it be analysed, does the pruned network equal the zero-masked
one, which share of the convolution and linear weights can be pruned, and how long that takes. Each
network runs in a process of its own with limits on time and memory, so that a crash is one row.
Finished rows are not repeated; weights are random, one thread, batch 1, images 224 x 224 where the
network takes them.

A network passes if half of its MACs can be taken to the last channel that fits, the zero-masked and
the pruned network agree on five masks (float64, 1e-5; float32, 1e-3 above 60 million parameters),
and the prunable share is at least 90 %, or Torch-Pruning's if that is smaller.

    pip install -e '.[benchmark]'
    python benchmarks/structure.py --out structure.json [--lists timm hf] [--only resnet18 ...]
    python benchmarks/structure.py --out structure.json --table
"""

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from structure_cases import lists
from structure_worker import NUM_MASKS, measure

from prunegraph.experiment.report import machine
from prunegraph.files import write_json

LEAST_SHARE = 0.9
PACKAGES = ("torch", "torchvision", "torch-pruning", "timm", "transformers")
GIB = 1 << 30


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lists", nargs="+", metavar="LIST", help="default: all")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="networks of these names alone")
    parser.add_argument("--out", type=Path, default=Path("structure.json"), metavar="FILE")
    parser.add_argument("--redo", action="store_true", help="measure finished rows again")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds a network")
    parser.add_argument("--memory", type=float, default=16.0, help="GiB a network")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, end")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def selected(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return (list, name) of the networks to measure; unknown names end the program."""
    known = lists()
    wanted = options.lists or list(known)
    names = [(each, name) for each in wanted if each in known for name in known[each]]
    unknown = [each for each in wanted if each not in known]
    for name in options.only or []:
        unknown += [] if name in {pair[1] for pair in names} else [name]
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; the lists are {', '.join(known)}")
    return [pair for pair in names if not options.only or pair[1] in options.only]


def run_one(list_name: str, name: str, limit: float, memory: float) -> dict[str, Any]:
    """Measure one network in a process of its own and return its row."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines"
        words = ["--worker", list_name, name, str(lines), "--memory", str(memory)]
        command = [sys.executable, __file__, *words]
        try:
            done = subprocess.run(command, timeout=limit, stderr=subprocess.PIPE, check=False)
            tail = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            ending = f"exit code {done.returncode}: {' '.join(tail)}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            ending = f"over the time limit of {limit:.0f} s"
        text = lines.read_text(encoding="utf-8") if lines.is_file() else ""
    return assemble(list_name, name, [json.loads(line) for line in text.splitlines()], ending)


def assemble(list_name: str, name: str, lines: list[dict[str, Any]], ending: str) -> dict[str, Any]:
    """Return the row of a network from the lines that its process wrote."""
    row: dict[str, Any] = {"list": list_name, "name": name, "ours": {}, "theirs": {}, "errors": {}}
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


def share(row: dict[str, Any], side: str) -> float | None:
    """Return the prunable share of the weights, or None where it is not known."""
    prunable = row[side].get("prunable")
    return None if prunable is None else prunable / max(row["layer_params"], 1)


def reasons(row: dict[str, Any]) -> list[str]:
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


def table(rows: list[dict[str, Any]]) -> str:
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
    lines += ["", f"Each cell: prunegraph / Torch-Pruning. {passed} of {len(rows)} pass."]
    ratios = [
        row["ours"]["analyse_seconds"] / row["theirs"]["analyse_seconds"]
        for row in rows
        if row["ours"].get("analyse_seconds") and row["theirs"].get("analyse_seconds")
    ]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(
            f"Analysis takes {mean:.2f} times as long as building Torch-Pruning's graph "
            f"(geometric mean of {len(ratios)} networks)."
        )
    for title, notes_of in (("Exceptions", _own_notes), ("Torch-Pruning's errors", _peer_notes)):
        notes = [f"- {row['list']}/{row['name']}: {note}" for row in rows for note in notes_of(row)]
        lines += ["", f"{title}:", "", *notes] if notes else []
    return "\n".join(lines)


def _own_notes(row: dict[str, Any]) -> list[str]:
    return row["reasons"]


def _peer_notes(row: dict[str, Any]) -> list[str]:
    errors = row["errors"].items()
    return [f"{stage}: {text}" for stage, text in errors if stage.startswith("theirs")]


def _both(row: dict[str, Any], cell: Any) -> str:
    return f"{cell(row, 'ours')} / {cell(row, 'theirs')}"


def _analysed(row: dict[str, Any], side: str) -> str:
    return "yes" if "analyse_seconds" in row[side] else "no"


def _equal(row: dict[str, Any], side: str) -> str:
    found = row[side]
    if side == "ours":
        return f"{found.get('equal_masks', 0)} of {NUM_MASKS}"
    if not found.get("runs"):
        return "does not run"
    if "difference" not in found:
        return "runs"
    equal = found["difference"] <= found["tolerance"]
    return "yes" if equal else f"differs by {found['difference']:.0e}"


def _share(row: dict[str, Any], side: str) -> str:
    value = share(row, side) if "layer_params" in row else None
    return "-" if value is None else f"{100 * value:.1f} %"


def _analysis(row: dict[str, Any], side: str) -> str:
    return _seconds(row[side].get("analyse_seconds"))


def _pruning(row: dict[str, Any], side: str) -> str:
    return _seconds(row[side].get("prune_seconds"))


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main() -> None:
    """Measure what is missing, or print the table."""
    options = parse()
    if options.worker:
        size = int(options.memory * GIB)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        list_name, name, path = options.worker
        measure(list_name, name, Path(path))
        return
    content: dict[str, Any] = {"rows": {}}
    if options.out.is_file():
        content = json.loads(options.out.read_text(encoding="utf-8"))
    if options.table:
        print(table(list(content["rows"].values())))
        return
    content["machine"] = machine() | {"python": platform.python_version()}
    content["versions"] = {name: version(name) for name in PACKAGES}
    for list_name, name in selected(options):
        key = f"{list_name}/{name}"
        if key in content["rows"] and not options.redo:
            continue
        row = run_one(list_name, name, options.limit, options.memory)
        content["rows"][key] = row
        write_json(options.out, content)
        print(f"{key}: {'; '.join(row['reasons']) or 'passes'}", flush=True)


if __name__ == "__main__":
    main()
