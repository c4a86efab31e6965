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
from typing import Any

import numpy as np
import torch
from searches import GRADIENTS, TWINS, begin, read_rows

from prunegraph.agent.config import PPOConfig
from prunegraph.agent.network import NetworkConfig
from prunegraph.agent.train import AgentConfig
from prunegraph.core.console import Console
from prunegraph.core.files import write_json
from prunegraph.core.splits import SearchSplit
from prunegraph.runs.agent_options import (
    UNREAD,
    agent_config,
    calm,
    given_policy,
    trained_budgets,
    wide,
)
from prunegraph.runs.agent_search import search
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.jobs import load_targets, make_workplace
from prunegraph.runs.options.config import TrainConfig
from prunegraph.runs.prepare import Target

NO_OFFSETS = {"offset_rate": 0.0, "group_offset_rate": 0.0, "surrogate_rate": 0.0}
NETWORK_ALONE = NO_OFFSETS | {"group_noise_rate": 0.0}
NO_NOISE = {"group_noise_start": 0.0, "group_noise_end": 0.0}


def without(*names: str) -> dict[str, Any]:
    """Return the policy network's options without some of the features that it reads."""
    kept = [name for name in NetworkConfig().feature_names if name not in (*names, *UNREAD)]
    return {"feature_names": tuple(kept)}


def exploration(ppo: PPOConfig) -> dict[str, Any]:
    """Return how far a search explores."""
    names = ("temperature_start", "temperature_end", "group_noise_start", "group_noise_end")
    return {name: getattr(ppo, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One change.

    Attributes:
        what: in words.
        options: changes of ``prunegraph train``'s options.
        ppo: of the updates' options.
        network: of the policy network's.
        reward: of the reward's.
        train_images: so many train images are searched on, not the search split; 0 = the split.
    """

    what: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ppo: Mapping[str, Any] = field(default_factory=dict)
    network: Mapping[str, Any] = field(default_factory=dict)
    reward: Mapping[str, Any] = field(default_factory=dict)
    train_images: int = 0

    def agent(self, options: TrainConfig, seed: int) -> AgentConfig:
        """Return the agent's options."""
        config = agent_config(
            options, seed, given_policy(options), trained_budgets(options, options.budget())
        )
        return dataclasses.replace(
            config,
            ppo=dataclasses.replace(config.ppo, **self.ppo),
            network=dataclasses.replace(config.network, **self.network),
            reward=dataclasses.replace(config.reward, **self.reward),
        )


VARIANTS = {
    "default": Variant(what="as `prunegraph train` searches"),
    "no_surrogate": Variant(what="no surrogate rollouts", options={"surrogate_steps": 0}),
    "surrogate_best": Variant(
        what="predicted masks compete with the best run one", ppo={"surrogate_competition": True}
    ),
    "surrogate_layers": Variant(
        what="the model of the outcomes knows what layers lose", ppo={"surrogate_layers": True}
    ),
    "no_offsets": Variant(
        what="the policy network alone, no offsets of channels and groups",
        ppo=NETWORK_ALONE,
    ),
    "no_offsets_no_edges": Variant(
        what="the policy network alone, no messages",
        ppo=NETWORK_ALONE,
        network={"use_edges": False},
    ),
    "no_group_noise": Variant(what="independent bits alone explore", ppo=NO_NOISE),
    "from_scratch": Variant(what="scores start from 0", network={"prior": None}),
    "taylor_start": Variant(
        what="starts from Taylor per MAC and tries no other heuristic",
        network=without("start") | {"prior": "prior"},
    ),
    "no_edges": Variant(what="no messages along the graph", network={"use_edges": False}),
    "shuffled_edges": Variant(
        what="messages arrive at the wrong nodes", network={"shuffle_edges": True}
    ),
    "one_layer": Variant(what="one round of messages, not two", network={"layers": 1}),
    "four_layers": Variant(what="four rounds of messages", network={"layers": 4}),
    "refine_1": Variant(what="a second step decides anew", options={"refinements": 1}),
    "refine_3": Variant(what="three more steps decide anew", options={"refinements": 3}),
    "group_by_group": Variant(what="one step a group", options={"granularity": "group"}),
    "lagrangian": Variant(
        what="a multiplier instead of the threshold", options={"constraint": "lagrangian"}
    ),
    "ema": Variant(what="competes with averages", options={"self_competition": "ema"}),
    "rank": Variant(what="competes with the last 32", options={"self_competition": "rank"}),
    "greedy": Variant(what="competes with its likeliest", options={"self_competition": "greedy"}),
    "wall": Variant(what="AMC's action wall, no competition", options={"self_competition": "wall"}),
    "accuracy": Variant(what="does not compete", options={"self_competition": "accuracy"}),
    "loss": Variant(what="minus the cross-entropy counts", options={"metric": "loss"}),
    "accuracy_loss": Variant(
        what="accuracy less a quarter of the loss counts", options={"metric": "accuracy_loss"}
    ),
    "kl": Variant(what="minus the divergence from dense counts", options={"metric": "kl"}),
    "kl_train": Variant(
        what="the same on 5,000 train images: neither labels nor unseen images",
        options={"metric": "kl"},
        train_images=5_000,
    ),
    "kl_train_many": Variant(
        what="the same on 20,000 train images", options={"metric": "kl"}, train_images=20_000
    ),
    "all_images": Variant(
        what="scores on all search images, the same in each update", options={"subset": 1_000_000}
    ),
    "calm": Variant(
        what="explores half as far",
        ppo={
            "temperature_start": 0.15,
            "temperature_end": 0.08,
            "group_noise_start": 0.12,
            "group_noise_end": 0.08,
        },
    ),
    "calmest": Variant(
        what="from a heuristic, too, explores as from a policy",
        ppo=exploration(calm(PPOConfig())),
    ),
    "loud": Variant(
        what="from a policy, too, explores as from a heuristic", ppo=exploration(PPOConfig())
    ),
    "wide": Variant(
        what="from a policy, explores the allocation as from a heuristic, the channels calmly",
        ppo=exploration(wide(PPOConfig())),
    ),
    "no_swaps": Variant(what="masks are run as they are drawn", options={"swaps": 0}),
    "no_learning": Variant(
        what="masks are planned, the policy that draws them learns nothing",
        options={"learning_rate": 0.0},
    ),
    "all_planned": Variant(what="every mask is improved first", ppo={"planned_every": 1}),
    "hard_accuracy": Variant(what="accuracy counts, not soft", options={"metric": "accuracy"}),
    "hard_no_swaps": Variant(
        what="both: accuracy counts, masks are run as they are drawn",
        options={"metric": "accuracy", "swaps": 0},
    ),
    "entropy": Variant(what="entropy is paid for", ppo={"entropy_coefficient": 0.01}),
    "one_epoch": Variant(what="one pass over an update's episodes", ppo={"epochs": 1}),
    "gain_50": Variant(
        what="masks that lose differ five times as much, beside the jump of one that wins",
        reward={"gain": 50.0},
    ),
    "floor": Variant(what="losing rewards end at -1", reward={"floor": -1.0}),
    "joint_clip": Variant(what="the whole action's ratio is clipped", ppo={"clip": "joint"}),
    "large_updates": Variant(what="32 networks an update", options={"update_size": 32}),
    "proposals_4": Variant(what="runs the best predicted of 4", ppo={"proposals": 4}),
    "proposals_16": Variant(what="runs the best predicted of 16", ppo={"proposals": 16}),
    "sensitivity": Variant(
        what="reads the sensitivity of groups, and runs a network a group for it",
        network={"feature_names": NetworkConfig().feature_names},
    ),
    "no_gradients": Variant(what="reads Taylor per MAC only", network=without(*GRADIENTS)),
    "no_twins": Variant(what="reads no similarity of channels", network=without(*TWINS)),
    "critic": Variant(what="the critic is subtracted", ppo={"use_critic": True}),
    "no_critic": Variant(what="the critic is not trained", ppo={"value_coefficient": 0.0}),
    "small_updates": Variant(what="8 networks an update", options={"update_size": 8}),
}


def halves(search: SearchSplit) -> tuple[SearchSplit, SearchSplit]:
    """Return two halves of the search images, the same in every run."""
    order = torch.randperm(len(search), generator=torch.Generator().manual_seed(0))
    first, second = order.tensor_split(2)
    return search.take(first), search.take(second)


def with_search(target: Target, search: SearchSplit) -> Target:
    """Return a network whose search looks at other images."""
    return dataclasses.replace(target, dataset=dataclasses.replace(target.dataset, search=search))


def measure(
    options: TrainConfig, name: str, seed: int, folder: Path, *, hold_out: bool
) -> dict[str, Any]:
    """Search once and return the figures."""
    variant = VARIANTS[name]
    own = dataclasses.replace(options.agent, **variant.options, distill_steps=0)
    changed = dataclasses.replace(options, agent=own)
    console, run = Console(), RunFolder(path=folder)
    (target,) = load_targets(changed)
    images = judge = target.dataset.search
    if hold_out:
        images, judge = halves(images)
    if variant.train_images:
        sample = target.dataset.train.sample(variant.train_images, seed=0)
        images = SearchSplit(sample.source, sample.index)
    place = make_workplace(changed, [with_search(target, images)], [run], console)
    config = variant.agent(changed, seed)
    found = search(
        place.benches, changed, name=name, seed=seed, folder=run, console=console, config=config
    )
    bench = dataclasses.replace(place.benches[0], target=with_search(target, judge))
    chosen = bench.final_evaluator.evaluate(found.candidates[0].mask)
    return {
        "search_accuracy": chosen.accuracy,
        "searched_accuracy": found.candidates[0].search_accuracy,
        "kl": chosen.kl,
        "networks": found.networks_evaluated,
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
