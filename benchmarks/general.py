"""Policies for networks that they have not seen, beside heuristics, searches and Torch-Pruning.

``train`` trains a policy on the train part of a catalogue (``catalogue.py``), with one thing
changed for an ablation; further words are options of ``prunegraph train``. ``rows`` prunes each
network of a part at each budget by each row, all with the same reconstruction and recalibration;
finished rows, a file a network, are not repeated. Choose on ``--part val``; look at ``--part test``
once. ``show`` prints the tables: accuracies on the test images, and the differences from the best
heuristic paired by network, with two standard errors. That heuristic is chosen on ``--choose``,
rows of the validation networks. ``quick`` takes seconds a network: it compares the one mask of each
policy with the best prior's by what trainings are rewarded for, the divergence of networks that
are reconstructed at once; differences of its logarithm, in percent.

    python benchmarks/general.py train --variant default --catalogue DIR --data-dir cifar10.tar \
        --seed 0 --out runs/general-0
    python benchmarks/general.py rows --part val --out val-rows --policies runs/general-0 \
        --catalogue DIR --data-dir cifar10.tar
    python benchmarks/general.py quick --out quick.json --policies runs/general-0 --catalogue DIR
    python benchmarks/general.py show --out test-rows --choose val-rows
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prunegraph.agent.catalogue import quick_problem
from prunegraph.agent.method import AgentSearch, AppliedPolicy
from prunegraph.agent.policies import find_policy
from prunegraph.agent.subject import Subject
from prunegraph.agent.train import AgentConfig
from prunegraph.core.budget import Budget
from prunegraph.core.console import Console
from prunegraph.core.errors import PruneGraphError
from prunegraph.core.files import write_json
from prunegraph.core.masks import ChannelMask
from prunegraph.graph.features import FEATURE_NAMES
from prunegraph.methods.context import Context
from prunegraph.methods.method import Problem
from prunegraph.methods.prior import PRIORS, rank_priors
from prunegraph.methods.registry import make_method
from prunegraph.runs.catalogue import Catalogue, run_catalogue
from prunegraph.runs.options.config import TrainConfig
from prunegraph.runs.options.yaml_file import parse
from prunegraph.runs.plan import USUAL_HEURISTICS
from prunegraph.tasks.classification import compute_logits, evaluate

SCORES = (
    *("start", "prior", "taylor", "fpgm", "lamp", "rank_taylor", "mean_taylor", "mean_prior"),
)
"""Features that are somebody's score of a channel's importance."""

RAW = tuple(name for name in FEATURE_NAMES if name not in SCORES)
"""Statistics of weights and activations, costs and positions."""

HEURISTICS = tuple(dict.fromkeys((*PRIORS, *USUAL_HEURISTICS)))
PEERS = ("tp_magnitude/global", "tp_taylor/global")
SEARCHES = tuple(f"{name}@{count}" for name in ("cem", "agent") for count in (100, 400))
PORTFOLIO = "portfolio"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One change of a training.

    Attributes:
        what: in words.
        network: changes of the policy network's options.
        reward: of the reward's.
        first: only so many networks.
        without: not this family.
    """

    what: str
    network: Mapping[str, Any] = field(default_factory=dict)
    reward: Mapping[str, Any] = field(default_factory=dict)
    first: int | None = None
    without: str | None = None

    def change(self, config: AgentConfig) -> AgentConfig:
        """Return the changed options of the agent."""
        return dataclasses.replace(
            config,
            network=dataclasses.replace(config.network, **self.network),
            reward=dataclasses.replace(config.reward, **self.reward),
        )

    def choose(self, catalogue: Catalogue) -> list[Path]:
        """Return the networks to train on."""
        paths = [
            path
            for path in catalogue.part("train")
            if catalogue.infos[path].extra.get("family") != self.without or self.without is None
        ]
        return paths[: self.first]


VARIANTS = {
    "default": Variant(what="as `prunegraph train --catalogue`"),
    "no_edges": Variant(what="no messages along the graph", network={"use_edges": False}),
    "shuffled": Variant(
        what="messages between channels by chance", network={"shuffle_edges": True}
    ),
    "accuracy": Variant(what="no competition", reward={"self_competition": "accuracy"}),
    "raw": Variant(what="no score among the features", network={"feature_names": RAW}),
    "networks_30": Variant(what="30 networks", first=30),
    "networks_100": Variant(what="100 networks", first=100),
    **{
        f"without_{family}": Variant(what=f"never a network of {family}", without=family)
        for family in ("inverted", "concat", "squeeze", "mixer")
    },
}

Choose = Callable[[Context, Budget, int], ChannelMask]
"""From a network, a budget and a seed to a mask."""


def by_method(name: str, networks: int = 1000) -> Choose:
    """Return what a method of the registry chooses that may run so many networks."""
    return lambda context, budget, seed: (
        make_method(name).prune(problem_of(context, budget, seed, networks)).channels
    )


def problem_of(context: Context, budget: Budget, seed: int, networks: int = 0) -> Problem:
    """Return what a method is given."""
    return context.problem(budget, seed=seed, max_networks=networks)


def portfolio(context: Context, budget: Budget, seed: int) -> ChannelMask:
    """Return the mask of the heuristic whose outputs on train images are nearest."""
    problem = problem_of(context, budget, seed)
    best = rank_priors(
        lambda mask: float(problem.unlabelled.evaluate(mask).kl or 0.0),
        problem.graph,
        problem.statistics,
        budget,
        names=HEURISTICS,
    )
    return problem.project(best[0].scores)


def alone(policy: Path) -> Choose:
    """Return the one mask of a policy: from the prior that is nearest, no strength is tried."""
    trained = find_policy(policy)
    return lambda context, budget, seed: Subject(
        quick_problem(context.with_statistics(seed), budget)
    ).mask(trained, budget)


def searched(policy: Path, networks: int) -> Choose:
    """Return what a search finds that begins with a policy."""
    return lambda context, budget, seed: (
        AgentSearch(policy=policy).prune(problem_of(context, budget, seed, networks)).channels
    )


def applied(policy: Path) -> Choose:
    """Return what a policy decides as `prunegraph apply` lets it."""
    return lambda context, budget, seed: (
        AppliedPolicy(policy).prune(problem_of(context, budget, seed)).channels
    )


def rows(policies: Sequence[Path], label: str, searches: bool) -> dict[str, tuple[int, Choose]]:
    """Return each row's seed, and what chooses its masks.

    Args:
        policies: of equal trainings with other seeds.
        label: what they are called.
        searches: searches are run too.
    """
    found: dict[str, tuple[int, Choose]] = {
        name: (0, by_method(name)) for name in (*HEURISTICS, "prior", *PEERS)
    }
    found[PORTFOLIO] = 0, portfolio
    found["policy:resnet-cifar"] = 0, applied(Path("resnet-cifar"))
    for seed, policy in enumerate(policies):
        found[f"policy:{label}#{seed}"] = seed, applied(policy)
        found[f"alone:{label}#{seed}"] = seed, alone(policy)
    if searches:
        for name in SEARCHES:
            method, _, count = name.partition("@")
            found[name] = 0, by_method(method, int(count))
        for seed, policy in enumerate(policies):
            for networks in (100, 400):
                key = f"agent from {label}@{networks}#{seed}"
                found[key] = seed, searched(policy, networks)
    return found


def measure(context: Context, budget: Budget, choose: Choose, seed: int) -> dict[str, Any]:
    """Prune a network and return the figures; what a row cannot do is a figure too."""
    started = time.process_time()
    try:
        mask = choose(context, budget, seed)
    except PruneGraphError as error:
        return {"error": str(error)}
    seconds = time.process_time() - started
    model, task = context.evaluator().prune(mask), context.task
    search, test = task.search, task.test
    assert search is not None
    assert test is not None
    dense = compute_logits(task.model, test)
    scores = evaluate(model, test, dense_logits=dense)
    return {
        "keep_macs": context.graph.cost(mask).macs / context.graph.dense_cost.macs,
        "search": evaluate(model, search).accuracy,
        "test": scores.accuracy,
        "test_kl": scores.kl,
        "cpu_seconds": round(seconds, 2),
    }


def run_rows(options: argparse.Namespace, config: TrainConfig) -> None:
    """Measure what is missing."""
    catalogue, console = Catalogue(config), Console()
    paths = catalogue.part(options.part)[: options.first]
    asked = rows(options.policies, options.label, options.searches)
    if options.only:
        asked = {name: row for name, row in asked.items() if name.partition("#")[0] in options.only}
    options.out.mkdir(parents=True, exist_ok=True)
    with console.progress("rows", len(paths) * len(asked) * len(options.at)) as report:
        done = 0
        for path in paths:
            file = options.out / f"{path.stem}.json"
            content = json.loads(file.read_text()) if file.is_file() else {"rows": {}}
            content |= {"family": catalogue.infos[path].extra.get("family", path.stem)}
            context: Context | None = None
            for share in options.at:
                for name, (seed, choose) in asked.items():
                    key, done = f"{share:g} {name}", done + 1
                    if key not in content["rows"]:
                        context = context or catalogue.context(path, seed=0)
                        budget = Budget(keep_macs=share)
                        content["rows"][key] = measure(context, budget, choose, seed)
                        write_json(file, content)
                    report(done, f"{path.stem} {key}")


def run_quick(options: argparse.Namespace, config: TrainConfig) -> str:
    """Return in Markdown how the policies' masks diverge beside the best prior's; write all."""
    catalogue = Catalogue(config)
    policies = {path.name: find_policy(path) for path in options.policies}
    found: dict[str, dict[str, list[float]]] = {f"{share:g}": {} for share in options.at}
    for path in catalogue.part(options.part)[: options.first]:
        budgets = [Budget(keep_macs=float(share)) for share in found]
        subject = Subject(quick_problem(catalogue.context(path, seed=0), budgets[0]))
        for budget, rows in zip(budgets, found.values(), strict=True):
            masks = [subject.problem.project(subject.prior(budget).scores, budget)]
            masks += [subject.mask(policy, budget) for policy in policies.values()]
            outcomes = subject.problem.evaluator.evaluate_all(masks)
            rows[path.stem] = [outcome.kl or 0.0 for outcome in outcomes]
    write_json(options.out, {"rows": ["best prior", *policies], "divergence": found})
    lines = [
        f"| budget | networks | best prior | {' | '.join(policies)} |",
        "|--:|--:|--:|" + "--:|" * len(policies),
    ]
    for share, rows in found.items():
        columns = list(zip(*rows.values(), strict=True))
        gains = [
            _interval(
                [100.0 * math.log(own / base) for own, base in zip(column, columns[0], strict=True)]
            )
            for column in columns[1:]
        ]
        mean = statistics.fmean(columns[0])
        lines.append(f"| {share} | {len(rows)} | {mean:.3f} | {' | '.join(gains)} |")
    return "\n".join(lines)


def show(out: Path, choose: Path, figure: str) -> str:
    """Return the tables in Markdown: one for each budget."""
    found, chosen = _read(out, figure), _read(choose, figure)
    lines = []
    for share in sorted({share for each in found.values() for share, _ in each}, reverse=True):
        best = max(HEURISTICS, key=lambda name: _mean(_column(chosen, share, name).values()))
        base = _column(found, share, best)
        lines += [
            f"**{share} of the multiply-adds**; best heuristic on validation networks: {best}",
            "",
            "| row | networks | mean | over the best heuristic |",
            "|---|--:|--:|--:|",
        ]
        names = {name for each in found.values() for own, name in each if own == share}
        columns = {name: _column(found, share, name) for name in names}
        for name in sorted(names, key=lambda name: -_mean(columns[name].values())):
            own = columns[name]
            gains = [own[network] - base[network] for network in own if network in base]
            lines.append(
                f"| {name} | {len(own)} | {_mean(own.values()):.2f} | {_interval(gains)} |"
            )
        lines.append("")
    return "\n".join(lines)


Figures = dict[str, dict[tuple[str, str], list[float]]]
"""Network -> (budget, row without its seed) -> a figure of each seed, in percent."""


def _read(folder: Path, figure: str) -> Figures:
    found: Figures = {}
    for path in sorted(folder.glob("*.json")):
        own = found.setdefault(path.stem, {})
        for key, row in json.loads(path.read_text())["rows"].items():
            share, _, name = key.partition(" ")
            if figure in row:
                own.setdefault((share, name.partition("#")[0]), []).append(100.0 * row[figure])
    return found


def _column(found: Figures, share: str, name: str) -> dict[str, float]:
    """Return the mean over seeds of a row for each network."""
    return {
        network: statistics.fmean(each[share, name])
        for network, each in found.items()
        if (share, name) in each
    }


def _mean(values: Iterable[float]) -> float:
    held = list(values)
    return statistics.fmean(held) if held else -math.inf


def _interval(gains: Sequence[float]) -> str:
    """Return a mean with two standard errors."""
    if len(gains) < 2:
        return ""
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    return f"{statistics.fmean(gains):+.2f} ± {2.0 * error:.2f}"


def main() -> None:
    """Train, measure, or print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("job", choices=("train", "rows", "quick", "show"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variant", choices=list(VARIANTS), default="default")
    parser.add_argument("--part", choices=("train", "val", "test"), default="val")
    parser.add_argument("--at", type=float, nargs="+", default=[0.5, 0.25, 0.15], help="budgets")
    parser.add_argument("--policies", type=Path, nargs="+", default=[], help="one for each seed")
    parser.add_argument("--label", default="general", help="what the policies are called")
    parser.add_argument("--searches", action="store_true", help="searches too")
    parser.add_argument("--only", nargs="+", help="only these rows, named as in the table")
    parser.add_argument("--first", type=int, help="only so many networks")
    parser.add_argument("--choose", type=Path, help="rows that the heuristic is chosen on")
    parser.add_argument("--figure", default="test", choices=("test", "search"))
    options, words = parser.parse_known_args()
    torch.set_num_threads(1)
    if options.job == "show":
        print(show(options.out, options.choose or options.out, options.figure))
        return
    out = ("--out", str(options.out)) if options.job == "train" else ()
    config = parse(TrainConfig, [*words, *out])
    assert isinstance(config, TrainConfig)
    if options.job == "rows":
        run_rows(options, config)
        return
    if options.job == "quick":
        print(run_quick(options, config))
        return
    variant = VARIANTS[options.variant]
    run_catalogue(config, Console(), change=variant.change, choose=variant.choose)


if __name__ == "__main__":
    main()
