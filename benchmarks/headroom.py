"""What a search gains on networks of a catalogue, how far that repeats, what features tell of it.

``collect`` moves the widths of each train network from its best prior, by the cross-entropy method
on the quick score that trainings on a catalogue are rewarded for; a file a network, finished ones
are not repeated. ``show`` prints the gains, the correlation with another collection of other seeds
(``--again``), and the share of the offsets' variance that models predict from the features of
networks that they have not seen.

    python benchmarks/headroom.py collect --out moves --catalogue DIR --data-dir cifar10.tar
    python benchmarks/headroom.py collect --out again --shard 3 8 --at 0.5 0.25 --seed 1 \
        --catalogue DIR --data-dir cifar10.tar
    python benchmarks/headroom.py show --out moves --again again
"""

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from torch import Tensor

from prunegraph.agent.catalogue import SUBSET, quick_problem
from prunegraph.agent.subject import Subject
from prunegraph.core.budget import Budget
from prunegraph.core.console import Console
from prunegraph.core.files import write_json
from prunegraph.core.masks import Float64Array, IntArray
from prunegraph.graph.features import FEATURE_NAMES
from prunegraph.methods.cem import CrossEntropySearch, shifted
from prunegraph.runs.catalogue import Catalogue
from prunegraph.runs.options.config import TrainConfig
from prunegraph.runs.options.yaml_file import parse

STEPS, POPULATION = 9, 16
LAST = 3
"""Steps whose means make the offsets."""

FOLDS = 10

APART = 9000
"""Between the seeds of two collections."""


def measure(subject: Subject, budget: Budget, rng: np.random.Generator) -> dict[str, Any]:
    """Return offsets, the gain by them in percent of the divergence, and the groups' features."""
    problem, prior = dataclasses.replace(subject.problem, budget=budget), subject.prior(budget)
    evaluator, groups = problem.evaluator, problem.graph.free_groups
    start = prior.scores.astype(np.float64)

    def divergence(offset: Float64Array, subset: Tensor | None = None) -> float:
        outcome = evaluator.evaluate(shifted(problem, start, groups, offset), subset)
        return float(outcome.kl or 0.0)

    def draw() -> Tensor | None:
        return evaluator.narrow(evaluator.draw_subset(SUBSET, int(rng.integers(2**31))))

    offset = search(divergence, draw, len(groups), rng)
    features = subject.features(budget, FEATURE_NAMES)
    units = [problem.graph.groups[group].units for group in groups]
    return {
        "budget": budget.keep_macs,
        "prior": prior.name,
        "gain": 100.0 * math.log(divergence(offset) / divergence(np.zeros_like(offset))),
        "offset": offset.tolist(),
        "sizes": [len(own) for own in units],
        "means": [features[own].mean(0).tolist() for own in units],
        "deviations": [features[own].std(0).tolist() for own in units],
    }


def search(
    divergence: Callable[[Float64Array, Tensor | None], float],
    draw: Callable[[], Tensor | None],
    count: int,
    rng: np.random.Generator,
) -> Float64Array:
    """Return the offset of each of so many groups that a search ends with.

    Args:
        divergence: of the network with such offsets on a subset of the search images.
        draw: draws the subset of a step.
        count: of the groups.
        rng: draws the offsets.
    """
    cem = CrossEntropySearch(population=POPULATION)
    mean, deviation = np.zeros(count), np.full(count, cem.sigma)
    means = []
    for _ in range(STEPS):
        offsets = mean + deviation * rng.normal(size=(POPULATION, count))
        offsets[0] = mean
        few = draw()
        order = np.argsort([divergence(offset, few) for offset in offsets], kind="stable")
        mean, deviation = cem.refit(mean, deviation, offsets[order[: cem.num_elites]])
        means.append(mean)
    moved: Float64Array = np.mean(means[-LAST:], axis=0)
    return moved


def collect(options: argparse.Namespace, config: TrainConfig) -> None:
    """Measure what is missing."""
    catalogue, console = Catalogue(config), Console()
    options.out.mkdir(parents=True, exist_ok=True)
    paths = catalogue.part("train")[options.shard[0] :: options.shard[1]]
    budgets = [Budget(keep_macs=share) for share in options.at]
    with console.progress("networks", len(paths)) as report:
        for done, path in enumerate(paths, start=1):
            file = options.out / f"{path.stem}.json"
            if not file.is_file():
                context = catalogue.context(path, seed=0)
                subject = Subject(quick_problem(context, budgets[0]))
                number = int(path.stem.partition("-")[0])
                rng = np.random.default_rng(APART * options.seed + number)
                rows = [measure(subject, budget, rng) for budget in budgets]
                write_json(file, {"features": FEATURE_NAMES, "rows": rows})
            report(done, path.stem)


def predicted(
    make: Callable[[], Any],
    inputs: Float64Array,
    wanted: Float64Array,
    network: IntArray,
    count: int,
) -> float:
    """Return the share of the variance of ``wanted`` that a model tells of networks left out.

    Args:
        make: the model.
        inputs: ``[R, F]`` a row for each group of a network at a budget.
        wanted: ``[R]``.
        network: ``[R]`` the number of its network.
        count: only the first so many networks teach.
    """
    told = np.zeros_like(wanted)
    for inside, outside in GroupKFold(FOLDS).split(inputs, groups=network):
        own = inside[network[inside] < count]
        told[outside] = make().fit(inputs[own], wanted[own]).predict(inputs[outside])
    return float(1.0 - ((wanted - told) ** 2).sum() / (wanted**2).sum())


def show(out: Path, again: Path | None) -> str:
    """Return the tables in Markdown."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    rows = [(number, row) for number, file in enumerate(files.values()) for row in file["rows"]]
    budgets = sorted({row["budget"] for _, row in rows}, reverse=True)
    lines = ["| budget | networks | gain, % | median |", "|--:|--:|--:|--:|"]
    for budget in budgets:
        gains = [row["gain"] for _, row in rows if row["budget"] == budget]
        mean, median = statistics.fmean(gains), statistics.median(gains)
        lines.append(f"| {budget:g} | {len(gains)} | {mean:+.1f} | {median:+.1f} |")
    if again is not None:
        lines += ["", "| budget | networks | correlation of two searches |", "|--:|--:|--:|"]
        others = {path.stem: json.loads(path.read_text()) for path in again.glob("*.json")}
        for budget in budgets:
            pairs = [
                (_offset(files[stem], budget), _offset(other, budget))
                for stem, other in others.items()
                if stem in files
            ]
            found = [float(np.corrcoef(own, other)[0, 1]) for own, other in pairs if own and other]
            if found:
                lines.append(f"| {budget:g} | {len(found)} | {statistics.fmean(found):.2f} |")
    wanted = np.concatenate([_centred(row["offset"], row["sizes"]) for _, row in rows])
    inputs = np.concatenate(
        [np.hstack([_centred(row[name]) for name in ("means", "deviations")]) for _, row in rows]
    )
    inputs /= inputs.std(0) + 1e-9
    network = np.array([number for number, row in rows for _ in row["offset"]])
    lines += ["", "| model | networks | variance told |", "|---|--:|--:|"]
    total = len(files)
    for model, make in MODELS.items():
        for count in (total // 4, total // 2, total):
            told = predicted(make, inputs, wanted, network, count)
            lines.append(f"| {model} | {count} | {told:.3f} |")
    return "\n".join(lines)


MODELS: dict[str, Callable[[], Any]] = {
    "ridge regression": lambda: Ridge(alpha=100.0, fit_intercept=False),
    "boosted trees": lambda: HistGradientBoostingRegressor(
        max_depth=4, learning_rate=0.05, max_iter=150, random_state=0
    ),
}


def _offset(file: dict[str, Any], budget: float) -> list[float]:
    return next((row["offset"] for row in file["rows"] if row["budget"] == budget), [])


def _centred(values: Sequence[Any], weights: Sequence[int] | None = None) -> Float64Array:
    held = np.array(values, dtype=np.float64)
    centred: Float64Array = held - np.average(held, axis=0, weights=weights)
    return centred


def main() -> None:
    """Collect, or print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("job", choices=("collect", "show"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--at", type=float, nargs="+", default=[0.5, 0.25, 0.7], help="budgets")
    parser.add_argument("--shard", type=int, nargs=2, default=(0, 1), metavar=("K", "N"))
    parser.add_argument("--seed", type=int, default=0, help="of the searches")
    parser.add_argument("--again", type=Path, help="a collection of another seed")
    options, words = parser.parse_known_args()
    if not 0 <= options.shard[0] < options.shard[1]:
        parser.error("--shard K N: K is from 0 to N - 1")
    torch.set_num_threads(1)
    if options.job == "show":
        print(show(options.out, options.again))
        return
    config = parse(TrainConfig, words)
    assert isinstance(config, TrainConfig)
    collect(options, config)


if __name__ == "__main__":
    main()
