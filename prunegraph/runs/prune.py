"""Pruning in one call: any task, any method."""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunegraph.agent.options import AgentOptions
from prunegraph.core.budget import Budget
from prunegraph.core.console import Told, shown
from prunegraph.core.errors import ConfigError, ModelError
from prunegraph.core.masks import ChannelMask, Float64Array
from prunegraph.core.memory import return_freed_memory
from prunegraph.core.task import Task, with_parts
from prunegraph.core.tensors import parameter_digest
from prunegraph.core.weight_mask import WeightMask
from prunegraph.evaluation.log import OutcomeLog
from prunegraph.graph import AttentionUnit, StructureGraph, analyse, unwrap
from prunegraph.graph.apply import unequal
from prunegraph.graph.costs.clock import measure_latency
from prunegraph.graph.costs.latency_budget import TOLERANCE
from prunegraph.layerwise.recalibrate import recalibrate_on
from prunegraph.layerwise.reconstruct import Reconstruction, drawn_samples
from prunegraph.layerwise.room import most_fitted
from prunegraph.layerwise.sequential import LayerwiseReconstruction
from prunegraph.layerwise.weights import few_reached
from prunegraph.methods.context import Context
from prunegraph.methods.criteria.registry import find_criterion, importance
from prunegraph.methods.custom import as_method
from prunegraph.methods.method import Method, Problem, Result
from prunegraph.methods.registry import make_method
from prunegraph.runs.gradual import (
    Between,
    Schedule,
    budgets_of,
    check_joined,
    dense_units,
    joined,
    narrow_alike,
    of_what_is_left,
    train_between,
)
from prunegraph.runs.predicted_latency import layer_times
from prunegraph.runs.prepare import prunable_structure
from prunegraph.runs.report.speed import latencies
from prunegraph.runs.result import PruneResult, scores_report, structure_report
from prunegraph.tasks.classification import model_device
from prunegraph.tasks.image_classification import image_classification
from prunegraph.tasks.images import Images

OUTCOMES, PRIORS, LATENCY = "outcomes.json", "priors.json", "latency.json"
"""Files of a checkpoint."""

FITTING = 2**29
"""Bytes of activations of the batch that the final network is fitted on."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Way:
    """How each step is made.

    Attributes:
        method: what chooses.
        networks: pruned networks that it may run.
        seed: fixes every random choice.
        reconstruct: whether the kept weights make up for the removed units.
        attention: what can leave it.
        progress: called with the number of networks run.
    """

    method: Method
    networks: int
    seed: int
    reconstruct: bool
    attention: AttentionUnit
    progress: Told | None


def prune(
    task: Task | nn.Module,
    method: str | Method | object,
    budget: Budget,
    *,
    data: Images | None = None,
    exclude: Sequence[str] = (),
    keep_at_least: Mapping[str, float] | None = None,
    steps: int = 1,
    schedule: Schedule = "cubic",
    between: Between = None,
    networks: int = 400,
    seed: int = 0,
    checkpoint: Path | str | None = None,
    reconstruct: bool = True,
    attention: AttentionUnit = "head",
    progress: Told | bool = True,
) -> PruneResult:
    """Prune a network by any method.

    A classifier of images may come with a plain loader, as ``data=``. Its first 1,024 images are
    the train split, its further ones the search split, on which masks and results are scored. There
    is no test split: if the network was trained on these images, the scores are too good. Make a
    task (``prunegraph.tasks``) to say which images are which.

    Args:
        task: the trained network, which stays as it is, its data, and what counts as good
            (``prunegraph.tasks``); or a classifier of images, with ``data``.
        method: a name, such as ``"taylor/global"``, ``"cem"``, ``"agent"`` or
            ``"policy:resnet-cifar"``, or a ``Method``.
        budget: what may remain.
        data: of a classifier that is no task: ``(images, labels)``, or a loader of such batches;
            without labels the network's own answers are used.
        exclude: names or globs of modules whose weights keep their shapes (``["layer1.*"]``).
        keep_at_least: from names or globs of modules to the share of their channels, those that
            they read too, that stays at least (``{"layer4.*": 0.8}``).
        steps: in how many steps; each prunes what the one before has left, by scores of its own.
            Depth, and a latency with a method that searches, are met in one.
        schedule: how much goes in which step: ``"cubic"``, most at first, or ``"linear"``.
        between: between two steps: a function of the network and the step, from 1, which may train
            it in place, or a ``FinetuneConfig``. Nothing follows the last step.
        networks: pruned networks that a method which searches may run, in each step.
        seed: fixes every random choice.
        checkpoint: folder from which an interrupted search goes on. That of another network,
            method, budget, seed or other data is refused; what a loss and a score of one's own
            compute it cannot tell.
        reconstruct: the kept weights make up for the removed units, by least squares on
            train data; those of the final network layer by layer, if it is better then.
        attention: what can leave it: "head", a whole one, or "width", a part of all of them.
        progress: True shows it on a terminal; a function is called with the number of networks run,
            by methods of single weights with the percent done, and what the method says of itself.

    Returns:
        The pruned, recalibrated network, its mask, and a report.

    Raises:
        PruneGraphError: the network cannot be analysed, the budget cannot be met, the data do not
            fit, a pattern of modules matches none, or the method cannot serve the task: before any
            work.
    """
    given: object = budget
    if not isinstance(given, Budget):
        msg = f"budget={given!r} is no Budget: give one, as pg.Budget(keep_macs=0.5)"
        raise ConfigError(msg)
    task = _task_of(task, data)
    chosen = as_method(make_method(method) if isinstance(method, str) else method)
    _check_precision(task)
    checkpoint = None if checkpoint is None else Path(checkpoint)
    if chosen.kind == "weights":
        if exclude or keep_at_least or steps != 1:
            msg = f"{chosen.name} removes no channels: leave exclude, keep_at_least and steps out"
            raise ConfigError(msg)
        context = Context(task=task, structure=None, seed=seed, reconstruct=False)
        with shown(progress, chosen.name, None) as report:
            problem = context.problem(budget, folder=checkpoint, progress=report)
            return _prune_weights(chosen, problem)
    budget.check_channels()
    with shown(progress, chosen.name, networks * steps * chosen.searches) as report:
        graph = prunable_structure(
            task.model,
            task.example_inputs,
            budget,
            attention=attention,
            exclude=exclude,
            keep_at_least=keep_at_least,
        )
        way = _Way(
            method=chosen,
            networks=networks,
            seed=seed,
            reconstruct=reconstruct,
            attention=attention,
            progress=report,
        )
        timed = steps > 1 and budget.max_latency is not None and not chosen.searches
        latency = measure_latency(unwrap(task.model), task.example_inputs).least if timed else None
        limits = budgets_of(graph, budget, steps, schedule, latency)
        return _in_steps(way, task, graph, limits, between, checkpoint)


def scores(
    task: Task | nn.Module,
    graph: StructureGraph,
    criterion: str,
    data: Images | None = None,
    *,
    seed: int = 0,
) -> Float64Array:
    """Return how important each prunable unit is by a published criterion.

    Args:
        task: the trained network and its data, or a classifier of images with ``data``.
        graph: its structure (``analyse``).
        criterion: its name, as ``"taylor"``: the first half of a heuristic's.
        data: see ``prune``; only its train split is used.
        seed: fixes which samples are drawn, and what is left to chance.

    Returns:
        ``[N]``, higher = keep; ``graph.project`` makes a mask of them.

    Raises:
        PruneGraphError: there is no such criterion, or the data do not fit.
    """
    find_criterion(criterion)
    context = Context(task=_task_of(task, data), structure=graph, seed=seed)
    return importance(criterion, context.statistics, graph.num_units, seed)


def _task_of(task: Task | nn.Module, data: Images | None) -> Task:
    """Return a task as it is, and that of a classifier of images with its data.

    Raises:
        ConfigError: data are missing, or given twice.
    """
    if not isinstance(task, nn.Module):
        if data is not None:
            msg = "data is of a network that comes without a task, which has its own: drop data"
            raise ConfigError(msg)
        return task
    if data is None:
        msg = (
            f"{type(task).__name__} comes without data: give data=, a loader of (images, labels), "
            "or a task of prunegraph.tasks in its place"
        )
        raise ConfigError(msg)
    return image_classification(task, train=data, name=type(unwrap(task)).__name__)


def _in_steps(
    way: _Way,
    task: Task,
    graph: StructureGraph,
    limits: Sequence[Budget],
    between: Between,
    checkpoint: Path | None,
) -> PruneResult:
    """Prune a network to one budget after the other, and report on the last."""
    mask, units, left, now, ran = (
        graph.dense_mask(),
        np.arange(graph.num_units),
        graph,
        task,
        0,
    )
    for step, limit in enumerate(limits, start=1):
        folder = checkpoint
        if len(limits) > 1 and checkpoint is not None:
            folder = checkpoint / f"step{step}"
        if step > 1:
            train_between(between, now.model, task, step - 1, way.seed)
            left = analyse(now.model, task.example_inputs, attention=way.attention)
            units = dense_units(graph, mask, left)
            left = narrow_alike(graph, left, units)
            limit = of_what_is_left(limit, graph, left)
        problem, result = _chosen(way, now, left, limit, folder)
        if step == 1:
            graph = problem.graph  # with a prediction of its latency, if it was asked for
        now = with_parts(task, model=_network(way, problem, result))
        mask = joined(graph, mask, units, result.channels)
        ran += result.networks
    check_joined(graph, mask, now.model)
    return _finished(way, task, graph, mask, limits[-1], replace(result, networks=ran), now.model)


def _chosen(
    way: _Way, task: Task, graph: StructureGraph, budget: Budget, checkpoint: Path | None
) -> tuple[Problem, Result]:
    """Let the method choose what stays; return what it was given too."""
    chosen, options = way.method, _agent_options(way.method) or AgentOptions()
    context = Context(
        task=task,
        structure=graph,
        seed=way.seed,
        reconstruct=way.reconstruct,
        layer_by_layer=False,  # the final network alone
        metric=options.metric,
        subset_size=options.subset,
    )
    chosen.check(context.untimed_problem(budget, way.networks))
    logs: list[OutcomeLog] = []
    if checkpoint is not None:
        identity = _identity(way, task, graph, budget)
        logs = [OutcomeLog(checkpoint / name, identity) for name in (OUTCOMES, PRIORS)]
        context = replace(context, unlabelled_log=logs[1])
    if budget.max_latency is not None and chosen.searches:
        context = replace(context, structure=_predicting(task, graph, budget, checkpoint))
    problem = context.problem(
        budget,
        max_networks=way.networks,
        log=logs[0] if logs else None,
        folder=checkpoint,
        progress=way.progress,
    )
    try:
        return problem, chosen.prune(problem)
    finally:  # an interrupted search goes on from its last network
        for log in logs:
            log.write()


def _check_precision(task: Task) -> None:
    """Raise ModelError for weights that gradients cannot be measured in."""
    on_cpu = model_device(task.model).type == "cpu"
    if on_cpu and any(item.dtype == torch.float16 for item in task.model.parameters()):
        msg = "the network's weights are float16, which a CPU does not train: give model.float()"
        raise ModelError(msg)


def _agent_options(method: Method) -> AgentOptions | None:
    """Return how a search of the agent goes; None of other methods."""
    options = getattr(method, "options", None)
    return options if isinstance(options, AgentOptions) else None


def _prune_weights(method: Method, problem: Problem) -> PruneResult:
    """Return the network with zeros where a method of single weights keeps nothing."""
    task, budget = problem.task, problem.budget
    method.check(problem)
    if told := few_reached(unwrap(task.model)):
        warnings.warn(told, stacklevel=3)
    result = method.prune(problem)
    assert isinstance(result.mask, WeightMask)
    small = result.mask.apply(unwrap(task.model)) if result.model is None else result.model
    recalibrate_on(small, task, problem.calibration)
    report = {
        **scores_report(task, small.eval()),
        "budget": budget.as_dict(),
        "method": method.name,
        "networks_evaluated": result.networks,
        **result.details,
    }
    params = sum(parameter.numel() for parameter in small.parameters())
    report["pruned"] |= {
        "sparsity": result.mask.sparsity,
        "network_sparsity": result.mask.sparsity * result.mask.size / params,
        "mask_digest": result.mask.digest(),
    }
    return PruneResult(model=small.eval(), mask=result.mask, graph=None, report=report, task=task)


def _network(way: _Way, problem: Problem, result: Result) -> nn.Module:
    """Return the network of a mask."""
    task, graph, mask = problem.task, problem.graph, result.channels
    odd = unequal(task.model, graph, mask, task.example_inputs)
    if odd is not None:
        warnings.warn(odd, stacklevel=4)
    if result.model is not None:
        return result.model.eval()
    ways = _layer_by_layer(problem) if way.reconstruct else []
    return problem.unlabelled.nearest(mask, *ways).eval()


def _finished(
    way: _Way,
    task: Task,
    graph: StructureGraph,
    mask: ChannelMask,
    budget: Budget,
    result: Result,
    small: nn.Module,
) -> PruneResult:
    """Return a network with its report."""
    report = structure_report(graph, mask, budget)
    for name, found in scores_report(task, small).items():
        report[name] = report[name] | found if isinstance(found, dict) else found
    report |= {"method": way.method.name, "networks_evaluated": result.networks, **result.details}
    if budget.max_latency is not None:
        report["latency_ms"] = times = latencies(task.model, graph, mask, task.example_inputs)
        _warn_if_slow(times, budget.max_latency)
    return PruneResult(model=small, mask=mask, graph=graph, report=report, task=task)


def _layer_by_layer(problem: Problem) -> list[Callable[[], Reconstruction]]:
    """Return what fits layer by layer: on as many samples as memory allows, on the first batch.

    Where the score decides which network is taken, all ready batches may be fitted on.
    """
    task, graph, seed = problem.task, problem.graph, problem.seed
    most = most_fitted(task, graph, memory=FITTING)
    last = task.train.take(torch.tensor([len(task.train) - 1]))

    def fit(size: int) -> Reconstruction:
        return_freed_memory()
        samples, others = drawn_samples(task.train, size, seed)
        return LayerwiseReconstruction.on_samples(
            task, graph, samples, held_out=others or last, seed=seed
        )

    return [partial(fit, most), *([partial(fit, 1)] if task.search is None else [])]


def _warn_if_slow(times: Mapping[str, Any], limit: float) -> None:
    if times["pruned"] > TOLERANCE * limit:
        warnings.warn(
            f"the pruned network takes {times['pruned']:.3g} ms on {times['on']}, "
            f"{limit:g} were asked for: the prediction was too low, or the "
            "machine does more now; ask for less",
            stacklevel=4,
        )


def _identity(way: _Way, task: Task, graph: StructureGraph, budget: Budget) -> dict[str, Any]:
    """Return what names a search, as JSON values."""
    agent: Any = None if _agent_options(way.method) is None else way.method
    given = None if agent is None else agent.initial
    kept = [(group.frozen is None, group.min_keep) for group in graph.groups]
    return {
        "network": parameter_digest(unwrap(task.model)),
        "method": way.method.name,
        "options": None if agent is None else repr((agent.options, agent.shares)),
        "policy": None if given is None else parameter_digest(given.network),
        "budget": budget.as_dict(),
        "seed": way.seed,
        "attention": graph.attention,
        "kept": hashlib.sha256(repr(kept).encode()).hexdigest()[:16],
        "reconstruct": way.reconstruct,
        "train": task.train.fingerprint(),
        "search": None if task.search is None else task.search.fingerprint(),
    }


def _predicting(
    task: Task, graph: StructureGraph, budget: Budget, checkpoint: Path | None
) -> StructureGraph:
    """Return the structure with a prediction of its latency; the same after an interruption."""
    path = None if checkpoint is None else checkpoint / LATENCY
    table = layer_times(
        unwrap(task.model), graph, budget, task.example_inputs, path=path, name=task.name
    )
    return replace(graph, latency_model=table)
