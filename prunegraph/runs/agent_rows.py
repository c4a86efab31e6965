"""The agent's rows: one search a seed, what they cost, the policy that is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunegraph.agent.method import AppliedPolicy
from prunegraph.agent.policies import load_policy, save_policy
from prunegraph.core.errors import ArtefactError
from prunegraph.core.files import write_json
from prunegraph.core.reading import checked, read_json
from prunegraph.methods.controls import PriorControl
from prunegraph.methods.method import Method
from prunegraph.runs.agent_search import SearchRun, agent_method, search_job
from prunegraph.runs.context import RunContext
from prunegraph.runs.options.config import SearchOptions
from prunegraph.runs.parallel.jobs import Batch, Workplace
from prunegraph.runs.plan import policy_row
from prunegraph.runs.report.report import History, SearchResult
from prunegraph.runs.report.verdict import PRIOR
from prunegraph.runs.store import Candidate, CandidateStore, add_found

HEALTH = ("repaired", "entropy_per_bit", "equal_actions", "distance_to_uniform")
"""Figures of an update by which a collapsed policy is recognised."""

CURVES = (
    *("networks", "accuracy", "best_accuracy", "bar", "reward"),
    *("entropy_per_bit", "multiplier", "repaired"),
)
"""Figures of an update that a run keeps as its learning curves."""

FINISHED = {
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
        arguments=[
            (agent_method(options), name, options.networks, seed)
            for seed, path in paths.items()
            if not path.is_file()
        ],
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
    path = folder.search(name, best)
    if (path / folder.POLICY).is_file():
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
    if not whole:
        msg = f"{path} is damaged: delete it to repeat the search"
        raise ArtefactError(msg)
    return record


def _finished(place: Workplace, name: str, seed: int) -> Path:
    """Return where it is kept that a search is finished."""
    return place.folders[0].found(name, seed)


def add_beginnings(
    context: RunContext, store: CandidateStore, options: SearchOptions, seeds: Sequence[int]
) -> None:
    """Add what each search began with: its prior, and what the policy given to it decides."""
    for seed in seeds:
        add_beginning(context, store, PRIOR, seed, PriorControl())
        if options.policy is not None:
            name = policy_row(options.policy)
            add_beginning(context, store, name, seed, AppliedPolicy(options.policy))


def add_beginning(
    context: RunContext, store: CandidateStore, name: str, seed: int, method: Method
) -> None:
    """Add what a search began with: what a method decides without a look at search images."""
    if store.get(name, seed) is None:
        result = method.prune(context.problem(seed=seed))
        accuracy = context.recalibrated_search_accuracy(result.channels)
        store.add(
            Candidate(
                name=name,
                role="control",
                searches=False,
                beginning=True,
                seed=seed,
                mask=result.channels,
                networks_evaluated=result.networks,
                search_accuracy=accuracy,
            )
        )


def _record(run: SearchRun) -> dict[str, Any]:
    """Return what is kept of a finished search."""
    found = run.found
    return {
        "seconds": found.seconds,
        "evaluation_seconds": found.evaluation_seconds,
        "networks_evaluated": found.networks,
        "history": {key: [row[key] for row in found.history] for key in (*CURVES, *HEALTH)},
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
