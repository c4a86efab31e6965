"""What a fine-tune makes of the same masks, cut from other weights of the same network.

Reads the fine-tuned masks of one method in a finished comparison's folder, cuts them from each of
the weights too - a slimmable network's, those of a longer training - and fine-tunes them as the
comparison did, in the same orders of the images. The search split alone is looked at. Finished
networks are not repeated and interrupted ones go on, in the folder FILE.

    python benchmarks/starts.py RUN --weights W [W ...] --out FILE.json [--method agent/best]
    python benchmarks/starts.py RUN --out FILE.json --table
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from searches import read_rows

from prunegraph.experiment.bench import Bench
from prunegraph.experiment.compare_config import CompareConfig
from prunegraph.experiment.console import Console
from prunegraph.experiment.dense import DENSE_FILE
from prunegraph.experiment.finish import finetune_mask, load_finetuned
from prunegraph.experiment.folder import CONFIG_FILE, RunFolder
from prunegraph.experiment.machine import keep_freed_memory
from prunegraph.experiment.options import load_config
from prunegraph.experiment.report import machine, read_report, spread
from prunegraph.experiment.report import read_rows as method_rows
from prunegraph.experiment.setup import load_target
from prunegraph.files import write_json

OWN = "as in the run"


def measure(run: Path, method: str, weights: Sequence[Path], out: Path) -> None:
    """Fine-tune what is missing."""
    keep_freed_memory()
    config = load_config(CompareConfig, run / CONFIG_FILE)
    torch.set_num_threads(config.threads or 1)
    folder = RunFolder(path=run)
    found = [row for row in method_rows(read_report(folder)) if row.name == method and row.cell]
    content = read_rows(out) | {"machine": machine(), "method": method}
    for start in (run / DENSE_FILE, *weights):
        name = OWN if start == run / DENSE_FILE else start.stem
        given = dataclasses.replace(config, weights=start, pretrain_epochs=None)
        target = load_target(given, config.budget())
        bench = Bench(target=target, options=config, seed=config.seed)
        rows = content["rows"].setdefault(name, {"dense": bench.search_accuracy(target.model)})
        for row in found:
            key = f"seed {row.seed}, fine-tune {row.finetune_seed}"
            if key in rows:
                continue
            assert row.cell is not None
            cell = folder.inside(row.cell)
            model, mask = load_finetuned(target, cell)
            mask = target.graph.mask(mask.keep)
            if name != OWN:
                label = f"{name}-{mask.digest()}-{row.finetune_seed}"
                cell = out.with_suffix("") / label
                finetune_mask(
                    bench,
                    mask,
                    cell,
                    label=label,
                    seed=row.finetune_seed or 0,
                    checkpoint=cell.with_suffix(".checkpoint"),
                    console=Console(),
                )
                model, _ = load_finetuned(target, cell)
            before = bench.final_evaluator.evaluate(mask).accuracy
            rows[key] = {"before": before, "after": bench.search_accuracy(model)}
            write_json(out, content)
            print(f"{name}, {key}: {rows[key]}", flush=True)


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the means as Markdown, in percent."""
    lines = [
        "| cut from | dense | masks | before the fine-tune | after it |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, found in rows.items():
        masks = [value for key, value in found.items() if key != "dense"]
        cells = [spread([mask[when] for mask in masks]) for when in ("before", "after")]
        lines.append(
            f"| {name} | {100 * found['dense']:.2f} | {len(masks)} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Fine-tune what is missing, or print the table."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--weights", type=Path, nargs="+", metavar="W", default=[])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--method", default="agent/best", metavar="NAME")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, end")
    known = parser.parse_args()
    if not known.table:
        measure(known.run, known.method, known.weights, known.out)
    print(table(read_rows(known.out)["rows"]))


if __name__ == "__main__":
    main()
