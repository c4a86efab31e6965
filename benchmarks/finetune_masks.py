"""Fine-tune the masks of a finished run from other weights than those that they were found on.

A slimmable network (``pretrain --slimmable``) shows better what a mask is worth; what is wanted is
the mask's network, cut from the dense weights. Each row NAME of the run is reconstructed and
fine-tuned with the row's own seed, as ``compare`` does; with ``--seeds 0 1 2`` the first row, a
heuristic's, with each of these. An interrupted fine-tune goes on. With ``--closed`` the test split
stays closed: then the figures may choose a recipe.

    python benchmarks/finetune_masks.py RUN --out FILE.json --weights W [--name agent/best]
        [--seeds 0 1 2] [--closed] [options of train]
"""

import argparse
from pathlib import Path

from searches import begin

from prunegraph.experiment.bench import Bench
from prunegraph.experiment.candidates import MASKS_FILE, read_masks
from prunegraph.experiment.console import Console
from prunegraph.experiment.finish import finetune_mask, load_finetuned
from prunegraph.experiment.folder import RunFolder
from prunegraph.experiment.jobs import load_targets
from prunegraph.experiment.report import read_report
from prunegraph.files import write_json


def main() -> None:
    """Fine-tune and measure what is missing."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--name", default="agent/best")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--closed", action="store_true")
    known, words = parser.parse_known_args()
    asked = {"run": known.run.name, "name": known.name, "closed": known.closed}
    options, content = begin(known.out, words, **asked)
    (target,) = load_targets(options)
    bench = Bench(target=target, options=options, seed=options.seed)
    masks = read_masks(known.run / MASKS_FILE, target.graph)
    methods = read_report(RunFolder(path=known.run))["methods"]
    rows = [(row, row["seed"]) for row in methods if row["name"] == known.name]
    if not rows:
        parser.error(f"{known.run} has no row {known.name}")
    if known.seeds:
        rows = [(rows[0][0], seed) for seed in known.seeds]
    for row, seed in rows:
        if str(seed) in content["rows"]:
            continue
        mask = masks[row["digest"]]
        folder = known.out.with_suffix("") / str(seed)
        finetune_mask(
            bench,
            mask,
            folder,
            label=f"fine-tune {seed}",
            seed=seed,
            checkpoint=folder / "checkpoint.safetensors",
            console=Console(),
        )
        model, _ = load_finetuned(target, folder)
        content["rows"][str(seed)] = {
            "searched_accuracy": row["search_accuracy"],
            "search_accuracy": bench.final_evaluator.evaluate(mask).accuracy,
            "search_accuracy_finetuned": bench.search_accuracy(model),
            "params": target.graph.cost(mask).params,
        }
        if not known.closed:
            content["rows"][str(seed)]["test_accuracy_finetuned"] = bench.test_accuracy(model)
        write_json(known.out, content)
        print(f"{known.name}, seed {seed}: {content['rows'][str(seed)]}", flush=True)


if __name__ == "__main__":
    main()
