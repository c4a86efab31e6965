"""Measure the masks of a finished run with the kept weights fitted at once and layer by layer.

No search, no fine-tune: what each row's mask has on the search and on the test split. What was
measured stays in the file; give the command again and it goes on.

    python benchmarks/refit_masks.py RUN --out FILE.json --weights W [--names agent/best cem]
        [options of train]
"""

import argparse
from dataclasses import replace
from pathlib import Path

from searches import begin

from prunegraph.experiment.bench import Bench
from prunegraph.experiment.candidates import MASKS_FILE, read_masks
from prunegraph.experiment.folder import RunFolder
from prunegraph.experiment.jobs import load_targets
from prunegraph.experiment.report import read_report
from prunegraph.files import write_json


def main() -> None:
    """Measure what is missing."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--names", nargs="+")
    known, words = parser.parse_known_args()
    options, content = begin(known.out, words, run=known.run.name)
    (target,) = load_targets(options)
    benches = {
        way: Bench(
            target=target,
            options=replace(options, layer_by_layer=way == "layer by layer"),
            seed=options.seed,
        )
        for way in ("at once", "layer by layer")
    }
    masks = read_masks(known.run / MASKS_FILE, target.graph)
    rows = read_report(RunFolder(path=known.run))["methods"]
    names = known.names or {row["name"] for row in rows}
    for row in rows:
        key = f"{row['name']}, seed {row['seed']}"
        mask = masks.get(row["digest"])
        if row["name"] not in names or key in content["rows"] or mask is None:
            continue
        content["rows"][key] = {
            way: {
                "search_accuracy": bench.final_evaluator.evaluate(mask).accuracy,
                "test_accuracy": bench.recalibrated_test_accuracy(mask),
            }
            for way, bench in benches.items()
        }
        write_json(known.out, content)
        print(f"{key}: {content['rows'][key]}", flush=True)


if __name__ == "__main__":
    main()
