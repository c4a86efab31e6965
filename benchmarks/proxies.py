"""Which cheap figure of a mask predicts its accuracy after the whole fine-tune.

Reads the fine-tuned networks of a comparison's folder, finished or not, and scores their masks as a
search would: after recalibration, after more and more training steps (``--short-finetune``), after
reconstruction (``--reconstruct``), and so cut from others, as ``pretrain --slimmable`` makes them.
The table holds Spearman's correlation, over the masks, of each figure with the accuracy after the
fine-tune, both on the search split: the test split stays closed, so a figure may be chosen by it.

    python benchmarks/proxies.py RUN --out FILE.json [--steps 0 5 10 20 40] [--slimmable WEIGHTS]
    python benchmarks/proxies.py RUN --out FILE.json --table
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from searches import read_rows

from prunegraph.experiment.bench import Bench
from prunegraph.experiment.compare_config import CompareConfig
from prunegraph.experiment.dense import DENSE_FILE
from prunegraph.experiment.finish import load_finetuned
from prunegraph.experiment.folder import CONFIG_FILE
from prunegraph.experiment.options import load_config
from prunegraph.experiment.report import machine
from prunegraph.experiment.setup import load_target
from prunegraph.files import write_json
from prunegraph.pruning.artefacts import WEIGHTS_FILE

RECONSTRUCTED = "reconstructed"


def measure(run: Path, steps: list[int], slimmable: list[Path], out: Path) -> None:
    """Score every fine-tuned mask of a run; finished ones are not repeated."""
    config = load_config(CompareConfig, run / CONFIG_FILE)
    config = dataclasses.replace(config, weights=run / DENSE_FILE, pretrain_epochs=None)
    torch.set_num_threads(config.threads or 1)
    target = load_target(config, config.budget())
    bench = Bench(target=target, options=config, seed=config.seed)
    options: dict[str, dict[str, Any]] = {
        f"after {number} steps": {"reconstruct": False, "short_finetune": number}
        for number in steps
    } | {RECONSTRUCTED: {"reconstruct": True, "short_finetune": 0}}
    evaluators = {
        name: Bench(
            target=target, options=dataclasses.replace(config, **changes), seed=config.seed
        ).evaluator()
        for name, changes in options.items()
    }
    for weights in slimmable:
        other = load_target(dataclasses.replace(config, weights=weights))
        changed = dataclasses.replace(config, reconstruct=True)
        evaluators[f"cut from {weights.stem}"] = Bench(
            target=other, options=changed, seed=config.seed
        ).evaluator()
    content = read_rows(out) | {"machine": machine()}
    for folder in sorted(path.parent for path in run.glob(f"cells/*/{WEIGHTS_FILE}")):
        model, mask = load_finetuned(target, folder)
        if mask == target.graph.dense_mask():
            continue
        cost = target.graph.cost(mask)
        row = content["rows"].setdefault(
            mask.digest(), {"finetuned": {}, "params": cost.params, "scores": {}}
        )
        if folder.name not in row["finetuned"]:
            row["finetuned"][folder.name] = bench.search_accuracy(model)
        for name, evaluator in evaluators.items():
            if name not in row["scores"]:
                found = evaluator.evaluate(evaluator.graph.mask(mask.keep))
                row["scores"][name] = {
                    "accuracy": found.accuracy,
                    "loss": found.loss,
                    "seconds": found.seconds,
                }
        write_json(out, content)
        print(f"{folder.name}: {row}", flush=True)


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the correlations as Markdown, over all masks and over the better half of them."""
    masks = sorted(rows.values(), key=lambda row: -row["scores"][RECONSTRUCTED]["accuracy"])
    lines = ["| figure | all masks | better half | mean | seconds |", "|---|--:|--:|--:|--:|"]
    figures = {"parameters kept": [row["params"] for row in masks]}
    more = {}
    for name in masks[0]["scores"]:
        scores = [row["scores"][name] for row in masks]
        accuracies = [score["accuracy"] for score in scores]
        figures[f"accuracy {name}"] = accuracies
        figures[f"minus loss {name}"] = [-score["loss"] for score in scores]
        seconds = np.mean([score["seconds"] for score in scores])
        more[f"accuracy {name}"] = f"{100 * np.mean(accuracies):.2f} | {seconds:.2f}"
    tuned = [float(np.mean(list(row["finetuned"].values()))) for row in masks]
    for name, values in figures.items():
        whole, half = (
            spearmanr(values[:count], tuned[:count]).statistic
            for count in (len(masks), len(masks) // 2)
        )
        lines.append(f"| {name} | {whole:.2f} | {half:.2f} | {more.get(name, ' | ')} |")
    return "\n".join([*lines, "", f"{len(masks)} masks."])


def main() -> None:
    """Measure what is missing, or print the table."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 5, 10, 20, 40])
    parser.add_argument("--slimmable", type=Path, nargs="+", metavar="WEIGHTS", default=[])
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, end")
    known = parser.parse_args()
    if not known.table:
        measure(known.run, sorted({0, *known.steps}), known.slimmable, known.out)
    print(table(read_rows(known.out)["rows"]))


if __name__ == "__main__":
    main()
