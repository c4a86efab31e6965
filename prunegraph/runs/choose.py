"""Jobs that let methods choose masks, whatever the methods are, and the controls beside them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunegraph.artefacts.masked import StoredMask
from prunegraph.artefacts.pruned import StoredChannels
from prunegraph.core.console import Console
from prunegraph.core.errors import BudgetError, ConfigError
from prunegraph.core.files import write_json
from prunegraph.core.tensors import parameter_digest
from prunegraph.core.user_code import is_factory
from prunegraph.core.weight_mask import WeightMask
from prunegraph.evaluation.log import OutcomeLog
from prunegraph.graph import unwrap
from prunegraph.layerwise.recalibrate import recalibrate_on
from prunegraph.methods.controls import CONTROL_CRITERIA, WidthsControl
from prunegraph.methods.method import ChannelMethod, Method, Problem, Result
from prunegraph.methods.registry import CLASSES, baseline_names, load, make_method, unknown_method
from prunegraph.runs.context import Mask, RunContext
from prunegraph.runs.finetune import save_network
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.config import PruneConfig, PruningOptions, SearchOptions
from prunegraph.runs.options.fields import with_options
from prunegraph.runs.options.methods import check_named, options_of
from prunegraph.runs.parallel.jobs import Batch, Jobs, Workplace
from prunegraph.runs.plan import (
    Plan,
    applied_policy,
    beside,
    is_family,
    is_policy,
    policy_row,
    searches,
)
from prunegraph.runs.report.verdict import AGENT, SAMPLER, is_rival
from prunegraph.runs.store import Candidate, CandidateStore

CURVES = (
    *("networks", "accuracy", "best_accuracy", "bar", "reward"),
    *("entropy_per_bit", "multiplier", "repaired"),
)
"""Figures of an update that a run keeps as its learning curves."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Choice:
    """What a job brings.

    Attributes:
        candidates: the chosen mask of each network; none where an optional one is out of reach.
        record: what a search or a decision says of itself, as JSON values; None = nothing.
        problem: why there is no candidate.
    """

    candidates: tuple[Candidate, ...] = ()
    record: Mapping[str, Any] | None = None
    problem: str = ""


def method_of(options: PruningOptions, name: str) -> Method:
    """Return a method as the options of a command ask for it."""
    if isinstance(options, SearchOptions):
        search: dict[str, Any] = {"options": options.agent, "shares": options.budgets}
        if name in (AGENT, SAMPLER):
            method: Method = load(CLASSES[name])(**search, policy=options.policy)
            return method
    applied = applied_policy(options) or getattr(options, "policy", None)
    if applied is not None and name == policy_row(applied):
        policy: Method = load("agent.method:AppliedPolicy")(applied, label=applied.name)
        return policy
    method, own = make_method(name), options_of(options.method_options, name)
    if isinstance(options, PruneConfig) and name in beside(options):  # of the same recipe
        fields = vars(method).keys()
        others = options_of(options.method_options, options.method)
        own = {field: value for field, value in others.items() if field in fields} | own
    return with_options(method, own)


def networks_of(options: PruningOptions) -> int:
    """Return how many networks a search may run; 0 for a command that does not search."""
    return options.networks if isinstance(options, SearchOptions) else 0


def check_names(names: Sequence[str]) -> None:
    """Raise ConfigError for a name that no method has, or that needs what is not installed."""
    valid = baseline_names()
    unknown = [name for name in names if name not in valid and not is_factory(name)]
    if unknown:
        raise unknown_method(unknown[0], valid)


def check_methods(plan: Plan, contexts: Sequence[RunContext]) -> None:
    """Raise an error if a method cannot serve a network, the budget or so many networks."""
    options = contexts[0].options
    networks = networks_of(options)
    check_named(options.method_options, plan.methods)
    problems = [each.measures.untimed_problem(each.budget, networks) for each in contexts]
    for name in plan.methods:
        method: Any = method_of(options, name)
        if is_family(name):
            options.budget().check_channels()
            method.check_family(problems)
            continue
        for problem in problems:
            method.check(problem)
            if isinstance(options, PruneConfig):
                _check_read(options, method, problem)


def _check_read(options: PruneConfig, method: Method, problem: Problem) -> None:
    """Raise ConfigError for an option that the method does not read; it is not the agent."""
    given, usual = vars(options), vars(SearchOptions())
    for name, option in {"policy": "policy", "budgets": "budgets", "agent": "agent.*"}.items():
        if given[name] != usual[name]:
            msg = f"--{option} is for the agent: {options.method} does not read it, drop it"
            raise ConfigError(msg)
    tries = isinstance(method, ChannelMethod) and method.networks_needed(problem.graph) > 0
    if options.networks != usual["networks"] and not (method.searches or tries):
        msg = f"--networks is for searches: {options.method} does not search, drop it"
        raise ConfigError(msg)


def choose_masks(plan: Plan, jobs: Jobs, stores: Sequence[CandidateStore]) -> None:
    """Let the methods choose their masks; those that the stores have are not asked again.

    Args:
        plan: which methods and seeds.
        jobs: runs them.
        stores: where each network's candidates are kept.
    """
    folder, console = jobs.place.folders[0], jobs.place.console
    networks = networks_of(jobs.place.contexts[0].options)
    every = tuple(range(len(stores)))
    planned: dict[str, list[tuple[Any, ...]]] = {"methods": []}
    for name, seed in plan.choices():
        if is_family(name):
            planned.setdefault(f"searches of the {name}", []).append((every, name, seed))
        else:
            planned["methods"] += [((number,), name, seed) for number in every]
    others = planned.pop("methods")
    others.sort(key=lambda item: not searches(item[1]))  # the long ones first

    def missing(numbers: tuple[int, ...], name: str, seed: int) -> bool:
        unknown = any(stores[number].get(name, seed) is None for number in numbers)
        return unknown or (name == AGENT and not folder.found(name, seed).is_file())

    def keep(values: tuple[Any, ...], choice: Choice) -> None:
        numbers, name, seed, _ = values
        for number, candidate in zip(numbers, choice.candidates, strict=False):
            beginning = name in plan.beginnings
            role = "control" if beginning else candidate.role
            stores[number].add(replace(candidate, name=name, role=role, beginning=beginning))
        if choice.record is not None:
            write_json(folder.found(name, seed), choice.record)
        if choice.problem:
            console.say(f"no row of {name}: {choice.problem}")

    def batch(label: str, items: Sequence[tuple[Any, ...]], *, family: bool) -> Batch:
        return Batch(
            label=label,
            job=choose_job,
            arguments=[(*item, plan.optional) for item in items if missing(*item)],
            keep=keep,
            planned=len(items),
            networks=lambda values: networks if searches(values[1]) else 1,
            searches=family,
        )

    searching = [batch(label, items, family=True) for label, items in planned.items()]
    jobs.run(*searching, batch("methods", others, family=False))


def choose_job(
    place: Workplace, numbers: tuple[int, ...], name: str, seed: int, optional: bool = False
) -> Choice:
    """Let a method choose the masks of some networks: a job. An interrupted search goes on.

    Args:
        place: the run's.
        numbers: of the networks; the agent's search is of all.
        name: of the method.
        seed: of its choice.
        optional: a baseline that cannot meet the budget chooses nothing.
    """
    context, folder = place.contexts[numbers[0]], place.folders[numbers[0]]
    method, networks = method_of(context.options, name), networks_of(context.options)
    if is_family(name):
        return _search(place, method, networks, seed)
    try:
        if is_policy(name):
            total = load("agent.adapt:NUM_DECISION_NETWORKS")
            with place.console.progress("decide", total) as report:
                found, details = run_method(context, folder, method, seed=seed, progress=report)
                report(total)  # some priors led to one mask
            return Choice(candidates=(found,), record=_decision(details))
        if _changes_weights(method):
            with place.console.progress(f"{name}, seed {seed}") as report:
                found, _ = run_method(
                    context, folder, method, seed=seed, networks=networks, progress=report
                )
            return Choice(candidates=(found,))
        if not searches(name):
            found, _ = run_method(context, folder, method, seed=seed, networks=networks)
            return Choice(candidates=(found,))
        log = OutcomeLog(folder.outcomes(name, seed))
        with place.console.progress(f"search {name}, seed {seed}", networks) as report:
            found, _ = run_method(
                context, folder, method, seed=seed, networks=networks, log=log, progress=report
            )
        return Choice(candidates=(found,))
    except BudgetError as error:
        if not optional or method.role != "baseline":
            raise
        return Choice(problem=str(error))


def run_method(
    context: RunContext,
    folder: RunFolder,
    method: Method,
    *,
    seed: int,
    networks: int = 0,
    counted: int = 0,
    log: OutcomeLog | None = None,
    progress: Callable[..., None] | None = None,
) -> tuple[Candidate, Mapping[str, Any]]:
    """Return the mask that a method chooses, measured on the search split, and its details.

    Args:
        context: the network.
        folder: of its files.
        method: the method.
        seed: of its search.
        networks: pruned networks that it may run.
        counted: networks that were run for what it is given, such as the agent's widths.
        log: what an earlier start of its search measured.
        progress: called with the number of networks run.
    """
    started, recalled = time.monotonic(), 0.0
    weights = method.kind == "weights"
    problem = context.measures.problem(
        context.budget,
        seed=seed,
        max_networks=networks,
        log=log,
        folder=folder.search(method.name, seed) if _changes_weights(method) else None,
        progress=progress,
    )
    if weights:
        result = method.prune(problem)
    else:
        watching = progress if method.searches else None
        with problem.evaluator.watched(watching):
            result = method.prune(problem)
        recalled = problem.evaluator.recalled
    mask: Mask
    if weights or result.model is not None:
        mask = store_network(context, folder.chosen(method.name, seed), result)
    else:
        mask = result.channels
    candidate = Candidate(
        name=method.name,
        role=method.role,
        searches=method.searches,
        seed=seed,
        mask=mask,
        networks_evaluated=result.networks + counted,
        search_accuracy=context.recalibrated_search_accuracy(mask),
        seconds=time.monotonic() - started + recalled,
        bytes_up=result.details.get("bytes_up"),
        bytes_down=result.details.get("bytes_down"),
    )
    return candidate, result.details


def _changes_weights(method: Method) -> bool:
    """Return whether a method leaves other weights than the dense ones; a user's says none."""
    return method.kind == "weights" or getattr(method, "changes_weights", False)


def store_network(context: RunContext, where: Path, result: Result) -> Mask:
    """Write the network in which a method has put zeros, or whose weights it has changed.

    Its batch norm is recalibrated.
    """
    task, mask = context.target.task, result.mask
    if result.model is None:
        assert isinstance(mask, WeightMask)
        model = mask.apply(unwrap(task.model))
    else:
        model = unwrap(result.model)
    samples = task.train.sample(context.options.calibration_images, context.seed)
    recalibrate_on(model, task, samples)
    save_network(context.target, where, model, mask)
    for part, file in RunFolder.TOLD.items():
        if part in result.details:
            write_json(where / file, result.details[part])
    if not isinstance(mask, WeightMask):
        return StoredChannels(mask.keep, where, parameter_digest(model))
    changed = None if result.model is None else parameter_digest(model)
    return StoredMask(where=where, name=mask.digest(), sparsity=mask.sparsity, weights=changed)


def _search(place: Workplace, method: Any, networks: int, seed: int) -> Choice:
    """Search on all networks of a workplace, with one policy."""
    folder, name = place.folders[0], method.name
    total = networks * len(place.contexts)
    with place.console.progress(f"search {name}, seed {seed}", total) as report:
        problems = [
            context.measures.problem(
                context.budget,
                seed=seed,
                max_networks=networks,
                folder=folder.search(name, seed),
                progress=report,
            )
            for context in place.contexts
        ]
        found = load("agent.search:train_policy")(
            problems,
            method.options,
            shares=method.shares,
            initial=method.initial,
            pool=place.pool,
            events=folder.events(f"{name}-{seed}"),
        )
    load("agent.policies:save_policy")(folder.search(name, seed), found.policy)
    return Choice(
        candidates=tuple(
            Candidate(
                name=name,
                role=method.role,
                searches=True,
                seed=seed,
                mask=result.channels,
                networks_evaluated=result.networks,
                search_accuracy=context.recalibrated_search_accuracy(result.channels),
                seconds=found.seconds,
            )
            for context, result in zip(place.contexts, found.results, strict=True)
        ),
        record={
            "seconds": found.seconds,
            "evaluation_seconds": found.evaluation_seconds,
            "networks_evaluated": found.networks,
            "history": {key: [row[key] for row in found.history] for key in CURVES},
        },
    )


def _decision(details: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a policy decided, as a report tells it."""
    return {
        "start": details["prior"],
        "share": details["strength"],
        "divergence": details["divergence"],
        "seconds": details["seconds"],
    }


def add_controls(place: Workplace, number: int, store: CandidateStore, agent: str) -> None:
    """Add what L1 and chance choose at the widths of the agent's masks of a network."""
    context, folder = place.contexts[number], place.folders[number]
    pairs = [(own, criterion) for own in store.named(agent) for criterion in CONTROL_CRITERIA]
    with place.console.progress("controls", len(pairs)) as report:
        for done, (own, criterion) in enumerate(pairs, start=1):
            method = WidthsControl(criterion, context.target.graph.group_widths(own.channels))
            if store.get(method.name, own.seed) is None:
                count = own.networks_evaluated
                row, _ = run_method(context, folder, method, seed=own.seed, counted=count)
                store.add(row)
            report(done)


def warn_if_worse(
    context: RunContext, rows: Sequence[Candidate], own: Candidate, console: Console
) -> None:
    """Say so if a method is clearly better on the search images than what was chosen.

    Clearly: by two standard errors of the difference of two shares of so many images.
    """
    best = max(filter(is_rival, rows), key=lambda row: row.search_accuracy, default=own)
    share, search = best.search_accuracy, context.target.task.search
    if context.target.task.score_name != "accuracy" or search is None:
        return
    error = math.sqrt(2.0 * share * (1.0 - share) / len(search))
    if share - own.search_accuracy > 2.0 * error:
        console.say(
            f"warning: {best.name} has an accuracy of {share:.1%} on the search images, {own.name} "
            f"{own.search_accuracy:.1%}: it does not suit {context.target.arch} as it is; search "
            "on with `prunegraph train --policy`, or with more --networks"
        )
