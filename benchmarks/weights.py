"""Pruning of single weights of a language model: what it costs in perplexity, time and memory.

Activations are re-fed: each block is measured on what the pruned blocks before it return. Finished
cells are files in ``--out`` and are not measured again; a run that was killed goes on. The texts
are ``NAME.txt.gz`` in ``--text``.

    python benchmarks/weights.py table --model DIR --text DIR --out DIR [--plan 50 2:4 ...]
    python benchmarks/weights.py table --out DIR --show [--collect FILE]  # of finished cells
    python benchmarks/weights.py speed --model DIR --text DIR  # seconds beside SparseGPT's
    python benchmarks/weights.py memory --model DIR --text DIR # peak for 6, 12, 24, 30 blocks
    python benchmarks/weights.py llmcompressor --model DIR --text DIR --python VENV/bin/python
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from weights_cells import BUDGETS, DENSE, METHODS, TEST, Cell, Setting, measure
from weights_speed import llmcompressor, memory, peak_of_one, speed
from weights_table import Row, tables

from prunegraph.core.files import write_json
from prunegraph.runs.report.report import machine

SEEDS = (0, 1, 2)
OTHER_TEST = "ptb-test"
CALIBRATION = "wikitext2-valid"
TEXTS = (CALIBRATION, "ptb-valid", "tinystories-2mb")
SINGLE = ("magnitude", "wanda", "sparsegpt", "thanos", "apt", "apt, mask=staged")
COLUMNS = ("wanda", "sparsegpt", "thanos", "thanos, 10 % of the rows dense", "apt")
MODES = ("table", "speed", "memory", "llmcompressor", "cell", "peak")
PLANS = ("50", "2:4", "4:8", "columns", "texts")


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--model", type=Path, help="folder of the network")
    parser.add_argument("--text", type=Path, help="folder of the texts")
    parser.add_argument("--out", type=Path, help="folder of cells, or file of the figures")
    parser.add_argument("--plan", nargs="+", default=PLANS, choices=PLANS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="these alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--whole", action="store_true", help="score the whole test text too")
    parser.add_argument("--show", action="store_true", help="print the tables, measure nothing")
    parser.add_argument("--collect", type=Path, help="write all finished cells to one file")
    parser.add_argument("--calibration", default=CALIBRATION, metavar="NAME")
    parser.add_argument("--test", default=TEST, metavar="NAME")
    parser.add_argument("--window", type=int, default=512, help="tokens of calibration windows")
    parser.add_argument("--test-window", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=32, help="calibration windows")
    parser.add_argument("--python", type=Path, help="interpreter that has llmcompressor")
    parser.add_argument("--budgets", nargs="+", default=("50 %", "2:4"), choices=BUDGETS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser.parse_args()


def setting_of(options: argparse.Namespace) -> Setting:
    """Return what all cells share."""
    if options.model is None or options.text is None:
        sys.exit("give --model and --text")
    return Setting(
        model=options.model,
        text=options.text,
        window=options.window,
        test_window=options.test_window,
        sequences=options.sequences,
        layers=options.layers,
    )


def planned(options: argparse.Namespace) -> list[Cell]:
    """Return the cells in the order in which they are measured: one seed after the other."""
    tests = (options.test, OTHER_TEST) if options.test == TEST else (options.test,)
    cells = [Cell(method=DENSE, calibration=options.calibration, tests=tests)]
    for seed in options.seeds:
        for plan in options.plan:
            cells += [
                Cell(
                    method=method,
                    budget=budget,
                    calibration=calibration,
                    seed=seed,
                    # the table of calibration texts is of these
                    tests=tests if (method, budget) == ("apt", "50 %") else tests[:1],
                )
                for budget, method, calibration in _combinations(plan, options.calibration)
                # magnitude reads no data
                if not options.methods or method in options.methods
                if method != "magnitude" or seed == options.seeds[0]
            ]
    return list(dict.fromkeys(cells))


def _combinations(plan: str, calibration: str) -> Iterator[tuple[str, str, str]]:
    """Yield budget, method and calibration text of each cell of a plan."""
    if plan == "texts":
        yield from (("50 %", "apt", text) for text in TEXTS)
    elif plan == "columns":
        for budget in ("columns, 20 %", "columns, 30 %"):
            yield from ((budget, method, calibration) for method in COLUMNS)
    else:
        yield from (("50 %" if plan == "50" else plan, name, calibration) for name in SINGLE)


def table(options: argparse.Namespace) -> None:
    """Measure the cells that are not there yet, each in a process of its own; print the tables."""
    cells = planned(options)
    if not options.show:
        setting_of(options)
        for cell in cells:
            if not _finished(options.out / cell.file, whole=options.whole):
                _measure_apart(cell, options)
    rows = finished_rows(options.out)
    if options.collect is not None:
        write_json(options.collect, {"rows": rows})
    print(tables(rows))


def finished_rows(out: Path) -> list[Row]:
    """Return the figures of the cells of a folder, or of a file that ``--collect`` wrote."""
    if out.is_file():
        rows: list[Row] = json.loads(out.read_text())["rows"]
        return rows
    return [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]


def _finished(path: Path, *, whole: bool) -> bool:
    if not path.is_file():
        return False
    scores = json.loads(path.read_text())["perplexity"].values()
    return not whole or all("whole" in score for score in scores)


def _measure_apart(cell: Cell, options: argparse.Namespace) -> None:
    """Measure a cell in a process of its own; say how it went."""
    command = [sys.executable, __file__, "cell", "--cell", json.dumps(asdict(cell))]
    for name in ("model", "text", "out", "window", "test_window", "sequences", "layers"):
        if getattr(options, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--whole"] if options.whole else []
    started = time.perf_counter()
    done = subprocess.run(command, check=False)
    ending = "" if not done.returncode else f", FAILED with {done.returncode}"
    seconds = time.perf_counter() - started
    print(f"{cell.method}, {cell.budget}, seed {cell.seed}: {seconds:.0f} s{ending}", flush=True)


def measure_cell(options: argparse.Namespace) -> None:
    """Measure one cell and write its file."""
    cell = Cell(**{**json.loads(options.cell), "tests": tuple(json.loads(options.cell)["tests"])})
    found = measure(cell, setting_of(options), whole=options.whole)
    write_json(options.out / cell.file, {**found, "machine": machine()})


def main() -> None:
    """Run one mode."""
    options = parse()
    torch.set_num_threads(1)
    if options.mode == "table":
        table(options)
    elif options.mode == "memory":
        memory(options)
    elif options.mode == "cell":
        measure_cell(options)
    else:
        modes = {"speed": speed, "peak": peak_of_one, "llmcompressor": llmcompressor}
        modes[options.mode](options, setting_of(options))


if __name__ == "__main__":
    main()
