"""Jobs that let methods choose masks, each on its own count of networks; the controls."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from prunegraph.artefacts.masked import StoredMask
from prunegraph.core.console import Console
from prunegraph.core.errors import BudgetError
from prunegraph.core.user_code import is_factory
from prunegraph.core.weight_mask import WeightMask
from prunegraph.evaluation.log import OutcomeLog
from prunegraph.graph import unwrap
from prunegraph.layerwise.recalibrate import has_batch_norm, recalibrate_bn
from prunegraph.methods.method import Method, Result
from prunegraph.methods.registry import (
    CONTROL_CRITERIA,
    OTHERS,
    baseline_names,
    control_widths,
    make_method,
    unknown_method,
)
from prunegraph.runs.agent_search import sampler_method, search_job
from prunegraph.runs.context import Mask, RunContext
from prunegraph.runs.finetune import save_network
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.config import PruningOptions, SearchOptions
from prunegraph.runs.options.fields import with_options
from prunegraph.runs.options.methods import check_named, options_of
from prunegraph.runs.options.tasks import TaskOptions
from prunegraph.runs.parallel.jobs import Batch, Workplace
from prunegraph.runs.plan import Plan, searches
from prunegraph.runs.report.verdict import SAMPLER, is_rival
from prunegraph.runs.store import Candidate, CandidateStore, add_found
from prunegraph.tasks.classification import BATCH_SIZE


def method_of(options: PruningOptions, name: str) -> Method:
    """Return a method with what ``--METHOD.FIELD`` says of it."""
    given = options.method_options if isinstance(options, TaskOptions) else ()
    return with_options(make_method(name), options_of(given, name))


def check_names(names: Sequence[str]) -> None:
    """Raise ConfigError for a name that no method has, or that needs what is not installed."""
    others = [name for name, make in OTHERS.items() if make().role == "baseline"]
    valid = tuple(dict.fromkeys((*baseline_names(), SAMPLER, *others)))
    unknown = [name for name in names if name not in valid and not is_factory(name)]
    if unknown:
        raise unknown_method(unknown[0], valid)


def check_methods(plan: Plan, context: RunContext, networks: int) -> None:
    """Raise an error if a method cannot serve the network, the budget or so many networks."""
    if isinstance(context.options, TaskOptions):
        check_named(context.options.method_options, plan.methods)
    for name in plan.methods:
        if name != SAMPLER:
            method_of(context.options, name).check(context.untimed_problem(networks))


def method_batches(
    plan: Plan, stores: Sequence[CandidateStore], networks: int, options: SearchOptions | None
) -> list[Batch]:
    """Return what lets methods choose masks; those that the stores have are not asked again.

    Args:
        plan: which methods and seeds.
        stores: where each network's candidates are kept.
        networks: that each of them may run.
        options: how the agent searches, whose sampler may be among them.
    """
    planned = [
        (number, name, seed, networks)
        for number in range(len(stores))
        for name, seed in plan.choices()
    ]
    missing = [item for item in planned if stores[item[0]].get(item[1], item[2]) is None]
    missing.sort(key=lambda item: not searches(item[1]))  # the long ones first
    methods = Batch(
        label="baselines",
        job=method_job,
        arguments=missing,
        keep=lambda values, candidate: stores[values[0]].add(candidate),
        planned=len(planned),
        networks=lambda values: values[3] if searches(values[1]) else 1,
    )
    if options is None or SAMPLER not in plan.methods:
        return [methods]
    return [methods, _sampler_batch(stores, options, plan.seeds)]


def method_job(place: Workplace, number: int, name: str, seed: int, networks: int) -> Candidate:
    """Let a method choose a mask of network ``number``: a job. An interrupted search goes on."""
    context, folder = place.contexts[number], place.folders[number]
    method = method_of(context.options, name)
    if not searches(name):
        return run_method(context, folder, method, seed=seed, networks=networks)
    log = OutcomeLog(folder.outcomes(name, seed))
    with place.console.progress(f"search {name}, seed {seed}", networks) as report:
        return run_method(
            context, folder, method, seed=seed, networks=networks, log=log, progress=report
        )


def run_method(
    context: RunContext,
    folder: RunFolder,
    method: Method,
    *,
    seed: int,
    networks: int,
    counted: int = 0,
    log: OutcomeLog | None = None,
    progress: Callable[..., None] | None = None,
) -> Candidate:
    """Return the mask that a method chooses, measured on the whole search split.

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
    started = time.monotonic()
    problem = context.problem(seed=seed, max_networks=networks, log=log, progress=progress)
    if method.kind == "weights":
        result = method.prune(problem)
        mask: Mask = store_network(context, folder.chosen(method.name, seed), result)
        recalled = 0.0
    else:
        with problem.evaluator.watched(progress):
            result = method.prune(problem)
        mask, recalled = result.channels, problem.evaluator.recalled
    return Candidate(
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


def store_network(context: RunContext, where: Path, result: Result) -> StoredMask:
    """Write the network in which a method has put zeros, its batch norm recalibrated."""
    task, mask = context.target.task, result.mask
    assert isinstance(mask, WeightMask)
    model = mask.apply(unwrap(task.model)) if result.model is None else unwrap(result.model)
    mask.check_zeros(model)
    if has_batch_norm(model):
        samples = task.train.sample(context.options.calibration_images, context.seed)
        batches = list(task.batches(samples, BATCH_SIZE))
        whole = batches[:-1] or batches  # each batch counts alike
        recalibrate_bn(model, whole, forward=task.forward, autocast=task.autocast)
    save_network(context.target, where, model, mask)
    return StoredMask(where=where, name=mask.digest(), sparsity=mask.sparsity)


def add_optional(place: Workplace, store: CandidateStore, plan: Plan, console: Console) -> None:
    """Add rows of heuristics beside an applied policy; those that miss a latency are left out."""
    for name, seed in plan.choices():
        if store.get(name, seed) is not None:
            continue
        try:
            store.add(method_job(place, 0, name, seed, 0))
        except BudgetError as error:
            if not plan.optional:
                raise
            console.say(f"no row of {name}: {error}")


def add_controls(
    context: RunContext,
    folder: RunFolder,
    store: CandidateStore,
    agent: Sequence[Candidate],
    console: Console,
) -> None:
    """Add what L1 and chance choose at the widths of the agent's masks."""
    pairs = [(candidate, criterion) for candidate in agent for criterion in CONTROL_CRITERIA]
    with console.progress("controls", len(pairs)) as report:
        for number, (candidate, criterion) in enumerate(pairs, start=1):
            widths = context.target.graph.group_widths(candidate.channels)
            method = control_widths(criterion, widths)
            if store.get(method.name, candidate.seed) is None:
                count, seed = candidate.networks_evaluated, candidate.seed
                store.add(run_method(context, folder, method, seed=seed, networks=0, counted=count))
            report(number)


def warn_if_worse(
    context: RunContext, rows: Sequence[Candidate], own: Candidate, console: Console
) -> None:
    """Say so if a method is clearly better on the search images than what was chosen.

    Clearly: by two standard errors of the difference of two shares of so many images.
    """
    rivals = [row for row in rows if is_rival(row)]
    best = max(rivals, key=lambda row: row.search_accuracy, default=own)
    share, search = best.search_accuracy, context.target.task.search
    if context.target.task.score_name != "accuracy" or search is None:
        return
    error = math.sqrt(2.0 * share * (1.0 - share) / len(search))
    if share - own.search_accuracy > 2.0 * error:
        console.say(
            f"warning: {best.name} keeps {share:.1%} on the search images, {own.name} "
            f"{own.search_accuracy:.1%}: it does not fit {context.target.arch} as it is; "
            "`prunegraph train` with more --networks searches on, from this one with --policy"
        )


def _sampler_batch(
    stores: Sequence[CandidateStore], options: SearchOptions, seeds: Sequence[int]
) -> Batch:
    """Return what finds the best of N that the agent draws: nothing learns, nothing is planned."""
    return Batch(
        label="searches of the sampler",
        job=search_job,
        arguments=[
            (sampler_method(options), SAMPLER, options.networks, seed)
            for seed in seeds
            if any(store.get(SAMPLER, seed) is None for store in stores)
        ],
        keep=lambda _, run: add_found(stores, run.candidates),
        planned=len(seeds),
        networks=lambda _: options.networks,
        searches=True,
    )
