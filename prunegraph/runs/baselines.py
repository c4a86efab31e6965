"""The rows that the agent is compared with, each chosen on its own count of networks."""

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch

from prunegraph.core.console import Console
from prunegraph.core.errors import ConfigError, suggest
from prunegraph.core.user_code import as_one_line, find_factory, is_factory
from prunegraph.evaluation.log import OutcomeLog
from prunegraph.graph import StructureGraph
from prunegraph.methods.amc.method import AmcSearch
from prunegraph.methods.criteria.taylor import num_sensitivity_networks
from prunegraph.methods.method import Method, Result, Problem
from prunegraph.methods.registry import METHODS, control_widths
from prunegraph.runs.agent_search import search_job
from prunegraph.runs.bench import Bench
from prunegraph.runs.jobs import Batch, Workplace
from prunegraph.runs.options.config import SearchOptions
from prunegraph.runs.report.verdict import CONTROL_SUFFIX, SAMPLER, SEARCHES, searches
from prunegraph.runs.store import Candidate, CandidateStore, add_found

BASELINES: Mapping[str, Callable[[], Method]] = {**METHODS, "amc": AmcSearch}
"""Name -> factory of every baseline but the agent's sampler."""

USUAL_SEARCHES = ("cem", "random_search")
"""Of the baselines that search, what ``train`` compares with; ``compare`` takes all."""

TORCH_PRUNING = tuple(name for name in METHODS if name.startswith("tp_"))
"""Torch-Pruning's own pruners: asked for by name, since they need that package."""

USUAL_HEURISTICS = (
    "random/uniform",
    "l1/uniform",
    "l1/global",
    "l2/uniform",
    "bn_scale/global",
    "fpgm/uniform",
    "lamp/global",
    "activation/uniform",
    "taylor/uniform",
    "taylor/global",
    "taylor/per_mac",
    "taylor/sensitivity",
    "taylor/skip_full",
)
"""What ``train`` compares with; ``compare`` takes every criterion with every allocation."""

WEIGHTS_ALONE = ("l1", "l2", "fpgm", "bn_scale", "lamp", "tp_magnitude", "tp_bn_scale")
"""Criteria that read neither images nor chance."""

CONTROL_CRITERIA = ("l1", "random")
"""Criteria that choose channels at the agent's own widths."""

CONTROLS = frozenset(f"{criterion}{CONTROL_SUFFIX}" for criterion in CONTROL_CRITERIA)
"""The names of their rows."""


def heuristics() -> tuple[str, ...]:
    """Return the names of this package's own baselines that choose without searching."""
    return tuple(name for name in BASELINES if name not in (*SEARCHES, *TORCH_PRUNING))


def differs_by_seed(name: str) -> bool:
    """Return whether a baseline depends on images or chance: it is asked once for each seed.

    What one draw of images gives, taken for all that the method can give, would be a rival without
    a spread, and differences from it would look surer than they are.
    """
    criterion, _, allocation = name.partition("/")
    return searches(name) or criterion not in WEIGHTS_ALONE or allocation == "sensitivity"


def make_baseline(name: str) -> Method:
    """Return a baseline, of this package or of the user's ``package.module:factory``.

    Raises:
        PruneGraphError: there is none, or it is no pruner.
    """
    if not is_factory(name):
        return BASELINES[name]()
    factory = find_factory(name)
    with as_one_line(name):
        pruner = factory()
    if not callable(getattr(pruner, "prune", None)):
        msg = f"{name} returned {type(pruner).__name__}, which has no method prune(problem)"
        raise ConfigError(msg)
    return cast(Method, pruner)


def method_names() -> tuple[str, ...]:
    """Return every name that ``compare --methods`` takes."""
    return ("all", "heuristics", "torch_pruning", *BASELINES, SAMPLER)


def check_methods(names: Sequence[str]) -> None:
    """Raise ConfigError for a name that no baseline has, or that needs what is not installed."""
    unknown = [name for name in names if name not in method_names() and not is_factory(name)]
    if unknown:
        near = suggest(unknown[0], method_names())
        valid = ", ".join(method_names())
        msg = f"unknown method {unknown[0]!r}{near}; valid: {valid}, package.module:pruner"
        raise ConfigError(msg)
    for name in filter(is_factory, names):
        make_baseline(name)
    if {"torch_pruning", *TORCH_PRUNING} & set(names):
        BASELINES[TORCH_PRUNING[0]]()


def check_baselines(names: Sequence[str], graph: StructureGraph, networks: int) -> None:
    """Raise ConfigError if a baseline could not do its work with so many networks."""
    for name in names:
        needed = 0
        if name.endswith("/sensitivity"):
            needed = num_sensitivity_networks(graph)
        elif name == "netadapt":
            needed = 1 + sum(group.frozen is None for group in graph.groups)
        if networks < needed:
            msg = f"networks={networks} is too few for {name}, which runs {needed}: give as many"
            raise ConfigError(msg)


def baseline_batches(
    stores: Sequence[CandidateStore],
    names: Sequence[str],
    options: SearchOptions,
    *,
    seeds: Sequence[int],
) -> list[Batch]:
    """Return what lets baselines choose masks; those that the stores have are not asked again.

    Args:
        stores: where each network's candidates are kept.
        names: of baselines, the sampler may be among them.
        options: how the agent searches; each baseline may run as many networks.
        seeds: what depends on images or chance is asked once for each, the rest once.
    """
    planned = [
        (number, name, seed, options.networks)
        for number in range(len(stores))
        for name in names
        if name != SAMPLER
        for seed in (seeds if differs_by_seed(name) else seeds[:1])
    ]
    missing = [item for item in planned if stores[item[0]].get(item[1], item[2]) is None]
    missing.sort(key=lambda item: not searches(item[1]))  # the long ones first
    baselines = Batch(
        label="baselines",
        job=baseline_job,
        arguments=missing,
        keep=lambda values, candidate: stores[values[0]].add(candidate),
        planned=len(planned),
        networks=lambda values: values[3] if searches(values[1]) else 1,
    )
    return [baselines, *([_sampler_batch(stores, options, seeds)] if SAMPLER in names else [])]


def baseline_job(place: Workplace, number: int, name: str, seed: int, networks: int) -> Candidate:
    """Let a baseline choose a mask of network ``number``: a job. An interrupted search goes on."""
    bench, pruner = place.benches[number].with_statistics(seed), make_baseline(name)
    if not searches(name):
        return run_pruner(bench, pruner, name, seed=seed, networks=networks)
    log = OutcomeLog(place.folders[number].outcomes(name, seed))
    with place.console.progress(f"search {name}, seed {seed}", networks) as report:
        return run_pruner(
            bench, pruner, name, seed=seed, networks=networks, log=log, progress=report
        )


def run_pruner(
    bench: Bench,
    pruner: Method,
    name: str,
    *,
    seed: int,
    networks: int,
    counted: int = 0,
    log: OutcomeLog | None = None,
    progress: Callable[[int], None] | None = None,
) -> Candidate:
    """Return the mask that a baseline chooses, measured on the whole search split.

    Args:
        bench: the network.
        pruner: the baseline.
        name: of its row.
        seed: of its search.
        networks: pruned networks that it may run.
        counted: networks that were run for what it is given, such as the agent's widths.
        log: what an earlier start of its search measured.
        progress: called with the number of networks run.
    """
    started = time.monotonic()
    problem = bench.problem(seed=seed, max_networks=networks, log=log)
    own = is_factory(name)
    with problem.evaluator.watched(_stopping(progress, networks) if own else progress):
        result = _run_custom(pruner, problem, name) if own else pruner.prune(problem)
    return Candidate(
        name=name,
        seed=seed,
        mask=result.mask,
        networks_evaluated=result.networks_evaluated + counted,
        search_accuracy=bench.final_evaluator.evaluate(result.mask).accuracy,
        seconds=time.monotonic() - started + problem.evaluator.recalled,
    )


def _stopping(progress: Callable[[int], None] | None, most: int) -> Callable[[int], None]:
    """Return what stops a user's pruner at the first network that is too many."""

    def report(networks: int) -> None:
        if networks > most:
            msg = f"prune ran {networks} networks where {most} are allowed"
            raise ConfigError(msg)
        if progress is not None:
            progress(networks)

    return report


def _run_custom(pruner: Method, problem: Problem, name: str) -> Result:
    """Return what the user's pruner chose, with the networks that it ran.

    Raises:
        ConfigError: it failed, or broke the rules that all methods keep.
    """
    before = copy.deepcopy(problem.task.model.state_dict())
    with as_one_line(name):
        result = _checked(pruner.prune(problem), problem)
        after = problem.task.model.eval().state_dict()
        if not all(torch.equal(before[key], value) for key, value in after.items()):
            msg = "prune changed problem.task.model (its weights or statistics): work on a copy of it"
            raise ConfigError(msg)
        return result


def _checked(result: object, problem: Problem) -> Result:
    """Return a user's result, its networks counted, if the rules were kept."""
    graph = problem.graph
    if not isinstance(result, Result):
        msg = f"prune returned {type(result).__name__}, not a Result"
        raise ConfigError(msg)
    networks = max(result.networks_evaluated, problem.evaluator.num_networks)
    if networks > problem.max_networks:
        msg = f"prune ran {networks} networks where {problem.max_networks} are allowed"
    elif not graph.fits(graph.mask(result.mask.keep), problem.budget):
        msg = "prune chose a mask that is over the budget: return problem.project(scores)"
    else:
        return dataclasses.replace(result, networks_evaluated=networks)
    raise ConfigError(msg)


def add_controls(
    bench: Bench, store: CandidateStore, agent: Sequence[Candidate], console: Console
) -> None:
    """Add what L1 and chance choose at the widths of the agent's masks."""
    pairs = [(candidate, criterion) for candidate in agent for criterion in CONTROL_CRITERIA]
    with console.progress("controls", len(pairs)) as report:
        for number, (candidate, criterion) in enumerate(pairs, start=1):
            pruner = control_widths(criterion, bench.target.graph.group_widths(candidate.mask))
            if store.get(pruner.name, candidate.seed) is None:
                row = run_pruner(
                    bench,
                    pruner,
                    pruner.name,
                    seed=candidate.seed,
                    networks=0,
                    counted=candidate.networks_evaluated,
                )
                store.add(row)
            report(number)


def _sampler_batch(
    stores: Sequence[CandidateStore], options: SearchOptions, seeds: Sequence[int]
) -> Batch:
    """Return what finds the best of N that the agent draws: nothing learns, nothing is planned."""
    still = dataclasses.replace(options.agent, learning_rate=0.0, swaps=0)
    idle = dataclasses.replace(options, agent=still)
    return Batch(
        label="searches of the sampler",
        job=search_job,
        arguments=[
            (idle, SAMPLER, seed)
            for seed in seeds
            if any(store.get(SAMPLER, seed) is None for store in stores)
        ],
        keep=lambda _, run: add_found(stores, run.candidates),
        planned=len(seeds),
        networks=lambda _: options.networks,
        searches=True,
    )
