"""The one runner: load, check, choose, fine-tune, measure, report.

Choosing looks at train and search images only. The test split is opened when every choice is made.
An interrupted run goes on where it was, a comparison on another machine too: finished cells need
not bring their weights, which are most of a folder.
"""

from collections.abc import Sequence
from typing import Any

from prunegraph.agent.policies import TrainedPolicy, find_policy
from prunegraph.core.console import Console
from prunegraph.core.masks import ChannelMask
from prunegraph.graph.apply import unequal
from prunegraph.methods.controls import PriorControl
from prunegraph.runs.agent_rows import add_beginning, add_beginnings, agent_batch, agent_summary
from prunegraph.runs.agent_search import agent_method
from prunegraph.runs.choose import (
    add_controls,
    add_optional,
    check_methods,
    check_names,
    method_batches,
    warn_if_worse,
)
from prunegraph.runs.conclude import Outcome, conclude
from prunegraph.runs.context import RunContext
from prunegraph.runs.dense import warn_of_network
from prunegraph.runs.duration import say_duration
from prunegraph.runs.finetune import run_finetunes
from prunegraph.runs.folder import RunFolder, open_run, slug
from prunegraph.runs.measure import measure_again
from prunegraph.runs.options.compare import CompareConfig, RunConfig
from prunegraph.runs.options.config import SearchOptions
from prunegraph.runs.parallel.jobs import Jobs, Workplace, load_targets, make_workplace
from prunegraph.runs.parallel.ray_pool import load_ray
from prunegraph.runs.plan import (
    Plan,
    applied_policy,
    make_plan,
    plan_finetunes,
    rank_of,
    run_name,
)
from prunegraph.runs.policies import decide, pin_applied, pin_policy
from prunegraph.runs.prepare import check_trainable
from prunegraph.runs.report.page import show_finished
from prunegraph.runs.report.report import SearchResult
from prunegraph.runs.report.verdict import PRIOR, SAMPLER, verdict_line
from prunegraph.runs.store import CandidateStore, choose
from prunegraph.runs.target import Target


def run_plan(config: RunConfig, console: Console) -> dict[str, Any]:
    """Do what a command asks for, and return the report of the first network."""
    plan = make_plan(config)
    applied = applied_policy(config)
    policy = None if applied is None else find_policy(applied)
    check_names(plan.methods)
    targets = load_targets(config)
    check_run(plan, config, targets)
    folder = open_run(config, config.out, run_name(config, targets))
    members = member_folders(folder, targets)
    if folder.finished:
        return show_finished(config, members, [target.structure for target in targets], console)
    with folder.started(config):
        console.say(f"run folder: {folder.path}")
        if policy is not None:
            pin_applied(policy, folder)
        elif isinstance(config, SearchOptions):
            pin_policy(config.policy, folder.checkpoint(folder.BEGUN_WITH))
        place = make_workplace(config, targets, members, console)
        for context in place.contexts:
            warn_of_network(context, console)
        with Jobs(config, place) as jobs:
            if isinstance(config, CompareConfig):
                say_duration(place.contexts[0], config, jobs.num_workers, console)
            outcomes = choose_masks(plan, config, jobs, policy)
            cells = [
                plan_finetunes(context, outcome.candidates)
                for context, outcome in zip(place.contexts, outcomes, strict=True)
            ]
            _warn_if_unequal(place.contexts, outcomes, console)
            run_finetunes(jobs, cells)
        parts = list(zip(place.contexts, outcomes, cells, members, strict=True))
        reports = [
            conclude(config, *part, console) for part in reversed(parts)
        ]  # the run folder's own report comes last: it says that the run is finished
        folder.finish()
        if plan.searched or plan.finetunes:
            console.say(verdict_line(reports[-1]))
        console.say(f"written to {folder.path}")
        return reports[-1]


def check_run(plan: Plan, config: RunConfig, targets: Sequence[Target]) -> None:
    """Raise an error if a method, the agent or a fine-tune could not do its work: before any."""
    contexts = [RunContext(target=target, options=config, seed=config.seed) for target in targets]
    if plan.agent is not None:
        config.budget().check_channels()
    if isinstance(config, SearchOptions):
        if config.ray is not None:
            load_ray()
        if plan.searched or SAMPLER in plan.methods:
            problems = [context.untimed_problem(config.networks) for context in contexts]
            agent_method(config).check_family(problems)
    networks = config.networks if isinstance(config, SearchOptions) else 0
    for context in contexts:
        check_trainable(context.target, config)
        check_methods(plan, context, networks)


def member_folders(folder: RunFolder, targets: Sequence[Target]) -> list[RunFolder]:
    """Return where each network's files go: the first one's into the run folder itself."""
    others = [
        RunFolder(path=folder.path / f"{number}-{slug(target.arch)}")
        for number, target in enumerate(targets[1:], start=1)
    ]
    return [folder, *others]


def choose_masks(
    plan: Plan, config: RunConfig, jobs: Jobs, policy: TrainedPolicy | None
) -> list[Outcome]:
    """Let the methods, or a policy that is applied, choose their masks, and add the controls."""
    place = jobs.place
    stores = [
        CandidateStore(folder.checkpoint(folder.CANDIDATES), context.target.structure)
        for folder, context in zip(place.folders, place.contexts, strict=True)
    ]
    if policy is not None:
        return [_apply(plan, jobs.place, stores[0], policy)]
    assert isinstance(config, SearchOptions)
    batches = method_batches(plan, stores, config.networks, config)
    if plan.agent is not None:
        batches.insert(0, agent_batch(place, stores, config, name=plan.agent, seeds=plan.seeds))
    jobs.run(*batches)
    for context, store, folder in zip(place.contexts, stores, place.folders, strict=True):
        measure_again(context, store, folder, place.console)
    if plan.agent is None:
        return [Outcome(candidates=list(store)) for store in stores]
    summary = agent_summary(place, stores, name=plan.agent, seeds=plan.seeds)
    for context, store, folder in zip(place.contexts, stores, place.folders, strict=True):
        add_beginnings(context, store, config, plan.seeds)
        if plan.controls:
            add_controls(context, folder, store, store.named(plan.agent), place.console)
        warn_if_worse(context, list(store), choose(list(store)), place.console)
    return [
        Outcome(
            candidates=list(store),
            search=summary.result,
            repaired=summary.repaired,
            history=history,
        )
        for store, history in zip(stores, summary.histories, strict=True)
    ]


def _apply(plan: Plan, place: Workplace, store: CandidateStore, policy: TrainedPolicy) -> Outcome:
    """Let a policy decide, without a search, and heuristics beside it."""
    assert plan.agent is not None
    context = place.contexts[0]
    decision = decide(policy, plan.agent, context, store, place)
    (own,) = store.named(plan.agent)
    if plan.controls:
        add_beginning(context, store, PRIOR, context.seed, PriorControl())
        add_controls(context, place.folders[0], store, [own], place.console)
    add_optional(place, store, plan, place.console)
    warn_if_worse(context, list(store), own, place.console)
    return Outcome(
        candidates=list(store),
        search=SearchResult(
            seconds=decision["seconds"],
            networks_evaluated=own.networks_evaluated,
            evaluation_seconds=0.0,
        ),
        details={
            "policy": dict(policy.record),
            "decision": {name: decision[name] for name in ("start", "share", "divergence")},
        },
    )


def _warn_if_unequal(
    contexts: Sequence[RunContext], outcomes: Sequence[Outcome], console: Console
) -> None:
    """Say so if a pruned network computes something else than the zero-masked one."""
    for context, outcome in zip(contexts, outcomes, strict=True):
        target = context.target
        chosen = choose(outcome.candidates, rank_of(context.options)).mask
        problem = None
        if isinstance(chosen, ChannelMask):
            problem = unequal(target.model, target.graph, chosen, target.example_inputs)
        if problem is not None:
            console.say(f"warning: {problem}")
