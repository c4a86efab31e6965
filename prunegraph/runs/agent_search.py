"""The agent's search on the networks of a run: a job, and what it leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prunegraph.agent.method import AgentSearch, Sampler
from prunegraph.agent.policies import save_policy
from prunegraph.agent.search import Family, train_policy
from prunegraph.runs.greedy import greedy_curve
from prunegraph.runs.options.config import SearchOptions
from prunegraph.runs.parallel.jobs import Workplace
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


def agent_method(options: SearchOptions) -> AgentSearch:
    """Return the agent's search as the options ask for it."""
    return AgentSearch(options=options.agent, shares=options.budgets, policy=options.policy)


def sampler_method(options: SearchOptions) -> Sampler:
    """Return the search that only draws what the agent draws at first."""
    return Sampler(options=options.agent, shares=options.budgets, policy=options.policy)


def search_job(
    place: Workplace, method: AgentSearch, name: str, networks: int, seed: int
) -> SearchRun:
    """Search on a workplace's networks, all with one policy: a job."""
    folder, total = place.folders[0], networks * len(place.contexts)
    with place.console.progress(f"search {name}, seed {seed}", total) as report:
        problems = [
            context.problem(
                seed=seed,
                max_networks=networks,
                folder=folder.search(name, seed),
                progress=report,
            )
            for context in place.contexts
        ]
        found = train_policy(
            problems,
            method.options,
            shares=method.shares,
            initial=method.initial,
            pool=place.pool,
            events=folder.events(f"{name}-{seed}"),
        )
    save_policy(folder.search(name, seed), found.policy)
    return SearchRun(
        candidates=tuple(
            Candidate(
                name=name,
                role=method.role,
                searches=method.searches,
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
            greedy_curve(context, result.details["policy_masks"])
            for context, result in zip(place.contexts, found.results, strict=True)
        ),
    )
