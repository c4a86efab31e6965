"""What prunegraph makes of the networks of seven libraries, as these build them.

Each network is analysed; random masks of random budgets are drawn; the pruned network must compute
what the zero-masked one does (float64, 1e-5), have the cost that was told and leave no room in its
budget; the last pruned one is analysed and pruned again. Random weights, one thread, batch 1. Each
network runs in a process of its own, with a limit on time; finished rows are not repeated.

A network passes if all that holds, at least one mask was compared, and half of its MACs can go.

    pip install -e '.[zoo]'
    python benchmarks/structure_zoo.py --out zoo.json [--libraries timm ...] [--only gpt2 ...]
    python benchmarks/structure_zoo.py --out zoo.json --table
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from structure_zoo_cases import LIBRARIES, build
from structure_zoo_table import shortcomings, table

from prunegraph.core.errors import one_line
from prunegraph.core.files import write_json
from prunegraph.graph import analyse
from prunegraph.runs.inspect import least_macs
from prunegraph.runs.report.report import machine
from prunegraph.testing.structure_check import check_structure

NUM_MASKS = 2


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--libraries", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="networks of these names alone")
    parser.add_argument("--out", type=Path, default=Path("zoo.json"), metavar="FILE")
    parser.add_argument("--redo", action="store_true", help="measure finished rows again")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds a network")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, end")
    return parser.parse_args()


def measure(library: str, name: str, path: Path) -> None:
    """Analyse and check one network; write its row."""
    torch.set_num_threads(1)
    row: dict[str, Any] = {"library": library, "name": name}
    try:
        model, inputs = build(library, name)
        row["params"] = sum(parameter.numel() for parameter in model.parameters())
        start = time.perf_counter()
        graph = analyse(model, inputs)
        row["analyse_seconds"] = round(time.perf_counter() - start, 2)
        weights = {name for name, p in model.named_parameters() if p.ndim > 1}
        free, existing = graph.prunable_params(weights)
        row |= {"least_macs": least_macs(graph), "prunable": free / max(existing, 1)}
        row["frozen"] = dict(Counter(item.reason for item in graph.frozen_ops))
        found = check_structure(model, inputs, seed=0, num_masks=NUM_MASKS)
        row |= {"compared": found.num_compared}
        row["failures"] = [f"{failure.kind}: {failure.message}" for failure in found.failures]
    except Exception as error:  # whatever a network raises is a result
        row["error"] = one_line(error, 300)
    write_json(path, row)


def run_one(library: str, name: str, limit: float) -> dict[str, Any]:
    """Measure one network in a process of its own and return its row."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        context = multiprocessing.get_context("fork")  # the libraries take long to import
        process = context.Process(target=measure, args=(library, name, path))
        process.start()
        process.join(limit)
        late = process.is_alive()
        process.kill()
        process.join()
        if path.is_file():
            row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return row
    ending = f"over the limit of {limit:.0f} s" if late else f"exit code {process.exitcode}"
    return {"library": library, "name": name, "error": ending}


def main() -> None:
    """Measure what is missing, or print the table."""
    options = parse()
    content: dict[str, Any] = {"rows": {}}
    if options.out.is_file():
        content = json.loads(options.out.read_text(encoding="utf-8"))
    if options.table:
        print(table(list(content["rows"].values())))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    content["machine"] = machine()
    content["versions"] = {name: version(name) for name in ("torch", *LIBRARIES)}
    for library in options.libraries:
        for name in LIBRARIES[library][1]:
            key = f"{library}/{name}"
            skipped = key in content["rows"] and not options.redo
            if skipped or name not in (options.only or [name]):
                continue
            row = run_one(library, name, options.limit)
            content["rows"][key] = row
            write_json(options.out, content)
            print(f"{key}: {'; '.join(shortcomings(row)) or 'passes'}", flush=True)


if __name__ == "__main__":
    main()
