"""The agent's search on the networks of a run: a job, and what it leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prunegraph.agent.policies import TrainedPolicy, find_policy, save_policy
from prunegraph.agent.search import Family, train_policy
from prunegraph.runs.greedy import greedy_curve
from prunegraph.runs.jobs import Workplace
from prunegraph.runs.options.config import SearchOptions
from prunegraph.runs.store import Candidate


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchRun:
    """What one search found.

    Attributes:
        candidates: the chosen mask of each network.
        found: what the search says of itself.
        greedy: for each network the curve of the policy's own masks, see ``greedy_curve``.
    """

    candidates: tuple[Candidate, ...]
    found: Family
    greedy: tuple[Mapping[str, Sequence[float]], ...]


def given_policy(options: SearchOptions) -> TrainedPolicy | None:
    """Return the policy that the options begin with, or None."""
    return None if options.policy is None else find_policy(options.policy)


def search_job(place: Workplace, options: SearchOptions, name: str, seed: int) -> SearchRun:
    """Search on a workplace's networks: a job."""
    folder, total = place.folders[0], options.networks * len(place.benches)
    with place.console.progress(f"search {name}, seed {seed}", total) as report:
        problems = [
            bench.problem(
                seed=seed,
                max_networks=options.networks,
                folder=folder.search(name, seed),
                progress=report,
            )
            for bench in place.benches
        ]
        found = train_policy(
            problems,
            options.agent,
            shares=options.budgets,
            initial=given_policy(options),
            pool=place.pool,
            events=folder.events(f"{name}-{seed}"),
        )
    save_policy(folder.search(name, seed), found.policy)
    return SearchRun(
        candidates=tuple(
            Candidate(
                name=name,
                seed=seed,
                mask=result.channels,
                networks_evaluated=result.networks,
                search_accuracy=result.details["score"],
                seconds=found.seconds,
            )
            for result in found.results
        ),
        found=found,
        greedy=tuple(
            greedy_curve(bench, result.details["own_masks"])
            for bench, result in zip(place.benches, found.results, strict=True)
        ),
    )
