"""What prunegraph and Torch-Pruning make of the same networks, in one run.

For every network of the lists: can it be analysed, does the pruned network equal the zero-masked
one, which share of the convolution and linear weights can be pruned, and how long that takes. Each
network runs in a process of its own with limits on time and memory, so that a crash is one row.
Finished rows are not repeated; weights are random, one thread, batch 1, images 224 x 224 where the
network takes them.

A network passes if half of its MACs can be taken to the last channel that fits, the zero-masked and
the pruned network agree on five masks (float64, 1e-5; float32, 1e-3 above 100 million parameters),
and the prunable share is at least 90 %, or Torch-Pruning's if that is smaller.

    pip install -e '.[benchmark]'
    python benchmarks/structure.py --out structure.json [--lists timm hf] [--only resnet18 ...]
    python benchmarks/structure.py --out structure.json --table
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from structure_cases import lists
from structure_table import assemble, table
from structure_worker import measure

from prunegraph.core.files import write_json
from prunegraph.runs.report.report import machine

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
