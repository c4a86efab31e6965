"""``prunegraph train``: the main job, from a trained network to a smaller, compared one."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from prunegraph.core.budget import Budget, short
from prunegraph.core.console import Console
from prunegraph.core.errors import ConfigError
from prunegraph.env import check_at_stake
from prunegraph.runs.agent_options import (
    agent_config,
    env_config,
    given_policy,
    probes_of,
    search_budgets,
)
from prunegraph.runs.agent_rows import (
    add_beginnings,
    agent_batch,
    agent_name,
    agent_summary,
    warn_if_worse,
)
from prunegraph.runs.agent_search import FINALISTS
from prunegraph.runs.baselines import (
    USUAL_HEURISTICS,
    USUAL_SEARCHES,
    add_controls,
    baseline_batches,
    check_baselines,
)
from prunegraph.runs.conclude import Outcome, finalise, finetune_chosen
from prunegraph.runs.dense import warn_of_network
from prunegraph.runs.folder import RunFolder, open_run, slug
from prunegraph.runs.jobs import Jobs, load_targets, make_workplace
from prunegraph.runs.measured import settle
from prunegraph.runs.options.config import SearchOptions, TrainConfig
from prunegraph.runs.policies import pin_policy
from prunegraph.runs.prepare import Target, check_trainable
from prunegraph.runs.ray_pool import load_ray
from prunegraph.runs.report.page import show_finished
from prunegraph.runs.report.verdict import SAMPLER, verdict_line
from prunegraph.runs.store import CandidateStore, choose


def run_train(config: TrainConfig, console: Console) -> dict[str, Any]:
    """Do the main job, and return the report of the first network."""
    if config.ray is not None:
        load_ray()  # before anything long starts
    targets = load_targets(config)
    check_networks(targets, config, config.budget())
    for target in targets:
        check_trainable(target, config)
        check_baselines(baseline_names(config), target.graph, config.networks)
    folder = open_run(config, config.out, run_name(targets, config.budget()))
    members = member_folders(folder, targets)
    if folder.finished:
        return show_finished(config, members, [target.graph for target in targets], console)
    with folder.started(config):
        console.say(f"run folder: {folder.path}")
        pin_policy(config.policy, folder.checkpoint(folder.BEGUN_WITH))
        place = make_workplace(config, targets, members, console)
        for bench in place.benches:
            warn_of_network(bench, console)
        with Jobs(config, place) as jobs:
            outcomes = _stage_one(config, jobs)
            finetune_chosen(jobs, outcomes)
        parts = list(zip(place.benches, outcomes, members, strict=True))
        reports = [
            finalise(config, bench, outcome, member, console)
            for bench, outcome, member in reversed(parts)
        ]  # the run folder's own report comes last: it says that the run is finished
        folder.finish(members[1:])
        console.say(verdict_line(reports[-1]))
        console.say(f"written to {folder.path}")
        return reports[-1]


def _stage_one(config: TrainConfig, jobs: Jobs) -> list[Outcome]:
    """Let the agent and the baselines choose their masks."""
    seeds = [config.seed + number for number in range(config.search_seeds)]
    stores = [
        CandidateStore(member.checkpoint(member.CANDIDATES), bench.target.graph)
        for member, bench in zip(jobs.place.folders, jobs.place.benches, strict=True)
    ]
    jobs.run(
        agent_batch(jobs.place, stores, config, seeds=seeds),
        *baseline_batches(stores, baseline_names(config), config, seeds=seeds),
    )
    for bench, store, member in zip(jobs.place.benches, stores, jobs.place.folders, strict=True):
        settle(bench, store, member, jobs.place.console)
    summary = agent_summary(jobs.place, stores, config, seeds=seeds)
    for bench, store in zip(jobs.place.benches, stores, strict=True):
        add_beginnings(bench, store, config, seeds)
        if config.baselines != "none":
            add_controls(bench, store, store.named(agent_name(config)), jobs.place.console)
        warn_if_worse(bench, list(store), choose(list(store)), jobs.place.console)
    return [
        Outcome(
            candidates=list(store),
            search=summary.result,
            repaired=summary.repaired,
            history=history,
        )
        for store, history in zip(stores, summary.histories, strict=True)
    ]


def baseline_names(config: TrainConfig) -> tuple[str, ...]:
    """Return the baselines of stage 1."""
    return {
        "none": (),
        "heuristics": USUAL_HEURISTICS,
        "all": (*USUAL_HEURISTICS, *USUAL_SEARCHES, SAMPLER),
    }[config.baselines]


def check_networks(targets: Sequence[Target], options: SearchOptions, budget: Budget) -> None:
    """Raise an error if a search could make no update, or the policy to begin with is not there.

    Raises:
        ConfigError: too few networks may be evaluated.
        BudgetError: one of the budgets is out of reach, or met by the whole network.
        ArtefactError: there is no such policy.
    """
    for target in targets:
        if budget.max_latency is None:  # it is predicted when the layers have been timed
            check_at_stake(target.arch, target.graph, budget)
        for searched in search_budgets(options, budget) or ():
            zeros = np.zeros(target.graph.num_units, dtype=np.float32)
            target.graph.project(zeros, searched.without_latency())
    agent = agent_config(options, 0, given_policy(options))
    env_config(options, agent, 0, budget)
    if agent.per_group and len({len(target.graph.free_groups) for target in targets}) > 1:
        msg = "--agent.granularity group takes networks of one number of groups: leave it away"
        raise ConfigError(msg)
    names = agent.network.feature_names
    probes = [probes_of(target.graph, names, options, budget) + FINALISTS for target in targets]
    cells = len(targets) * max(len(options.budgets), 1)
    update = options.agent.update_size + min(cells, options.agent.update_size)
    least = math.ceil((sum(probes) + update) / len(targets))
    if options.networks < least:
        msg = f"networks={options.networks} allows no update of the policy: give at least {least}"
        raise ConfigError(msg)


def run_name(targets: Sequence[Target], budget: Budget) -> str:
    """Return the default name of a run's folder."""
    names = "+".join(slug(target.arch) for target in targets)
    return f"{names}-{slug(targets[0].dataset.name)}-{budget_name(budget)}"


def budget_name(budget: Budget) -> str:
    """Return a budget's limits as part of a file's name."""
    return "-".join(map(short, budget.as_dict().values()))


def member_folders(folder: RunFolder, targets: Sequence[Target]) -> list[RunFolder]:
    """Return where each network's files go: the first one's into the run folder itself."""
    others = [
        RunFolder(path=folder.path / f"{number}-{slug(target.arch)}")
        for number, target in enumerate(targets[1:], start=1)
    ]
    return [folder, *others]
