"""The agent's rows: one search a seed, what they cost, the policy that is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunegraph.agent.network import PRIOR, NetworkConfig, PruningNetwork
from prunegraph.agent.policies import TrainedPolicy, load_policy, save_policy
from prunegraph.core.errors import ArtefactError
from prunegraph.core.files import write_json
from prunegraph.core.reading import checked, read_json
from prunegraph.methods.prior import NUM_PRIORS
from prunegraph.runs.adapt import NUM_DECISION_NETWORKS, adapt_contexts
from prunegraph.runs.agent_options import given_policy
from prunegraph.runs.agent_search import SearchRun, policy_mask, search_job
from prunegraph.runs.bench import Bench
from prunegraph.runs.jobs import Batch, Workplace
from prunegraph.runs.options.config import SearchOptions
from prunegraph.runs.report.report import History, SearchResult
from prunegraph.runs.report.verdict import INITIAL, UNTRAINED
from prunegraph.runs.store import Candidate, CandidateStore, add_found

HEALTH = ("repaired", "entropy_per_bit", "equal_actions", "distance_to_uniform")
"""Figures of an update by which a collapsed policy is recognised."""

CURVES = (
    *("networks", "accuracy", "best_accuracy", "bar", "reward"),
    *("entropy_per_bit", "multiplier", "repaired"),
)
"""Figures of an update that a run keeps as its learning curves."""

FINISHED = {
    "policy": str,
    "seconds": float,
    "evaluation_seconds": float,
    "networks_evaluated": int,
    "history": dict.fromkeys((*CURVES, *HEALTH), list[float]),
    "greedy": list[dict[str, list[float]]],
}
"""What is kept of a finished search."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchSummary:
    """All searches of a run together.

    Attributes:
        result: what they cost.
        repaired: mean share of repaired bits.
        histories: for each network: name of a search -> name of a figure -> its values.
    """

    result: SearchResult
    repaired: float
    histories: Sequence[History]


def agent_batch(
    place: Workplace,
    stores: Sequence[CandidateStore],
    options: SearchOptions,
    *,
    name: str,
    seeds: Sequence[int],
) -> Batch:
    """Return the agent's searches, one a seed; those that are finished are not repeated.

    Args:
        place: its networks share one policy.
        stores: where each network's candidates go.
        options: how to search.
        name: of the rows.
        seeds: of the searches.
    """
    paths = {seed: _finished(place, name, seed) for seed in seeds}

    def keep(values: tuple[Any, ...], run: SearchRun) -> None:
        add_found(stores, run.candidates)
        write_json(paths[values[-1]], _record(run))

    return Batch(
        label="searches of the agent",
        job=search_job,
        arguments=[(options, name, seed) for seed, path in paths.items() if not path.is_file()],
        keep=keep,
        planned=len(seeds),
        networks=lambda _: options.networks,
        searches=True,
    )


def agent_summary(
    place: Workplace,
    stores: Sequence[CandidateStore],
    *,
    name: str,
    seeds: Sequence[int],
) -> SearchSummary:
    """Keep the policy of the best of the finished searches, and sum all up."""
    folder = place.folders[0]
    paths = [_finished(place, name, seed) for seed in seeds]
    records = [read_finished(path, len(stores)) for path in paths]
    best = max(seeds, key=lambda seed: (_mean_accuracy(stores, name, seed), -seed))
    path = folder.checkpoint(records[list(seeds).index(best)]["policy"])
    if path.is_file():
        save_policy(folder.path, load_policy(path))
    else:  # a comparison that goes on on another machine may have left its policies behind
        place.console.say(f"the run folder gets no policy: {path} is not there")
    return _summary(name, seeds, records)


def read_finished(path: Path, num_networks: int) -> dict[str, Any]:
    """Return what is kept of a finished search on so many networks.

    Raises:
        ArtefactError: the file is damaged.
    """
    record: dict[str, Any] = checked(read_json(path), FINISHED, str(path))
    lengths = {len(values) for values in record["history"].values()}
    whole = len(lengths) == 1 and 0 not in lengths and len(record["greedy"]) == num_networks
    if not whole or Path(record["policy"]).name != record["policy"]:
        msg = f"{path} is damaged: delete it to repeat the search"
        raise ArtefactError(msg)
    return record


def _finished(place: Workplace, name: str, seed: int) -> Path:
    """Return where it is kept that a search is finished."""
    return place.folders[0].found(name, seed)


def add_beginnings(
    bench: Bench, store: CandidateStore, options: SearchOptions, seeds: Sequence[int]
) -> None:
    """Add what each search began with: its start, and what the policy given to it decides."""
    for seed in seeds:
        add_untrained(bench.with_statistics(seed), store, seed)
        add_initial(bench.with_statistics(seed), store, options, seed)


def add_untrained(bench: Bench, store: CandidateStore, seed: int) -> None:
    """Add the mask of an untrained policy."""
    if store.get(UNTRAINED, seed) is None:
        config = NetworkConfig(feature_names=(PRIOR,))  # all that it goes by
        mask = policy_mask(TrainedPolicy(PruningNetwork(config).eval()), bench, bench.budget)
        store.add(measured(bench, UNTRAINED, seed, mask, NUM_PRIORS, beginning=True))


def add_initial(bench: Bench, store: CandidateStore, options: SearchOptions, seed: int) -> None:
    """Add what the policy that the search began with, if one was given, decides by itself."""
    policy = given_policy(options)
    if policy is not None and store.get(INITIAL, seed) is None:
        adapted, _ = adapt_contexts(policy, [bench], [bench.budget])
        mask, networks = adapted.masks[0], NUM_DECISION_NETWORKS
        store.add(measured(bench, INITIAL, seed, mask, networks, beginning=True))


def measured(
    bench: Bench, name: str, seed: int, mask: Any, networks: int, *, beginning: bool = False
) -> Candidate:
    """Return a policy's mask as a candidate, measured on the whole search split.

    Args:
        bench: the network.
        name: of the row.
        seed: of its search.
        mask: what the policy decides.
        networks: that were run to decide it.
        beginning: whether the agent's search began with it: then it is a control.
    """
    return Candidate(
        name=name,
        role="control" if beginning else "agent",
        searches=False,
        seed=seed,
        mask=mask,
        networks_evaluated=networks,
        search_accuracy=bench.final_evaluator.evaluate(mask).accuracy,
        beginning=beginning,
    )


def _record(run: SearchRun) -> dict[str, Any]:
    """Return what is kept of a finished search."""
    return {
        "policy": run.policy.name,
        "seconds": run.seconds,
        "evaluation_seconds": run.evaluation_seconds,
        "networks_evaluated": run.networks_evaluated,
        "history": {key: [row[key] for row in run.history] for key in (*CURVES, *HEALTH)},
        "greedy": list(run.greedy),
    }


def _mean_accuracy(stores: Sequence[CandidateStore], name: str, seed: int) -> float:
    found = [store.get(name, seed) for store in stores]
    return float(np.mean([item.search_accuracy for item in found if item is not None]))


def _summary(
    name: str, seeds: Sequence[int], records: Sequence[Mapping[str, Any]]
) -> SearchSummary:
    def total(key: str) -> float:
        return float(sum(record[key] for record in records))

    def ends(key: str) -> dict[str, float]:
        series = [record["history"][key] for record in records]
        return {
            "first": float(np.mean([values[0] for values in series])),
            "last": float(np.mean([values[-1] for values in series])),
            "mean": float(np.mean([np.mean(values) for values in series])),
        }

    health = {key: ends(key) for key in HEALTH}
    return SearchSummary(
        result=SearchResult(
            seconds=total("seconds"),
            networks_evaluated=int(total("networks_evaluated")),
            evaluation_seconds=total("evaluation_seconds"),
            details={"seeds": list(seeds), "health": health},
        ),
        repaired=health["repaired"]["mean"],
        histories=[
            {
                f"{name}, seed {seed}": {key: record["history"][key] for key in CURVES}
                | record["greedy"][number]
                for seed, record in zip(seeds, records, strict=True)
            }
            for number in range(len(records[0]["greedy"]))
        ],
    )
