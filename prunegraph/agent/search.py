"""The agent's search: train a policy on pruned networks, choose a mask for each network."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from prunegraph.agent.adapt import adapt
from prunegraph.agent.distill import DistillTarget, distill
from prunegraph.agent.options import AgentOptions
from prunegraph.agent.plan import SearchPlan, plan_search
from prunegraph.agent.policies import TrainedPolicy
from prunegraph.agent.settings import env_config
from prunegraph.agent.subject import Subject, first_context
from prunegraph.agent.train import AgentConfig, TrainingResult, train_agent
from prunegraph.core.budget import Budget
from prunegraph.core.masks import ChannelMask, pack_bits, unpack_bits
from prunegraph.core.tensors import parameter_digest
from prunegraph.env import ChannelPruningEnv, PruningTask, pair_name
from prunegraph.evaluation.log import OutcomeLog
from prunegraph.evaluation.pool import Pool, PooledEvaluator, SearchEvaluator, num_threads
from prunegraph.methods.method import Problem, Result
from prunegraph.methods.search_run import FINALISTS, SearchRun, best_of


@dataclass(frozen=True, eq=False, kw_only=True)
class Family:
    """What one training found for several networks.

    Attributes:
        policy: the trained policy, which can be applied to other networks.
        results: the chosen mask of each network. ``details`` holds ``score``, that of the mask on
            the search split as an accuracy, and ``policy_masks``, the policy's own at each update:
            networks run before it, packed bits.
        seconds: wall time, and that of the networks that an earlier start has run.
        evaluation_seconds: of it, inside surgery, recalibration and evaluation; that of all
            workers together, where several evaluate.
        networks: pruned networks run for all, finalists and what the policy reads included.
        history: one record an update.
    """

    policy: TrainedPolicy
    results: tuple[Result, ...]
    seconds: float
    evaluation_seconds: float
    networks: int
    history: tuple[Mapping[str, Any], ...]


def train_policy(
    problems: Sequence[Problem],
    options: AgentOptions | None = None,
    *,
    shares: Sequence[float] = (),
    initial: TrainedPolicy | None = None,
    pool: Pool | None = None,
    events: Path | None = None,
    config: AgentConfig | None = None,
) -> Family:
    """Train one policy on all networks and choose a mask for each.

    Seed, number of networks, folder and progress are those of the first problem. Started again, a
    search draws the same masks and finds the outcomes of those that it has run in the folder.

    Args:
        problems: the networks, at one budget.
        options: how to search.
        shares: of the multiply-adds to train the policy for, one an episode; default: the budget.
        initial: the policy to begin with; default: an untrained one.
        pool: evaluates the episodes of an update at once; None = this process, one by one. The
            result is the same.
        events: folder for learning curves.
        config: the agent's configuration; default: that of the options.

    Raises:
        PruneGraphError: as ``plan.check_search``, or the folder is of another search.
    """
    with num_threads(torch.get_num_threads() if pool is None else pool.threads):
        plan = plan_search(problems, options or AgentOptions(), shares, initial, config)
        logged = [_logged(problem, plan, number) for number, problem in enumerate(problems)]
        try:
            return _search(logged, plan, initial, pool, events)
        finally:  # an interrupted search goes on from its last network
            for problem in logged:
                if problem.log is not None:
                    problem.log.write()


def _logged(problem: Problem, plan: SearchPlan, number: int) -> Problem:
    """Return a problem whose outcomes are kept in its folder, if it has one."""
    if problem.folder is None or problem.log is not None:
        return problem
    identity = {
        "network": parameter_digest(problem.task.model),
        "budget": problem.budget.as_dict(),
        "seed": plan.config.seed,
    }
    log = OutcomeLog(problem.folder / f"outcomes-{number}.json", identity)
    return replace(problem, log=log)


def _search(
    problems: Sequence[Problem],
    plan: SearchPlan,
    given: TrainedPolicy | None,
    pool: Pool | None,
    events: Path | None,
) -> Family:
    started = time.monotonic()
    subjects, initial = [Subject(_judged(problem, plan)) for problem in problems], None
    if given is not None:
        adapted = adapt(given, subjects, plan.budgets)
        initial, subjects = adapted.policy, list(adapted.subjects)
    tables = _tables(subjects, plan.config, pool)
    result = _train(subjects, plan, tables, initial, events)
    first = tables[0]
    networks = result.networks_evaluated + len(subjects) * plan.probes
    left = (plan.networks * len(subjects) - networks) // len(subjects)
    before = sum(evaluator.num_networks for evaluator in first.evaluators)
    chosen = []
    for number, (subject, evaluator) in enumerate(zip(subjects, first.evaluators, strict=True)):
        masks = _finalists(result, subject, first.tasks[number], number, max(left, FINALISTS), plan)
        _say(subjects[0].problem, networks, f"finalists {number + 1}/{len(subjects)}")
        chosen.append(best_of(masks, evaluator, left))
    networks += sum(evaluator.num_networks for evaluator in first.evaluators) - before
    evaluators = [item for table in tables for item in table.evaluators]
    recalled = sum(evaluator.recalled for evaluator in evaluators)
    policy = _distilled(result, subjects, plan, given, networks)
    return Family(
        policy=TrainedPolicy(policy.network, {**policy.record, **_origin(problems, plan, given)}),
        results=tuple(
            Result(
                mask=mask,
                networks=networks,
                details={
                    "score": outcome.accuracy,
                    "policy_masks": _policy_masks(
                        result, first.tasks[number], subjects[number], number
                    ),
                },
            )
            for number, (mask, outcome) in enumerate(chosen)
        ),
        seconds=time.monotonic() - started + recalled,
        evaluation_seconds=sum(evaluator.seconds for evaluator in evaluators),
        networks=networks,
        history=result.history,
    )


def _judged(problem: Problem, plan: SearchPlan) -> Problem:
    """Return a problem whose priors are judged as its masks are, where that asks for no labels."""
    if plan.config.reward.metric != "kl":
        return problem
    evaluator = problem.make_evaluator(problem.log)  # of its own: priors are counted apart
    return replace(problem, make_unlabelled=lambda: evaluator)


def _show(problem: Problem, record: Mapping[str, Any]) -> None:
    name = problem.task.score_name if problem.task.higher_is_better else "utility"
    words = f"mean {name} {record['accuracy']:.3f}"
    _say(problem, int(record["networks"]), words)


def _say(problem: Problem, networks: int, words: str) -> None:
    if problem.progress is not None:
        problem.progress(networks, words)


def _origin(
    problems: Sequence[Problem], plan: SearchPlan, initial: TrainedPolicy | None
) -> dict[str, Any]:
    """Return what a policy's record tells of where it comes from."""
    task = problems[0].task
    split = task.train if task.search is None else task.search
    return {
        "trained_on": [problem.task.name for problem in problems],
        "data": {"task": task.kind, "search": split.fingerprint()},
        "budgets": [budget.as_dict() for budget in plan.budgets],
        "seed": plan.config.seed,
        "initial": None if initial is None else dict(initial.record),
    }


@dataclass(frozen=True, eq=False, kw_only=True)
class _Table:
    """What one environment plays on: each network with an evaluator of its own."""

    tasks: list[PruningTask]
    evaluators: list[SearchEvaluator]


def _tables(subjects: Sequence[Subject], config: AgentConfig, pool: Pool | None) -> list[_Table]:
    """Return one table for this process alone, or one for each episode of an update."""
    names = config.network.feature_names
    features = [cache(partial(subject.features, names=names)) for subject in subjects]
    evaluators: list[list[SearchEvaluator]]
    if pool is None or config.per_group:  # whose steps come one after another
        evaluators = [[subject.problem.evaluator for subject in subjects]]
    else:
        shared = [
            PooledEvaluator(subject.problem.new_evaluator(), pool, number, subject.problem.log)
            for number, subject in enumerate(subjects)
        ]
        evaluators = [[e.beside() for e in shared] for _ in range(config.episodes_per_update)]
    return [
        _Table(
            tasks=[
                PruningTask(
                    name=f"{number}:{subject.problem.task.name}",
                    graph=subject.graph,
                    node_features=features[number],
                    evaluator=row[number],
                    budget=subject.budget,
                )
                for number, subject in enumerate(subjects)
            ],
            evaluators=row,
        )
        for row in evaluators
    ]


def _train(
    subjects: Sequence[Subject],
    plan: SearchPlan,
    tables: Sequence[_Table],
    initial: TrainedPolicy | None,
    events: Path | None,
) -> TrainingResult:
    """Train the policy until the networks are used up, finalists to come left out."""
    problem = subjects[0].problem
    whole = any(subject.problem.task.search is None for subject in subjects)
    reserved = FINALISTS if any(_costs(each.problem, plan) for each in subjects) else 0
    environment = env_config(
        plan.config,
        subset_size=None if whole else problem.subset_size,
        budgets=plan.budgets,
    )
    return train_agent(
        [
            partial(
                ChannelPruningEnv,
                table.tasks,
                replace(environment, first_episode=number, episode_stride=len(tables)),
            )
            for number, table in enumerate(tables)
        ],
        [subject.graph for subject in subjects],
        plan.config,
        total_networks=(plan.networks - reserved - plan.probes) * len(subjects),
        threads=len(tables) > 1,
        initial=initial,
        tensorboard=events,
        progress=partial(_show, problem),
    )


def _costs(problem: Problem, plan: SearchPlan) -> bool:
    """Return whether finalists are run: they have not been scored for good, or at this budget."""
    return SearchRun(problem).subset(0) is not None or problem.budget not in plan.budgets


def _finalists(
    result: TrainingResult,
    subject: Subject,
    task: PruningTask,
    number: int,
    places: int,
    plan: SearchPlan,
) -> list[ChannelMask]:
    """Return what may win: the masks of the last and first policy, the best so far, likely ones.

    If the search had other budgets than the run, no mask was run at this one: the prior's, and what
    the last policy wants under each of the others, as far as it fits.
    """
    graph, budget, pair = task.graph, task.budget, pair_name(task.name, task.budget)
    offsets = result.offsets[number]
    masks = [subject.mask(result.policy, budget, offsets)]
    if budget not in plan.budgets:
        masks.append(subject.problem.project(subject.prior(budget).scores, budget))
        masks += [
            subject.mask(result.policy, budget, offsets, asked=asked) for asked in plan.budgets
        ]
    own = [bits for record in result.history if (bits := record["greedy_masks"].get(pair))]
    best = result.competition.ledger(pair).best_bits
    kept = [unpack_bits(bits, graph.num_units) for bits in (*own[:1], best) if bits]
    kept += result.surrogate.promising(number, graph.limits(budget), places)
    kept += [unpack_bits(bits, graph.num_units) for bits in reversed(own)]
    masks += [graph.mask(keep) for keep in kept]
    fitting = [mask for mask in masks if graph.fits(mask, budget)]  # not all were repaired
    return list(dict.fromkeys(fitting))[:places]


def _distilled(
    result: TrainingResult,
    subjects: Sequence[Subject],
    plan: SearchPlan,
    given: TrainedPolicy | None,
    networks: int,
) -> TrainedPolicy:
    """Return the policy, distilled from what the search found."""
    options = plan.options
    steps = options.distill_steps * plan.networks if options.learning_rate else 0
    targets = distill_targets(result, subjects, plan.budgets)
    if steps:
        _say(subjects[0].problem, networks, "distill the policy")
    return distill(result.policy, targets, steps=steps, seed=plan.config.seed, initial=given)


def distill_targets(
    result: TrainingResult, subjects: Sequence[Subject], budgets: Sequence[Budget]
) -> list[DistillTarget]:
    """Return what the search found for each network, at each budget that it was trained for."""
    names = result.policy.network.config.feature_names
    return [
        DistillTarget(
            graph=subject.graph,
            node_features=subject.features(budget, names),
            context=first_context(budget),
            budget=budget,
            scores=subject.scores(result.policy, budget, budget) + result.offsets[number],
        )
        for number, subject in enumerate(subjects)
        for budget in budgets
    ]


def _policy_masks(
    result: TrainingResult, task: PruningTask, subject: Subject, number: int
) -> list[tuple[int, str]]:
    """Return the policy's own masks: networks run before, bits; empty if it takes more steps."""
    pair = pair_name(task.name, task.budget)
    networks = [0, *(int(record["networks"]) for record in result.history)]
    masks = [
        (before, bits)
        for before, record in zip(networks, result.history, strict=False)
        if (bits := record["greedy_masks"].get(pair))
    ]
    if not masks:
        return []
    last = subject.mask(result.policy, task.budget, result.offsets[number])
    return [*masks, (networks[-1], pack_bits(last.keep))]
