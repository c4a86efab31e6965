"""Search with the agent: train its policy on pruned networks, choose a mask for each network."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from prunegraph.agent.distill import DistillTarget, distill, num_steps
from prunegraph.agent.policies import TrainedPolicy, save_policy
from prunegraph.agent.train import AgentConfig, TrainingResult, train_agent
from prunegraph.core.budget import Budget
from prunegraph.core.console import Console, Report
from prunegraph.core.masks import ChannelMask, FloatArray
from prunegraph.core.outcome import Outcome
from prunegraph.core.reading import checked
from prunegraph.env import ChannelPruningEnv, PruningTask, cell_name
from prunegraph.evaluation.pool import Pool, PooledEvaluator, SearchEvaluator, num_threads
from prunegraph.graph.pyg import to_pyg
from prunegraph.methods.method import Role
from prunegraph.rewards import unpack_bits
from prunegraph.runs.adapt import adapt_contexts, first_context
from prunegraph.runs.agent_options import (
    agent_config,
    env_config,
    given_policy,
    num_probes,
    trained_budgets,
)
from prunegraph.runs.bench import Bench
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.greedy import greedy_curve
from prunegraph.runs.jobs import Workplace
from prunegraph.runs.options.config import SearchOptions
from prunegraph.runs.search_clock import SearchClock
from prunegraph.runs.store import Candidate

FINALISTS = 8
"""Masks that are scored on the whole search split at the end of a search, at the least."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchRun:
    """What one search found.

    Attributes:
        policy: the trained policy's file.
        candidates: the chosen mask of each network.
        seconds: wall time.
        evaluation_seconds: of it, inside surgery, recalibration and evaluation; that of all
            workers together, where several evaluate.
        networks_evaluated: pruned networks run, finalists and what the policy reads included.
        history: one record an update.
        greedy: for each network the curve of the policy's own masks, see ``greedy_curve``.
    """

    policy: Path
    candidates: tuple[Candidate, ...]
    seconds: float
    evaluation_seconds: float
    networks_evaluated: int
    history: tuple[Mapping[str, Any], ...]
    greedy: tuple[Mapping[str, Sequence[float]], ...]


def policy_mask(
    policy: TrainedPolicy,
    bench: Bench,
    budget: Budget,
    offsets: FloatArray | None = None,
    *,
    asked: Budget | None = None,
) -> ChannelMask:
    """Return the mask that a policy chooses: its scores projected to the budget, no search.

    Args:
        policy: the policy.
        bench: the network.
        budget: what may remain.
        offsets: ``[N]`` what a search of this very network added to the scores.
        asked: the budget that the policy is told; default: ``budget``.
    """
    graph = bench.target.graph
    features = bench.node_features(budget, policy.network.config.feature_names)
    scores = policy.logits(to_pyg(graph), features, first_context(asked or budget))
    return bench.project(scores if offsets is None else scores + offsets, budget)


def search_job(place: Workplace, options: SearchOptions, name: str, seed: int) -> SearchRun:
    """Search on a workplace's networks: a job."""
    pool = place.pool
    with num_threads(torch.get_num_threads() if pool is None else pool.threads):
        return search(
            place.benches,
            options,
            name=name,
            seed=seed,
            folder=place.folders[0],
            console=place.console,
            pool=pool,
        )


def search(
    benches: Sequence[Bench],
    options: SearchOptions,
    *,
    name: str,
    seed: int,
    folder: RunFolder,
    console: Console,
    pool: Pool | None = None,
    config: AgentConfig | None = None,
) -> SearchRun:
    """Train one policy on all networks and choose a mask for each; an interrupted one resumes.

    Args:
        benches: the networks.
        options: how to search.
        name: the method's name, for rows and files.
        seed: of policy, episodes, image subsets and of what is measured of the dense networks.
        folder: the run folder, for checkpoints and learning curves.
        console: where progress goes.
        pool: evaluates the episodes of an update at once; None = this process, one by one. The
            result is the same.
        config: the agent's options, its seed among them; default: those of ``agent_config``.
    """
    label, given = _label(name, seed), given_policy(options)
    clock = _clock(folder, label)
    benches = [bench.with_statistics(seed) for bench in benches]
    budgets = trained_budgets(options, benches[0].budget)
    config = config or agent_config(options, seed, given, budgets)
    assert config.seed == seed
    initial = None
    if given is not None:
        adapted, benches = adapt_contexts(given, benches, budgets)
        initial = adapted.policy
    tables = _tables(benches, config, pool)
    result = _train(
        benches,
        options,
        tables,
        config,
        name=name,
        folder=folder,
        console=console,
        clock=clock,
        initial=initial,
    )
    tasks, evaluators = tables[0].tasks, [item for table in tables for item in table.evaluators]
    networks = result.networks_evaluated + len(benches) * num_probes(options, benches[0].budget)
    unused = options.networks * len(benches) - networks
    finalists = [
        _finalists(result, bench, task, number, max(unused // len(benches), FINALISTS), options)
        for number, (bench, task) in enumerate(zip(benches, tasks, strict=True))
    ]
    before = sum(evaluator.num_networks for evaluator in tables[0].evaluators)
    role: Role = "agent" if options.agent.learning_rate else "baseline"  # which learns nothing
    chosen = []
    with console.progress(f"finalists of {name}, seed {seed}", sum(map(len, finalists))) as report:
        for masks, evaluator in zip(finalists, tables[0].evaluators, strict=True):
            chosen.append(_best(name, role, seed, masks, evaluator))
            report(sum(map(len, finalists[: len(chosen)])))
    networks += sum(evaluator.num_networks for evaluator in tables[0].evaluators) - before
    seconds, evaluation_seconds = clock.read(evaluators)
    path = folder.checkpoint(f"policy-{label}.safetensors")
    steps = options.agent.distill_steps * options.networks if options.agent.learning_rate else 0
    distill_targets = found_distill_targets(result, benches, options)
    with console.progress(
        f"teach the policy, seed {seed}", num_steps(distill_targets, steps)
    ) as report:
        taught = distill(
            result.policy, distill_targets, steps=steps, seed=seed, initial=given, progress=report
        )
    origin = _origin(benches, options, seed, given)
    save_policy(path, TrainedPolicy(taught.network, {**taught.record, **origin}))
    return SearchRun(
        policy=path,
        candidates=tuple(
            replace(candidate, networks_evaluated=networks, seconds=seconds) for candidate in chosen
        ),
        seconds=seconds,
        evaluation_seconds=evaluation_seconds,
        networks_evaluated=networks,
        history=result.history,
        greedy=tuple(
            greedy_curve(
                result.history,
                cell_name(task.name, task.budget),
                policy_mask(result.policy, bench, bench.budget, result.offsets[number]),
                bench,
            )
            for number, (bench, task) in enumerate(zip(benches, tasks, strict=True))
        ),
    )


def _origin(
    benches: Sequence[Bench], options: SearchOptions, seed: int, initial: TrainedPolicy | None
) -> dict[str, Any]:
    """Return what a policy's record tells of where it comes from."""
    budgets = trained_budgets(options, benches[0].budget)
    return {
        "trained_on": [bench.target.arch for bench in benches],
        "data": {
            "name": benches[0].target.dataset.name,
            "search": benches[0].target.dataset.search.fingerprint(),
        },
        "budgets": [budget.as_dict() for budget in budgets],
        "seed": seed,
        "initial": None if initial is None else dict(initial.record),
    }


def _label(name: str, seed: int) -> str:
    return f"{name.replace('/', '-')}-{seed}"


def _clock(folder: RunFolder, label: str) -> SearchClock:
    return SearchClock(folder.checkpoint(f"search-{label}.json"))


def _train(
    benches: Sequence[Bench],
    options: SearchOptions,
    tables: Sequence["_Table"],
    config: AgentConfig,
    *,
    name: str,
    folder: RunFolder,
    console: Console,
    clock: SearchClock,
    initial: TrainedPolicy | None,
) -> TrainingResult:
    """Train the policy until the networks are used up, finalists to come left out."""
    label = _label(name, config.seed)
    evaluators = [item for table in tables for item in table.evaluators]
    budget = benches[0].budget
    allowed = (options.networks - FINALISTS - num_probes(options, budget)) * len(benches)
    config = replace(config, max_memory=budget.max_memory, max_latency=budget.max_latency)
    environment = env_config(options, config, config.seed, budget)
    with console.progress(f"search {name}, seed {config.seed}", allowed) as report:
        result = train_agent(
            [
                partial(
                    ChannelPruningEnv,
                    table.tasks,
                    replace(environment, first_episode=number, episode_stride=len(tables)),
                )
                for number, table in enumerate(tables)
            ],
            [bench.target.graph for bench in benches],
            config,
            total_networks=allowed,
            threads=len(tables) > 1,
            initial=initial,
            checkpoint=folder.checkpoint(f"search-{label}.safetensors"),
            memory=_Memory(tables[0].evaluators),
            tensorboard=folder.file(f"events/{label}"),
            progress=partial(_show, report, clock, evaluators),
        )
        report(allowed, "done")
    return result


def found_distill_targets(
    result: TrainingResult, benches: Sequence[Bench], options: SearchOptions
) -> list[DistillTarget]:
    """Return what the search found for each network, at each budget that it was trained for."""
    distill_targets = []
    for number, bench in enumerate(benches):
        graph = bench.target.graph
        for budget in trained_budgets(options, bench.budget):
            features = bench.node_features(budget, result.policy.network.config.feature_names)
            context = first_context(budget)
            distill_targets.append(
                DistillTarget(
                    graph=graph,
                    node_features=features,
                    context=context,
                    budget=budget,
                    scores=result.policy.logits(to_pyg(graph), features, context)
                    + result.offsets[number],
                )
            )
    return distill_targets


@dataclass(frozen=True, eq=False, kw_only=True)
class _Table:
    """What one environment plays on: each network with an evaluator of its own."""

    tasks: list[PruningTask]
    evaluators: list[SearchEvaluator]


@dataclass(frozen=True, eq=False)
class _Memory:
    """Outcomes on subsets that hold all search images: their masks are not run again.

    Args:
        evaluators: one for each network.
    """

    evaluators: Sequence[SearchEvaluator]

    def state(self) -> list[list[dict[str, Any]]]:
        """Return them as JSON values."""
        return [[asdict(found) for found in item.known()] for item in self.evaluators]

    def restore(self, state: Any) -> None:
        """Know them again."""
        known = checked(state, list[list[Outcome]], "its memory")
        for evaluator, outcomes in zip(self.evaluators, known, strict=True):
            evaluator.remember(outcomes)


def _tables(benches: Sequence[Bench], config: AgentConfig, pool: Pool | None) -> list[_Table]:
    """Return one table for this process alone, or one for each episode of an update."""
    names = config.network.feature_names
    features = [cache(partial(bench.node_features, names=names)) for bench in benches]
    evaluators: list[list[SearchEvaluator]]
    if pool is None or config.per_group:  # whose steps come one after another
        evaluators = [[bench.evaluator() for bench in benches]]
    else:
        shared = [PooledEvaluator(b.evaluator(), pool, n) for n, b in enumerate(benches)]
        evaluators = [[e.beside() for e in shared] for _ in range(config.episodes_per_update)]
    return [
        _Table(
            tasks=[
                PruningTask(
                    name=f"{number}:{bench.target.arch}",
                    graph=bench.target.graph,
                    node_features=features[number],
                    evaluator=row[number],
                    budget=bench.budget,
                )
                for number, bench in enumerate(benches)
            ],
            evaluators=row,
        )
        for row in evaluators
    ]


def _show(
    report: Report,
    clock: SearchClock,
    evaluators: Sequence[SearchEvaluator],
    record: Mapping[str, Any],
) -> None:
    clock.write(evaluators)
    report(int(record["networks"]), f"mean accuracy {record['accuracy']:.3f}")


def _finalists(
    result: TrainingResult,
    bench: Bench,
    task: PruningTask,
    number: int,
    places: int,
    options: SearchOptions,
) -> list[ChannelMask]:
    """Return what may win: the masks of the last and first policy, the best so far, likely ones.

    If the search had other budgets than the run, no mask was run at this one: the start's, and what
    the last policy wants under each of the others, as far as it fits.
    """
    graph, cell = task.graph, cell_name(task.name, task.budget)
    budgets = trained_budgets(options, task.budget)
    offsets = result.offsets[number]
    masks = [policy_mask(result.policy, bench, task.budget, offsets)]
    if task.budget not in budgets:
        masks.append(bench.project(bench.priors(task.budget)[0].scores, task.budget))
        masks += [
            policy_mask(result.policy, bench, task.budget, offsets, asked=asked)
            for asked in budgets
        ]
    own = [bits for record in result.history if (bits := record["greedy_masks"].get(cell))]
    best = result.competition.ledger(cell).best_bits
    kept = [unpack_bits(bits, graph.num_units) for bits in (*own[:1], best) if bits]
    kept += result.surrogate.promising(number, graph.limits(task.budget), places)
    kept += [unpack_bits(bits, graph.num_units) for bits in reversed(own)]
    masks += [graph.mask(keep) for keep in kept]
    fitting = [mask for mask in masks if graph.fits(mask, bench.budget)]  # not all were repaired
    return list(dict.fromkeys(fitting))[:places]


def _best(
    name: str, role: Role, seed: int, masks: Sequence[ChannelMask], evaluator: SearchEvaluator
) -> Candidate:
    """Return the mask with the best outcome on the whole search split; of equal ones the first."""
    outcomes = evaluator.evaluate_all(masks)
    chosen = max(range(len(masks)), key=lambda number: outcomes[number].rank)
    return Candidate(
        name=name,
        role=role,
        searches=True,
        seed=seed,
        mask=masks[chosen],
        networks_evaluated=0,  # not counted yet
        search_accuracy=outcomes[chosen].accuracy,
    )
