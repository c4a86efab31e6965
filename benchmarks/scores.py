"""Which score of a pruned network, on how many images, predicts its accuracy on other images.

A search chooses by a score of some hundred images, and part of what it gains is luck on these.
Masks drawn around the start of a search (its scores with noise on groups and channels, and the
other heuristics), or with ``--search`` the last that a recorded search ran, are cut out once each
and run on the search images and on train images. Then, over many random draws: of every score the
rank correlation with the accuracy on the half of the search images that the score has not seen, and
the accuracy there of the mask that it puts first, over the mean of all. The test split stays
closed: these figures choose options.

    python benchmarks/scores.py --out FILE [--masks 48] [--search CHECKPOINT] [options of train]
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from predict_outcomes import read_record
from scipy.stats import spearmanr
from searches import begin
from torch import Tensor
from torch.nn import functional as F

from prunegraph.experiment.bench import Bench
from prunegraph.experiment.jobs import load_targets
from prunegraph.files import write_json
from prunegraph.pruners.start import STARTS, start_scores
from prunegraph.pruning.evaluation import compute_logits
from prunegraph.rewards import unpack_bits
from prunegraph.types import Float64Array, KeepMask, Split

TRAIN_IMAGES, DRAWS = 5000, 200
SIZES = (500, 1500, 2500)
NOISE = 0.5
"""Largest deviation of the noise, on scores whose deviation is 1."""

Measured = Mapping[str, Float64Array]
"""Score -> one number a mask and image ``[M, n]``, higher = better."""


def draw_masks(bench: Bench, number: int) -> Iterator[KeepMask]:
    """Yield the masks of the heuristics, then masks around the start's, nearer and farther ones."""
    graph, budget = bench.target.graph, bench.budget
    for name in STARTS:
        yield bench.project(start_scores(name, graph, bench.statistics, budget), budget)
    start, generator = bench.start(budget).scores, np.random.default_rng(bench.seed)
    groups = graph.group_of
    for _ in range(number - len(STARTS)):
        deviation = generator.uniform(0.0, NOISE)
        noise = generator.normal(0.0, deviation, graph.num_classes)
        noise += generator.normal(0.0, deviation, groups.max() + 1)[groups]
        yield bench.project((start + noise).astype(np.float32), budget)


def last_masks(bench: Bench, search: Path, number: int) -> list[KeepMask]:
    """Return the last masks that a search ran, by its checkpoint ``search-*.safetensors``."""
    graph = bench.target.graph
    packed = read_record(search)["bits"][-number:]
    return [graph.mask(unpack_bits(bits, graph.num_classes)) for bits in packed]


def per_image(logits: Tensor, dense: Tensor, labels: Tensor) -> dict[str, Float64Array]:
    """Return what is compared of every image ``[n]``, higher = better."""
    log_p, log_q = (item.float().log_softmax(1) for item in (dense, logits))
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    loss = F.cross_entropy(logits.float(), labels, reduction="none")
    scores = {
        "accuracy": logits.argmax(1) == labels,
        "soft_accuracy": (-loss).exp(),
        "loss": -loss,
        "kl": -kl,
    }
    return {name: values.double().numpy() for name, values in scores.items()}


def run_masks(bench: Bench, drawn: Iterable[KeepMask]) -> tuple[Measured, Measured]:
    """Run every mask; return what it did on search and on train images."""
    dataset, evaluator = bench.target.dataset, bench.final_evaluator
    splits: tuple[Split, Split] = (dataset.search, dataset.train.sample(TRAIN_IMAGES, bench.seed))
    dense = [compute_logits(bench.target.model, split) for split in splits]
    rows: list[list[dict[str, Float64Array]]] = [[], []]
    masks = list(dict.fromkeys(drawn))
    for count, mask in enumerate(masks, start=1):
        network = evaluator.prune(mask)
        for split, reference, row in zip(splits, dense, rows, strict=True):
            row.append(per_image(compute_logits(network, split), reference, split.labels))
        print(f"{count}/{len(masks)} masks", flush=True)
    search, train = (
        {name: np.stack([item[name] for item in row]) for name in row[0]} for row in rows
    )
    return search, train


def predicted(search: Measured, train: Measured) -> dict[str, dict[str, float]]:
    """Return for every score its rank correlation and its gain, both on images it has not seen."""
    generator = np.random.default_rng(0)
    num_images, num_train = search["kl"].shape[1], train["kl"].shape[1]
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(DRAWS):
        seen, unseen = np.array_split(generator.permutation(num_images), 2)
        picked = generator.permutation(num_train)
        truth = search["accuracy"][:, unseen].mean(1)
        scores = {
            f"{name}, {size:,} search images": values[:, seen[:size]].mean(1)
            for name, values in search.items()
            for size in SIZES
            if size <= len(seen)
        } | {
            f"{name}, {size:,} train images": values[:, picked[:size]].mean(1)
            for name, values in train.items()
            for size in (*SIZES, TRAIN_IMAGES)
            if size <= num_train
        }
        for name, values in scores.items():
            rank = float(spearmanr(values, truth).statistic)
            found.setdefault(name, []).append((rank, truth[values.argmax()] - truth.mean()))
    return {
        name: {
            "rank_correlation": float(np.mean([rank for rank, _ in pairs])),
            "gain": float(np.mean([gain for _, gain in pairs])),
            "gain_deviation": float(np.std([gain for _, gain in pairs])),
        }
        for name, pairs in found.items()
    }


def main() -> None:
    """Run the masks, print the table."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--masks", type=int, default=48)
    parser.add_argument("--search", type=Path, metavar="CHECKPOINT")
    known, words = parser.parse_known_args()
    options, content = begin(known.out, words, masks=known.masks)
    (target,) = load_targets(options)
    bench = Bench(target=target, options=options, seed=options.seed)
    search, train = run_masks(
        bench,
        draw_masks(bench, known.masks)
        if known.search is None
        else last_masks(bench, known.search, known.masks),
    )
    means = {name: values.mean(1).round(4).tolist() for name, values in search.items()}
    rows = predicted(search, train)
    write_json(known.out, content | {"rows": rows, "means": means})
    print("| score | rank correlation | gain of its choice, points |\n|---|--:|--:|")
    for name, row in rows.items():
        spread = f"{100 * row['gain']:.2f} ± {100 * row['gain_deviation']:.2f}"
        print(f"| {name} | {row['rank_correlation']:.2f} | {spread} |")


if __name__ == "__main__":
    main()
