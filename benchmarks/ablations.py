"""What each part of the agent is worth: the same search with one thing changed.

Every variant searches the same network with the same number of evaluated networks and seeds; the
accuracy of the mask that it chooses, on the whole search split after recalibration, is its figure.
The test split stays closed: these figures choose options. With ``--hold-out`` a search sees one
half of the search split, and the accuracy on the other tells what of its gain is more than a fit
to the images that it looked at. Finished searches are not repeated, and an interrupted one goes on
from its checkpoints, in the folder FILE.

    python benchmarks/ablations.py --out FILE.json [--seeds 2] [--only NAME ...] [--hold-out]
        [options of train]
    python benchmarks/ablations.py --out FILE.json --table
"""

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from searches import begin, read_rows

from prunegraph.agent.method import AgentSearch
from prunegraph.agent.search import train_policy
from prunegraph.agent.settings import agent_config, trained_budgets
from prunegraph.agent.train import AgentConfig
from prunegraph.core.console import Console
from prunegraph.core.files import write_json
from prunegraph.core.splits import SearchSplit
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.config import TrainConfig
from prunegraph.runs.parallel.jobs import load_targets, make_workplace
from prunegraph.runs.target import Target

NETWORK_ALONE = dict.fromkeys(
    ("offset_rate", "group_offset_rate", "surrogate_rate", "group_noise_rate"), 0.0
)


def agent_search(options: TrainConfig) -> AgentSearch:
    """Return the search that options ask for."""
    return AgentSearch(options=options.agent, shares=options.budgets, policy=options.policy)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One change.

    Attributes:
        what: in words.
        options: changes of ``prunegraph train``'s options.
        ppo: of the updates' options.
        network: of the policy network's.
    """

    what: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ppo: Mapping[str, Any] = field(default_factory=dict)
    network: Mapping[str, Any] = field(default_factory=dict)

    def agent(self, options: TrainConfig, seed: int) -> AgentConfig:
        """Return the agent's options."""
        config = agent_config(
            options.agent,
            seed,
            initial=agent_search(options).initial,
            budgets=trained_budgets(options.budgets, options.budget()),
        )
        return dataclasses.replace(
            config,
            ppo=dataclasses.replace(config.ppo, **self.ppo),
            network=dataclasses.replace(config.network, **self.network),
        )


VARIANTS = {
    "default": Variant(what="as `prunegraph train` searches"),
    "no_surrogate": Variant(what="no surrogate rollouts", options={"surrogate_steps": 0}),
    "no_swaps": Variant(what="masks are run as they are drawn", options={"swaps": 0}),
    "no_offsets": Variant(
        what="the policy network alone, no offsets of channels and groups", ppo=NETWORK_ALONE
    ),
    "no_edges": Variant(what="no messages along the graph", network={"use_edges": False}),
    "no_learning": Variant(
        what="masks are planned, the policy that draws them learns nothing",
        options={"learning_rate": 0.0},
    ),
    "accuracy": Variant(what="does not compete", options={"self_competition": "accuracy"}),
    "lagrangian": Variant(
        what="a multiplier instead of the threshold", options={"constraint": "lagrangian"}
    ),
    "group_by_group": Variant(what="one step a group", options={"granularity": "group"}),
}


def halves(search: SearchSplit) -> tuple[SearchSplit, SearchSplit]:
    """Return two halves of the search images, the same in every run."""
    order = torch.randperm(len(search), generator=torch.Generator().manual_seed(0))
    first, second = order.tensor_split(2)
    return search.take(first), search.take(second)


def with_search(target: Target, search: SearchSplit) -> Target:
    """Return a network whose search looks at other images."""
    task = dataclasses.replace(cast(Any, target.task), search=search)
    return dataclasses.replace(target, task=task)


def measure(
    options: TrainConfig, name: str, seed: int, folder: Path, *, hold_out: bool
) -> dict[str, Any]:
    """Search once and return the figures."""
    variant = VARIANTS[name]
    own = dataclasses.replace(options.agent, **variant.options, distill_steps=0)
    changed = dataclasses.replace(options, agent=own)
    console, run = Console(), RunFolder(path=folder)
    (target,) = load_targets(changed)
    assert target.dataset is not None  # a classifier's
    images = judge = target.dataset.search
    if hold_out:
        images, judge = halves(images)
    place = make_workplace(changed, [with_search(target, images)], [run], console)
    context = place.contexts[0]
    method = agent_search(changed)
    with console.progress(f"{name}, seed {seed}", changed.networks) as report:
        problem = context.measures.problem(
            context.budget,
            seed=seed,
            max_networks=changed.networks,
            folder=run.search(name, seed),
            progress=report,
        )
        found = train_policy(
            [problem],
            method.options,
            shares=method.shares,
            initial=method.initial,
            config=variant.agent(changed, seed),
        )
    (result,) = found.results
    context = dataclasses.replace(place.contexts[0], target=with_search(target, judge))
    chosen = context.final_evaluator.evaluate(result.channels)
    return {
        "search_accuracy": chosen.accuracy,
        "searched_accuracy": result.details["score"],
        "kl": chosen.kl,
        "networks": found.networks,
        "seconds": round(found.seconds, 1),
        "mean_accuracy": [round(row["accuracy"], 4) for row in found.history],
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results as Markdown, the best first."""
    lines = ["| variant | what | seeds | search accuracy | networks |", "|---|---|--:|--:|--:|"]
    figures = {
        name: [100.0 * row["search_accuracy"] for row in seeds.values()]
        for name, seeds in rows.items()
        if name in VARIANTS
    }
    for name in sorted(figures, key=lambda name: -float(np.mean(figures[name]))):
        values = figures[name]
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        networks = max(row["networks"] for row in rows[name].values())
        lines.append(
            f"| {name} | {VARIANTS[name].what} | {len(values)} | {np.mean(values):.2f}{spread} | "
            f"{networks} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print the table."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME", default=[])
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, end")
    parser.add_argument("--hold-out", action="store_true", help="judge on half of the images")
    known, words = parser.parse_known_args()
    runs = known.out.with_suffix("")
    if known.table:
        print(table(read_rows(known.out)["rows"]))
        return
    options, content = begin(known.out, words, hold_out=known.hold_out)
    for seed in range(known.seeds):
        for name in known.only or VARIANTS:
            seeds = content["rows"].setdefault(name, {})
            if str(seed) not in seeds:
                folder = runs / f"{name}-{seed}"
                seeds[str(seed)] = measure(options, name, seed, folder, hold_out=known.hold_out)
                write_json(known.out, content)
                print(f"{name}, seed {seed}: {seeds[str(seed)]['search_accuracy']:.4f}", flush=True)


if __name__ == "__main__":
    main()
