"""Pruning of single weights of a language model: what it costs in perplexity, time and memory.

Activations are re-fed: each block is measured on what the pruned blocks before it return. Finished
cells are files in ``--out`` and are not measured again; a run that was killed goes on. The texts
are ``NAME.txt.gz`` in ``--text``.

    python benchmarks/weights.py table --model DIR --text DIR --out DIR [--plan 50 2:4 ...]
    python benchmarks/weights.py table --out DIR --show        # the tables of finished cells
    python benchmarks/weights.py speed --model DIR --text DIR  # seconds beside SparseGPT's
    python benchmarks/weights.py memory --model DIR --text DIR # peak for 6, 12, 24, 30 blocks
"""

import argparse
import copy
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from weights_cells import BUDGETS, DENSE, METHODS, Cell, Setting, measure, pruned

from prunegraph.core.files import write_json
from prunegraph.core.pattern import Pattern
from prunegraph.layerwise.blocks import BlockWalk, Matrix
from prunegraph.layerwise.solve import Hessian
from prunegraph.layerwise.weights import prunable_weights
from prunegraph.methods.obs.base import BATCH, BlockwiseMethod
from prunegraph.methods.obs.magnitude import _largest as largest
from prunegraph.runs.report.report import machine

Row = dict[str, Any]

SEEDS = (0, 1, 2)
TEST, OTHER_TEST = "wikitext2-test", "ptb-test"
CALIBRATION = "wikitext2-valid"
TEXTS = (CALIBRATION, "ptb-valid", "tinystories-2mb")
SINGLE = ("magnitude", "wanda", "sparsegpt", "thanos", "apt", "apt, mask=staged")
COLUMNS = ("wanda", "sparsegpt", "thanos", "thanos, 10 % of the rows dense", "apt")
DEPTHS = (6, 12, 24, 30)
PLANS = ("50", "2:4", "4:8", "columns", "texts")


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("mode", choices=["table", "speed", "memory", "cell", "peak"])
    parser.add_argument("--model", type=Path, help="folder of the network")
    parser.add_argument("--text", type=Path, help="folder of the texts")
    parser.add_argument("--out", type=Path, help="folder of cells, or file of the figures")
    parser.add_argument("--plan", nargs="+", default=PLANS, choices=PLANS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="these alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--whole", action="store_true", help="score the whole test text too")
    parser.add_argument("--show", action="store_true", help="print the tables, measure nothing")
    parser.add_argument("--calibration", default=CALIBRATION, metavar="NAME")
    parser.add_argument("--test", default=TEST, metavar="NAME")
    parser.add_argument("--window", type=int, default=512, help="tokens of calibration windows")
    parser.add_argument("--test-window", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=32, help="calibration windows")
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
    print(tables([json.loads(path.read_text()) for path in sorted(options.out.glob("*.json"))]))


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


def tables(rows: Sequence[Row]) -> str:
    """Return the Markdown tables of cells."""
    lines = []
    for budget in ("", *BUDGETS):
        own = [row for row in rows if row["budget"] == budget]
        if own:
            lines += _budget_table(budget or DENSE, own)
    texts = sorted({row["calibration"] for row in rows if row["method"] != DENSE}, key=str)
    if len(texts) > 1:
        lines += _text_table([row for row in rows if row["budget"] == "50 %"], texts)
    return "\n".join(lines)


def _budget_table(title: str, rows: Sequence[Row]) -> list[str]:
    """Return the table of one budget, and the paired differences of its neighbours."""
    main = rows[0]["calibration"] if title == DENSE else _main_text(rows)
    own = [row for row in rows if row["calibration"] == main]
    test = own[0]["tests"][0]
    lines = [
        f"**{title}**, calibrated on {main}, perplexity on {test}:",
        "",
        "| method | first windows | whole | sparsity | mean error | CPU s | peak, MB | seeds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    scores: dict[str, dict[int, float]] = {}
    for method in (DENSE, *METHODS):
        found = [row for row in own if row["method"] == method]
        if not found:
            continue
        scores[method] = {row["seed"]: row["perplexity"][test]["first"] for row in found}
        cells = [
            method,
            _spread(scores[method].values()),
            _spread(_present(row["perplexity"][test].get("whole") for row in found)),
            _spread(_present(row.get("sparsity") for row in found), 4, spread=False),
            _spread(_present(row.get("mean_error") for row in found), 4, spread=False),
            _spread(_present(row.get("cpu_seconds") for row in found), 0, spread=False),
            _spread(
                [
                    (row["peak_bytes"] - row["copy_bytes"]) / 1e6
                    for row in found
                    if row.get("copy_bytes")
                ],
                0,
                spread=False,
            ),
            str(len(found)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_differences(scores), ""]
    return lines


def _main_text(rows: Sequence[Row]) -> str:
    """Return the calibration text of most cells."""
    return statistics.mode(row["calibration"] for row in rows)


def _differences(scores: dict[str, dict[int, float]]) -> Iterator[str]:
    """Yield by how much each method is below the one before it, calibration seed by seed."""
    for before, after in itertools.pairwise(name for name in scores if name != DENSE):
        one, other = scores[before], scores[after]
        if before == "magnitude":
            one = dict.fromkeys(other, next(iter(one.values())))
        gains = [one[seed] - other[seed] for seed in other if seed in one]
        if len(gains) > 1:
            error = 2 * statistics.stdev(gains) / len(gains) ** 0.5
            shown = "shown" if abs(statistics.mean(gains)) > error else "not shown"
            yield (
                f"- {after} below {before} by {statistics.mean(gains):.2f} ± {error:.2f} "
                f"(two standard errors, {len(gains)} seeds): {shown}."
            )


def _text_table(rows: Sequence[Row], texts: Sequence[str]) -> list[str]:
    """Return what each calibration text costs on each test text."""
    tests = list(dict.fromkeys(test for row in rows for test in row["tests"]))
    lines = [
        "**apt at 50 %**, by calibration text, perplexity on the first windows of:",
        "",
        f"| calibrated on | {' | '.join(tests)} | seeds |",
        f"|---|{'--:|' * (len(tests) + 1)}",
    ]
    for text in texts:
        own = [row for row in rows if row["calibration"] == text and row["method"] == "apt"]
        cells = [
            _spread(_present(row["perplexity"].get(test, {}).get("first") for row in own))
            for test in tests
        ]
        lines.append(f"| {text} | {' | '.join(cells)} | {len(own)} |")
    return [*lines, ""]


def _present(values: Iterable[Any]) -> list[float]:
    return [value for value in values if value is not None]


def _spread(values: Iterable[float], digits: int = 2, *, spread: bool = True) -> str:
    values = list(values)
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if spread and values[1:] else mean


def speed(options: argparse.Namespace) -> None:
    """Print the CPU seconds of each method on the same matrices, and their ratio to SparseGPT's."""
    options.layers = options.layers or 3
    options.sequences = min(options.sequences, BATCH)
    task = setting_of(options).task(options.calibration, 0)
    matrices: list[Matrix] = []

    def note(matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
        matrices.append(matrix)
        return matrix.weight, torch.ones_like(matrix.weight, dtype=torch.bool)

    batches = list(task.batches(task.train, BATCH))
    walk = BlockWalk(task.model, prunable_weights(task.model), batches, task.forward)
    walk.run(note)
    rows: dict[str, Row] = {}
    for budget in ("50 %", "2:4", "4:8"):
        seconds = {name: min(_seconds(name, budget, matrices) for _ in range(2)) for name in SINGLE}
        rows[budget] = seconds
        print(f"{budget}, {len(matrices)} matrices of {options.layers} blocks:", flush=True)
        for name, value in seconds.items():
            print(f"| {name} | {value:.2f} s | {value / seconds['sparsegpt']:.2f} |", flush=True)
    if options.out is not None:
        write_json(options.out, {"cpu_seconds": rows, "machine": machine()})


def _seconds(name: str, budget: str, matrices: Sequence[Matrix]) -> float:
    """Return the CPU seconds of a method on matrices, the factors of Hessians included."""
    method, pattern = METHODS[name], Pattern.parse(BUDGETS[budget].pattern or "unstructured")
    fresh: dict[int, Hessian] = {}  # matrices that read the same share one
    started = time.process_time()
    for matrix in matrices:
        (given,) = matrix.hessians
        hessian = fresh.setdefault(id(given), copy.copy(given))  # without factors: nobody asked
        zeros = matrix.weight.numel() // 2
        if isinstance(method, BlockwiseMethod):
            method.prune_matrix(matrix.weight, hessian, zeros, pattern)
        else:
            largest(matrix.weight, zeros, pattern)
    return time.process_time() - started


def memory(options: argparse.Namespace) -> None:
    """Print the peak of memory beyond the networks for some numbers of blocks."""
    rows = []
    for layers in DEPTHS if options.layers is None else (options.layers,):
        for method in options.methods or ("sparsegpt", "apt"):
            command = [sys.executable, __file__, "peak", "--methods", method]
            for name in ("model", "text", "window", "sequences"):
                command += [f"--{name}", str(getattr(options, name))]
            command += ["--layers", str(layers)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = json.loads(answer)
            rows.append({"layers": layers, "method": method, **row})
            beyond = row["peak_bytes"] - row["copy_bytes"]
            print(
                f"| {method} | {layers} blocks | network {row['model_bytes'] / 1e6:.0f} MB | "
                f"beyond it and its pruned copy {beyond / 1e6:.0f} MB |",
                flush=True,
            )
    if options.out is not None:
        write_json(options.out, {"rows": rows, "machine": machine()})


def peak_of_one(options: argparse.Namespace) -> None:
    """Print what one pruning takes, as JSON."""
    cell = Cell(method=options.methods[0], budget="50 %", calibration=options.calibration)
    task = setting_of(options).task(cell.calibration, 0)
    print(json.dumps(pruned(task, cell, score=False)[1]))


def main() -> None:
    """Run one mode."""
    options = parse()
    torch.set_num_threads(1)
    modes = {
        "table": table,
        "cell": measure_cell,
        "speed": speed,
        "memory": memory,
        "peak": peak_of_one,
    }
    modes[options.mode](options)


if __name__ == "__main__":
    main()
