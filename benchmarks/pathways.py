"""Masks of languages while a recogniser trains: pathways, one mask for all, and their controls.

Every row trains the same dense network with equally many steps. Finished cells are files in
``--out`` and are not trained again; one that was killed goes on. Word error rates on the test
split, the mean over languages, with seeds as ± one standard deviation.

    python benchmarks/pathways.py --out DIR                       # the proxy: digits, no speech
    python benchmarks/pathways.py --out DIR --speech FOLDER --words 1 --dense-epochs 25 --epochs 5
    python benchmarks/pathways.py --out DIR --speech FOLDER --whisper FOLDER --clips 120 50 \
        --sparsity 0.7 --seeds 0 --epochs 2 --batch-size 16 --lr 1e-4 --every 6
    python benchmarks/pathways.py --out DIR --show [--collect FILE]  # of finished cells
"""

import argparse
import dataclasses
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from prunegraph.core.budget import Budget
from prunegraph.core.files import write_json
from prunegraph.data.recordings import read_recordings
from prunegraph.data.speech import SpeechData, proxy_speech
from prunegraph.graph import copy_network
from prunegraph.methods.context import Context
from prunegraph.methods.method import Problem, Result
from prunegraph.methods.obs.magnitude import magnitude_mask
from prunegraph.methods.pathways import MaskedTraining, OneMask, Pathways
from prunegraph.methods.registry import PATHWAYS, load
from prunegraph.models import WeightsInfo, load_weights, save_weights
from prunegraph.runs.report.report import machine
from prunegraph.runs.tasks.speech_recognition import PROXY_RECIPE, SPEECH_RECIPE
from prunegraph.tasks.speech_recognition import SpeechRecognition, speech_recognition
from prunegraph.tasks.whisper import whisper_recognition
from prunegraph.training.loop import finetune
from prunegraph.training.masked import MaskPlan


class Dense(OneMask):
    """Trains with as many steps and no mask."""

    def plan(self, problem: Problem) -> MaskPlan:
        """Return the plan that keeps everything."""
        del problem
        return MaskPlan()


class OneShot(OneMask):
    """One mask, the smallest weights of each layer, from the first step on."""

    def plan(self, problem: Problem) -> MaskPlan:
        """Return the plan of a mask by magnitude."""
        return MaskPlan(masks=magnitude_mask(problem.task.model, problem.budget))


class RandomMasks(Pathways):
    """Masks of languages by chance, which stay."""

    def plan(self, problem: Problem) -> MaskPlan:
        """Return the plan of random masks."""
        first = dataclasses.replace(self, start="random", reselect=True)
        plan = Pathways.plan(first, problem)
        return MaskPlan(masks=plan.masks, group_of=plan.group_of)


ROWS: Mapping[str, Callable[..., Any]] = {
    "dense": Dense,
    "one shot": OneShot,
    "random masks": RandomMasks,
    **{name: load(home) for name, home in PATHWAYS.items()},
    "pathways, reselect": lambda **given: Pathways(**given, reselect=True),
    "pathways, start=magnitude": lambda **given: Pathways(
        **given, reselect=True, start="magnitude"
    ),
}
"""What makes the method of each row from the options that all share."""


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of cells")
    parser.add_argument("--speech", type=Path, help="folder of recordings; default: the proxy")
    parser.add_argument("--whisper", type=Path, help="folder; default: a small recogniser")
    parser.add_argument("--clips", type=int, nargs=2, help="of a language: train, search and test")
    parser.add_argument("--words", type=int, default=1, help="most words of an utterance")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--every", type=int, default=20, help="steps between choices of masks")
    parser.add_argument("--emphasis", type=float, default=0.5)
    parser.add_argument("--dense-epochs", type=int, help="of the network before")
    parser.add_argument("--show", action="store_true", help="print the table of finished cells")
    parser.add_argument("--collect", type=Path, help="write their figures to this file")
    return parser.parse_args()


def main() -> None:
    """Train what is missing, and print the table."""
    options = parse()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.show:
        data = proxy_speech()
        if options.speech is not None:
            data = read_recordings(options.speech, words=options.words)
        for seed in options.seeds:
            task = dense_task(options, data, seed)
            for sparsity in options.sparsity:
                for row in options.rows:
                    measure(options, task, row, sparsity, seed)
    cells = [json.loads(path.read_text()) for path in sorted(options.out.glob("cell-*.json"))]
    if options.collect is not None:
        write_json(options.collect, {"machine": machine(), "cells": cells})
    for sparsity in sorted({cell["sparsity"] for cell in cells}):
        print(table([cell for cell in cells if cell["sparsity"] == sparsity]))


def dense_task(options: argparse.Namespace, data: SpeechData, seed: int) -> SpeechRecognition:
    """Return the task of the dense network of a seed, trained if it is not there.

    Whisper stays as it was published.
    """
    if options.whisper is not None:
        return fewer(whisper_recognition(options.whisper, data), options.clips, seed)
    task = fewer(speech_recognition(data=data, seed=seed), options.clips, seed)
    path = options.out / f"dense-{seed}.safetensors"
    recipe = PROXY_RECIPE if data.proxy else SPEECH_RECIPE
    recipe = dataclasses.replace(recipe, epochs=options.dense_epochs or recipe.epochs)
    if not path.exists():
        checkpoint = options.out / f"dense-{seed}.checkpoint"
        finetune(task.model, task, recipe, seed=seed, checkpoint=checkpoint)
        save_weights(task.model, path, WeightsInfo(arch=task.name))
        checkpoint.unlink(missing_ok=True)
    load_weights(task.model, path)
    return task


def fewer(task: SpeechRecognition, clips: tuple[int, int] | None, seed: int) -> SpeechRecognition:
    """Return the task with so many clips of each language, drawn by the seed."""
    if clips is None:
        return task
    few, (train, scored) = random.Random(seed), clips
    counts = {"train": train, "search": scored, "test": scored}
    return dataclasses.replace(
        task, **{name: drawn(getattr(task, name), count, few) for name, count in counts.items()}
    )


def drawn(split: Any, count: int, few: random.Random) -> Any:
    """Return a split with at most so many clips of each language."""
    own = split.source.groups[split.index]
    chosen: list[int] = []
    for number in own.unique():
        places = (own == number).nonzero().flatten().tolist()
        chosen += few.sample(places, min(count, len(places)))
    return split.take(torch.tensor(sorted(chosen)))


def measure(
    options: argparse.Namespace, task: SpeechRecognition, row: str, sparsity: float, seed: int
) -> None:
    """Train a cell, unless it is there, and write its figures."""
    name = f"{row}-{sparsity:g}-{seed}".replace(" ", "_").replace(",", "")
    path = options.out / f"cell-{name}.json"
    if path.exists():
        return
    shared = ("epochs", "lr", "batch_size", "every")
    given: dict[str, Any] = {name: getattr(options, name) for name in shared}
    if row.startswith("pathways") or "score" in row or "union" in row:
        given["emphasis"] = options.emphasis
    method: MaskedTraining = ROWS[row](**given)
    context = Context(task=task, structure=None, seed=seed, reconstruct=False)
    problem = context.problem(Budget(sparsity=sparsity), folder=options.out / f"work-{name}")
    begun = time.process_time()
    result: Result = method.prune(problem)
    seconds = time.process_time() - begun
    told = result.details["groups"]
    assert result.model is not None
    test = task.group_scores(copy_network(result.model), task.test)
    before = task.group_scores(task.model, task.test)
    cell = {"row": row, "sparsity": sparsity, "seed": seed, "options": given, "seconds": seconds}
    cell |= {"test": test, "before": before, **{k: told[k] for k in told if k != "history"}}
    write_json(path, cell)
    print(f"{name}: {mean(test):.2f} %, {seconds:.0f} s", flush=True)


def mean(rates: Mapping[str, float]) -> float:
    """Return the mean word error rate in percent."""
    return 100.0 * statistics.mean(rates.values())


def table(cells: list[dict[str, Any]]) -> str:
    """Return the rows of one sparsity as a table in Markdown."""
    languages = list(cells[0]["test"])
    head = ["row", "test", *languages, "search", "active", "union", "overlap", "CPU s", "seeds"]
    before = [mean(cell["before"]) for cell in cells if cell["row"] == cells[0]["row"]]
    lines = [f"{cells[0]['sparsity']:.0%} zeros; dense before: {spread(before)}", ""]
    lines += [" | ".join(["", *head, ""]).strip(), "|---|" + "--:|" * (len(head) - 1)]
    for row in [name for name in ROWS if any(cell["row"] == name for cell in cells)]:
        own = [cell for cell in cells if cell["row"] == row]
        values = [spread([mean(cell["test"]) for cell in own])]
        values += [f"{100 * average(own, 'test', name):.1f}" for name in languages]
        values.append(spread([mean(cell["scores"]) for cell in own]))
        values += [f"{average(own, share):.3f}" for share in ("active", "stored", "overlap")]
        values += [f"{average(own, 'seconds'):.0f}", str(len(own))]
        lines.append("| " + " | ".join([row, *values]) + " |")
    return "\n".join(lines) + "\n"


def average(cells: list[dict[str, Any]], *keys: str) -> float:
    """Return the mean over cells of a figure."""
    found = []
    for cell in cells:
        value: Any = cell
        for key in keys:
            value = value[key]
        found.append(value)
    return float(statistics.mean(found))


def spread(values: list[float]) -> str:
    """Return mean and standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    main()
