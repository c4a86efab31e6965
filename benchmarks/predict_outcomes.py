"""How well models of the outcomes predict the masks of recorded searches.

A search's checkpoint holds every mask that it ran. Here each update's masks are predicted from
those of the updates before, as the search did, by each kind of model: correlation with what they
reached, within the update, since a search compares the masks of an update with each other. No
network is run; the checkpoints are those that ``ablations.py`` leaves in its folder.

    python benchmarks/predict_outcomes.py FOLDER ... [options of train, as the searches had]
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunegraph.agent.imagination import CRITERIA
from prunegraph.agent.outcome_model import OutcomeModel
from prunegraph.experiment.bench import Bench
from prunegraph.experiment.config import TrainConfig
from prunegraph.experiment.jobs import load_targets
from prunegraph.experiment.options import parse
from prunegraph.reading import parse_json, read_safetensors
from prunegraph.rewards import unpack_bits
from prunegraph.types import Float64Array


def read_record(path: Path) -> Mapping[str, Any]:
    """Return masks, metrics and updates of the first network of a search."""
    _, metadata = read_safetensors(path)
    state = parse_json(metadata["state"], path, finite=False)
    record: Mapping[str, Any] = state["imagination"]["0"]
    return record


def correlations(model: OutcomeModel, record: Mapping[str, Any]) -> Float64Array:
    """Return the correlation within each update but the first ``[U - 1]``."""
    updates, metrics = np.array(record["updates"]), np.array(record["metrics"])
    size = len(record["importance"])
    bits = np.stack([unpack_bits(packed, size) for packed in record["bits"]])
    found = []
    for update in np.unique(updates):
        members = updates == update
        if len(model):
            predicted, _ = model.predict(torch.from_numpy(bits[members]))
            found.append(np.corrcoef(predicted.numpy(), metrics[members])[0, 1])
        for row in np.flatnonzero(members):
            model.add(bits[row], float(metrics[row]), int(update))
        model.fit()
    return np.array(found)


def compare(bench: Bench, records: Sequence[Mapping[str, Any]]) -> dict[str, Float64Array]:
    """Return for each model the mean correlation in thirds of each search ``[S, 3]``."""
    graph = bench.target.graph
    features = bench.node_features(bench.budget, CRITERIA).astype(np.float64)
    thirds: dict[str, list[list[float]]] = {"default": [], "imagines_layers": []}
    for record in records:
        start = np.array(record["importance"]).reshape(graph.num_classes, -1)[:, :1]
        models = {
            "default": OutcomeModel(graph, start),
            "imagines_layers": OutcomeModel(
                graph, np.hstack([start, np.exp(features)]), bench.layer_errors
            ),
        }
        for name, model in models.items():
            parts = np.array_split(correlations(model, record), 3)
            thirds[name].append([float(part.mean()) for part in parts])
    return {name: np.array(rows) for name, rows in thirds.items()}


def main() -> None:
    """Print the table."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    known, words = parser.parse_known_args()
    options = parse(TrainConfig, words)
    assert isinstance(options, TrainConfig)
    torch.set_num_threads(options.threads or 1)
    paths = [path for folder in known.folders for path in folder.rglob("search-*.safetensors")]
    if not paths:
        sys.exit(f"no search-*.safetensors in {', '.join(map(str, known.folders))}")
    bench = Bench(target=load_targets(options)[0], options=options, seed=options.seed)
    print("| model | first third | middle | last third | better than default by |")
    print("|---|--:|--:|--:|--:|")
    found = compare(bench, [read_record(path) for path in sorted(paths)])
    for name, rows in found.items():
        gain = (rows - found["default"]).mean(axis=1)
        error = 2.0 * gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else float("nan")
        figures = " | ".join(f"{value:.3f}" for value in rows.mean(axis=0))
        print(f"| {name} | {figures} | {gain.mean():.3f} ± {error:.3f} |")


if __name__ == "__main__":
    main()
