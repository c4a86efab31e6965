"""The one runner: load, check, choose, fine-tune, measure, report.

Choosing looks at train and search images only. The test split is opened when every choice is made.
An interrupted run goes on where it was, a comparison on another machine too: finished cells need
not bring their weights, which are most of a folder.
"""

from collections.abc import Sequence
from typing import Any

from prunegraph.core.console import Console
from prunegraph.core.masks import ChannelMask
from prunegraph.graph.apply import unequal
from prunegraph.methods.registry import load
from prunegraph.runs.choose import (
    add_controls,
    check_methods,
    check_names,
    choose_masks,
    warn_if_worse,
)
from prunegraph.runs.conclude import Outcome, conclude
from prunegraph.runs.context import RunContext
from prunegraph.runs.dense import warn_of_network
from prunegraph.runs.finetune import run_finetunes
from prunegraph.runs.folder import RunFolder, open_run, slug
from prunegraph.runs.measure import measure_again
from prunegraph.runs.options.compare import RunConfig
from prunegraph.runs.options.config import SearchOptions, TrainConfig
from prunegraph.runs.parallel.jobs import Jobs, load_targets, make_workplace
from prunegraph.runs.parallel.ray_pool import load_ray
from prunegraph.runs.plan import (
    Plan,
    applied_policy,
    make_plan,
    plan_finetunes,
    run_name,
)
from prunegraph.runs.policies import pin_applied, pin_policy
from prunegraph.runs.prepare import check_trainable
from prunegraph.runs.report.page import show_finished
from prunegraph.runs.report.verdict import verdict_line
from prunegraph.runs.searches import decided, searched
from prunegraph.runs.store import CandidateStore
from prunegraph.runs.store import choose as best_mask
from prunegraph.runs.target import Target


def run_plan(config: RunConfig, console: Console) -> dict[str, Any]:
    """Do what a command asks for, and return the report of the first network."""
    if isinstance(config, TrainConfig) and config.catalogue is not None:
        found: dict[str, Any] = load("runs.catalogue:run_catalogue")(config, console)
        return found
    plan = make_plan(config)
    applied = applied_policy(config)
    policy = None if applied is None else load("agent.policies:find_policy")(applied)
    check_names([name for name in plan.methods if name != plan.agent])
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
            outcomes = choose(plan, config, jobs)
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
        if plan.searched:
            console.say(verdict_line(reports[-1]))
        console.say(f"written to {folder.path}")
        return reports[-1]


def check_run(plan: Plan, config: RunConfig, targets: Sequence[Target]) -> None:
    """Raise an error if a method, the agent or a fine-tune could not do its work: before any."""
    contexts = [RunContext(target=target, options=config, seed=config.seed) for target in targets]
    if isinstance(config, SearchOptions) and config.ray is not None:
        load_ray()
    for target in targets:
        check_trainable(target, config)
    check_methods(plan, contexts)


def member_folders(folder: RunFolder, targets: Sequence[Target]) -> list[RunFolder]:
    """Return where each network's files go: the first one's into the run folder itself."""
    others = [
        RunFolder(path=folder.path / f"{number}-{slug(target.arch)}")
        for number, target in enumerate(targets[1:], start=1)
    ]
    return [folder, *others]


def choose(plan: Plan, config: RunConfig, jobs: Jobs) -> list[Outcome]:
    """Let the methods choose their masks, add the controls, and return what each network got."""
    place = jobs.place
    stores = [
        CandidateStore(folder.checkpoint(folder.CANDIDATES), context.target.structure)
        for folder, context in zip(place.folders, place.contexts, strict=True)
    ]
    choose_masks(plan, jobs, stores)
    told: dict[str, Any] = {}
    if plan.searched:
        told = searched(place, stores, plan.seeds)
    elif plan.agent is not None:
        told = decided(place, stores[0], plan.agent, config.seed)
    for number, (context, store) in enumerate(zip(place.contexts, stores, strict=True)):
        measure_again(context, store, place.folders[number], place.console)
        if plan.agent is not None and plan.controls:
            add_controls(place, number, store, plan.agent)
        if plan.agent is not None:
            warn_if_worse(context, list(store), best_mask(list(store)), place.console)
    return [Outcome(candidates=list(store), **told) for store in stores]


def _warn_if_unequal(
    contexts: Sequence[RunContext], outcomes: Sequence[Outcome], console: Console
) -> None:
    """Say so if a pruned network computes something else than the zero-masked one."""
    for context, outcome in zip(contexts, outcomes, strict=True):
        target = context.target
        chosen = best_mask(outcome.candidates).mask
        problem = None
        if isinstance(chosen, ChannelMask):
            problem = unequal(target.model, target.graph, chosen, target.example_inputs)
        if problem is not None:
            console.say(f"warning: {problem}")
