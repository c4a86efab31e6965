"""Masks drawn at random on a task of sentences, beside magnitude and uniform at equal steps.

The encoder gets a head and is trained first, without its embeddings; so is every pruned network.
Finished cells are files in ``--out`` and are not run again; a run that was killed goes on.

    python benchmarks/randomized.py --weights MINILM --table sst2.tsv.gz --out CELLS
    python benchmarks/randomized.py --out CELLS --show
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import prunegraph as pg
from prunegraph.core.files import write_json
from prunegraph.methods.randomized.method import Levels
from prunegraph.methods.randomized.run import samples
from prunegraph.methods.registry import RANDOMIZED, make_method
from prunegraph.runs.options.fields import with_options
from prunegraph.runs.report.report import machine
from prunegraph.tasks.text_classification import TextClassification
from prunegraph.training.loop import FinetuneConfig

Row = dict[str, Any]

MAGNITUDE = "randomized_magnitude"
OWN = ("randomized", "randomized_shares")


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, help="folder of the encoder")
    parser.add_argument("--table", type=Path, help="table of sentences")
    parser.add_argument("--out", type=Path, required=True, help="folder of cells")
    parser.add_argument("--sparsity", type=float, nargs="+", default=(0.9,))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--methods", nargs="+", default=tuple(RANDOMIZED), choices=RANDOMIZED)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--early", type=int, default=25, help="steps before a candidate is judged")
    parser.add_argument("--steps", type=int, default=200, help="steps of a level")
    parser.add_argument("--lr", type=float, help="of pruned networks; default: the method's own")
    parser.add_argument("--dense-steps", type=int, default=600)
    parser.add_argument("--dense-lr", type=float, default=2e-4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--window", type=int, default=64, help="most tokens of a row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print the tables, run nothing")
    return parser.parse_args()


def dense_task(options: argparse.Namespace) -> TextClassification:
    """Return the task with its encoder trained, once for all cells."""
    task = pg.tasks.text_classification(options.weights, options.table, window=options.window)
    network: Any = task.model
    network.base_model.embeddings.requires_grad_(False)
    folder = options.out / task_name(options.table)
    path = folder / "dense.safetensors"
    if path.is_file():
        network.load_state_dict(load_file(path))
        return task
    folder.mkdir(parents=True, exist_ok=True)
    config = FinetuneConfig(
        epochs=1,
        batch_size=options.batch_size,
        peak_lr=options.dense_lr,
        warmup_epochs=0.1,
        optimizer="adamw",
    )
    train = samples(task.train, options.dense_steps, options.batch_size, seed=0)
    checkpoint = folder / "training.safetensors"
    started = time.process_time()
    pg.finetune(network, with_train(task, train), config, seed=0, checkpoint=checkpoint)
    score = report(task, network) | {"method": "dense", "seed": 0, "sparsity": 0.0}
    write_json(folder / "dense.json", score | {"cpu_seconds": time.process_time() - started})
    save_file(network.state_dict(), path)
    checkpoint.unlink()
    return task


def with_train(task: TextClassification, train: Any) -> TextClassification:
    """Return a task with other rows to train on."""
    return type(task)(**{**vars(task), "train": train})


def report(task: TextClassification, model: torch.nn.Module) -> Row:
    """Return the scores of a network."""
    parts = {"search": task.search, "test": task.test}
    return {name: task.score(model, part).value for name, part in parts.items() if part is not None}


def run_cell(
    task: TextClassification, options: argparse.Namespace, name: str, sparsity: float, seed: int
) -> Row:
    """Return the figures of one method, sparsity and seed."""
    shared = ("candidates", "early", "steps", "batch_size", *("lr",) * (options.lr is not None))
    method: Any = make_method(name)
    method = with_options(method, {each: str(getattr(options, each)) for each in shared})
    assert isinstance(method, Levels)
    folder = options.out / task_name(options.table) / f"{name}-{sparsity}-{seed}"
    started = time.process_time()
    result = pg.prune(task, method, pg.Budget(sparsity=sparsity), seed=seed, checkpoint=folder)
    row = {"method": name, "sparsity": sparsity, "seed": seed, **report(task, result.model)}
    row |= {"zeros": result.report["pruned"]["sparsity"], "machine": machine()}
    row |= {"selection": result.report.get("selection")}
    for path in folder.glob("*"):
        path.unlink()
    folder.rmdir()
    return row | {"cpu_seconds": time.process_time() - started}


def task_name(table: Path) -> str:
    """Return the name of a table's task."""
    return table.name.partition(".")[0]


def read(folder: Path) -> list[Row]:
    """Return the finished cells of a task."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def table(name: str, rows: Sequence[Row]) -> str:
    """Return the Markdown table of a task, and what it shows."""
    lines = [
        f"**{name}**",
        "",
        "| sparsity | method | search | test | seeds | rank correlation | loss: 1, all | CPU s |",
        "|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    order = ("dense", *RANDOMIZED)
    for sparsity in sorted({row["sparsity"] for row in rows}):
        level = [row for row in rows if row["sparsity"] == sparsity]
        for method in [each for each in order if any(row["method"] == each for row in level)]:
            own = [row for row in level if row["method"] == method]
            told = [row["selection"] for row in own if row.get("selection")]
            ranks = [
                each["rank_correlation"] for each in told if each["rank_correlation"] is not None
            ]
            gains = [[each["gain"][place] for each in told] for place in (0, -1)]
            cells = [
                f"{sparsity:g}",
                method,
                *(spread([100 * row[part] for row in own]) for part in ("search", "test")),
                str(len(own)),
                spread(ranks),
                ", ".join(f"{statistics.mean(each):.4f}" for each in gains if each),
                f"{statistics.mean(row['cpu_seconds'] for row in own):.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *verdicts(level)] if sparsity else []
        lines += [""] if sparsity else []
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Return the mean, with the standard deviation of several."""
    if not values:
        return ""
    more = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{more}"


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Return whether candidates are better than magnitude, by paired seeds: two standard errors."""
    scores = {(row["method"], row["seed"]): 100 * row["test"] for row in rows}
    found = []
    for method in OWN:
        seeds = [seed for name, seed in scores if name == method and (MAGNITUDE, seed) in scores]
        gaps = [scores[method, seed] - scores[MAGNITUDE, seed] for seed in seeds]
        if len(gaps) < 3:
            told = f"{spread(gaps)}, {len(gaps)} seeds are too few" if gaps else "no pairs"
            found.append(f"{method} above magnitude: not shown ({told})")
            continue
        error = statistics.stdev(gaps) / len(gaps) ** 0.5
        word = "shown" if statistics.mean(gaps) > 2 * error else "not shown"
        found.append(f"{method} above magnitude: {word} ({spread(gaps)}, {len(gaps)} seeds)")
    return [f"{line}  " for line in found]


def main() -> None:
    """Run the cells that are missing, and print the tables."""
    options = parse()
    torch.set_num_threads(options.threads)
    if not options.show:
        task = dense_task(options)
        folder = options.out / task_name(options.table)
        for seed in options.seeds:
            for sparsity in options.sparsity:
                for name in options.methods:
                    path = folder / f"{name}-{sparsity}-{seed}.json"
                    if not path.is_file():
                        write_json(path, run_cell(task, options, name, sparsity, seed))
                        print(path.read_text(), flush=True)
    for folder in sorted(path for path in options.out.iterdir() if path.is_dir()):
        print(table(folder.name, read(folder)))


if __name__ == "__main__":
    main()
