"""What a policy that was taught on some networks knows of others: no search, no reward there.

Searches the family once for each seed (finished and interrupted searches go on from the folder
RUNS, which belongs to one set of options), teaches what was found to policies with one thing
changed each, and lets each choose masks for networks that took no part, at each budget. The figure
is the accuracy on the whole search split after recalibration; the test split stays closed. Weights
that have seen the search images may serve in a family; a held-out network's should not have.

    python benchmarks/transfer.py --out FILE.json --runs RUNS --held-out W56 --weights W20 W32 W44
        [--teach 0 1] [--only NAME ...] --budgets 0.3 0.5 0.7 --networks 500 [options of train]
    python benchmarks/transfer.py --out FILE.json --runs RUNS --table

With ``--teach`` (positions in --weights) only these members are taught, and the policy is applied
to the others too: so options can be chosen without a look at the held-out network. With
``--one-search`` every seed teaches what the search of seed 0 found: the spread of teaching alone.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from searches import GRADIENTS, TWINS, begin, read_rows
from torch import Tensor
from torch_geometric.data import Data

from prunegraph.agent.amortise import Lesson, amortise, with_share
from prunegraph.agent.network import PruningNetwork
from prunegraph.agent.saving import TrainedPolicy
from prunegraph.experiment.agent_options import agent_config, trained_budgets
from prunegraph.experiment.bench import Bench
from prunegraph.experiment.config import SearchOptions, TrainConfig
from prunegraph.experiment.console import Console
from prunegraph.experiment.folder import RunFolder
from prunegraph.experiment.jobs import load_targets, make_workplace
from prunegraph.experiment.search import policy_mask, search_lessons
from prunegraph.experiment.suit import suit_benches
from prunegraph.files import write_json
from prunegraph.types import Budget, FloatArray


class ShuffledNetwork(PruningNetwork):
    """Reads a graph whose edges end anywhere."""

    def encode(self, data: Data) -> Tensor:
        """Return embeddings ``[N, H]`` of the graph with its edges' ends exchanged at random."""
        edges = data.edge_index
        order = torch.randperm(edges.shape[1], generator=torch.Generator().manual_seed(0))
        shuffled = torch.stack([edges[0], edges[1, order]])
        return super().encode(Data(**{**data.to_dict(), "edge_index": shuffled}))


@dataclass(frozen=True, eq=False)
class Average(TrainedPolicy):
    """Policies that decide together."""

    members: Sequence[TrainedPolicy] = ()

    def logits(self, data: Data, node_features: FloatArray, context: FloatArray) -> FloatArray:
        """Return the mean of the members' keep scores ``[N]``."""
        scores = [member.logits(data, node_features, context) for member in self.members]
        mean: FloatArray = np.mean(scores, axis=0, dtype=np.float32)
        return mean


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One change.

    Attributes:
        what: in words.
        network: of the policy network's options.
        hidden: features that the policy does not read.
        kind: class of the network.
        share: of what was taught, beside the start, in the scores; None = as ``apply`` chooses it,
            without a label.
        steps: factor on the number of lesson steps; 0 = untaught.
        members: policies with weights drawn apart, whose scores are averaged.
    """

    what: str
    network: Mapping[str, Any] = field(default_factory=dict)
    hidden: Sequence[str] = ()
    kind: type[PruningNetwork] = PruningNetwork
    share: float | None = None
    steps: float = 1.0
    members: int = 1

    def teach(self, lessons: Sequence[Lesson], steps: int, seed: int) -> TrainedPolicy:
        """Return a policy that knows the lessons."""
        seeds = [seed + 1000 * number for number in range(self.members)]
        members = [self._teach_one(lessons, steps, own) for own in seeds]
        return members[0] if self.members == 1 else Average(members[0].network, {}, members)

    def _teach_one(self, lessons: Sequence[Lesson], steps: int, seed: int) -> TrainedPolicy:
        torch.manual_seed(seed)
        config = agent_config(SearchOptions(), seed).network
        network = self.kind(dataclasses.replace(config, **self.network)).eval()
        taught = amortise(
            TrainedPolicy(network),
            lessons,
            steps=round(self.steps * steps),
            seed=seed,
            hidden=self.hidden,
        )
        return taught if self.share is None else with_share(taught, self.share)


VARIANTS = {
    "untaught": Variant(what="the heuristic that policies start from", steps=0.0, share=0.0),
    "default": Variant(what="as `train` teaches and `apply` chooses the share of it"),
    "whole": Variant(what="all of what was taught", share=1.0),
    "half": Variant(what="half of it", share=0.5),
    "average": Variant(what="four weight drawings that decide together", members=4, share=1.0),
    "half_average": Variant(what="half of that", members=4, share=0.5),
    "small": Variant(what="half as wide", network={"hidden": 32}),
    "small_average": Variant(
        what="eight such together", network={"hidden": 32}, members=8, share=1.0
    ),
    "more_steps": Variant(what="twice the steps", steps=2.0),
    "fewer_steps": Variant(what="a third of the steps", steps=1 / 3),
    "one_round": Variant(what="one round of messages", network={"layers": 1}),
    "three_rounds": Variant(what="three rounds", network={"layers": 3}),
    "no_edges": Variant(what="no messages along the graph", network={"use_edges": False}),
    "shuffled_edges": Variant(what="edges end anywhere", kind=ShuffledNetwork),
    "from_scratch": Variant(what="scores start from 0", network={"prior": None}, share=1.0),
    "no_gradients": Variant(what="reads Taylor per multiply-add only", hidden=GRADIENTS),
    "no_twins": Variant(what="reads nothing of twins", hidden=TWINS),
}


def accuracy(policy: TrainedPolicy, share: float | None, bench: Bench, budget: Budget) -> float:
    """Return the accuracy of the mask that a policy chooses, or that ``apply`` would with it."""
    if share is None:
        mask = suit_benches(policy, [bench], [budget])[0].masks[0]
    else:
        mask = policy_mask(policy, bench, budget)
    return bench.final_evaluator.evaluate(mask).accuracy


def benches_of(options: TrainConfig, folder: RunFolder) -> Sequence[Bench]:
    """Return the networks of the options, each with its evaluator."""
    targets = load_targets(options)
    folders = [
        RunFolder(path=folder.path / f"{number}-{target.arch}")
        for number, target in enumerate(targets)
    ]
    return make_workplace(options, targets, folders, Console()).benches


def table(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return the results as Markdown: a row a variant, a column an applied network and budget."""
    cells = sorted({cell for seeds in rows.values() for row in seeds.values() for cell in row})
    lines = [f"| variant | what | seeds | {' | '.join(cells)} |"]
    lines.append(f"|---|---|--:|{'--:|' * len(cells)}")
    for name, seeds in rows.items():
        found = []
        for cell in cells:
            values = [100.0 * row[cell] for row in seeds.values() if cell in row]
            spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
            found.append(f"{np.mean(values):.2f}{spread}" if values else "")
        what = VARIANTS[name].what if name in VARIANTS else ""
        lines.append(f"| {name} | {what} | {len(seeds)} | {' | '.join(found)} |")
    return "\n".join(lines)


def measure(known: argparse.Namespace, options: TrainConfig, content: dict[str, Any]) -> None:
    """Search, teach and apply what is missing in ``content``, and write it after each policy."""
    console = Console()
    members = benches_of(options, RunFolder(path=known.runs / "family"))
    taught = known.teach if known.teach is not None else list(range(len(members)))
    applied = {
        weights.stem: bench
        for number, (weights, bench) in enumerate(zip(options.weights, members, strict=True))
        if number not in taught
    }
    if known.held_out:
        held = dataclasses.replace(options, weights=tuple(known.held_out), arch=())
        others = benches_of(held, RunFolder(path=known.runs / "held-out"))
        applied |= dict(zip((path.stem for path in known.held_out), others, strict=True))
    if not applied:
        sys.exit("nothing to apply a policy to: give --held-out, or --teach fewer networks")
    budgets = trained_budgets(options, options.budget())
    for seed in range(known.seeds):
        searched = 0 if known.one_search else seed
        found = search_lessons(
            members,
            dataclasses.replace(options, seed=searched),
            name="agent/best",
            seed=searched,
            folder=RunFolder(path=known.runs / f"search-{searched}"),
            console=console,
        )
        graphs = [members[number].target.graph for number in taught]
        lessons = [lesson for lesson in found if any(lesson.graph is graph for graph in graphs)]
        for name in known.only or VARIANTS:
            seeds = content["rows"].setdefault(name, {})
            if str(seed) in seeds:
                continue
            variant = VARIANTS[name]
            policy = variant.teach(lessons, options.amortise_steps * options.networks, seed)
            seeds[str(seed)] = {
                f"{weights} {budget.keep_macs}": accuracy(policy, variant.share, bench, budget)
                for weights, bench in applied.items()
                for budget in budgets
            }
            write_json(known.out, content)
            console.say(f"{name}, seed {seed}: {seeds[str(seed)]}")


def main() -> None:
    """Run what is missing, or print the table."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--held-out", type=Path, nargs="+", metavar="WEIGHTS", default=[])
    parser.add_argument("--teach", type=int, nargs="+", metavar="POSITION")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--one-search", action="store_true", help="seeds of the teaching alone")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME", default=[])
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, end")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the checkpoints")
    known, words = parser.parse_known_args()
    if known.table:
        print(table(read_rows(known.out)["rows"]))
        return
    held_out = [path.stem for path in known.held_out]
    asked = {"teach": known.teach, "held_out": held_out, "one_search": known.one_search}
    options, content = begin(known.out, words, **asked)
    if not options.weights:
        sys.exit("name the family by its --weights")
    measure(known, options, content)


if __name__ == "__main__":
    main()
