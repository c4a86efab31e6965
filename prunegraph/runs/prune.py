"""Pruning in one call: any task, any method."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunegraph.agent.method import AgentSearch
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ModelError
from prunegraph.core.masks import ChannelMask
from prunegraph.core.memory import return_freed_memory
from prunegraph.core.task import Task
from prunegraph.core.tensors import parameter_digest
from prunegraph.core.weight_mask import WeightMask
from prunegraph.evaluation.log import OutcomeLog
from prunegraph.graph import AttentionUnit, StructureGraph, analyse, unwrap
from prunegraph.graph.apply import unequal
from prunegraph.graph.costs.latency_budget import TOLERANCE
from prunegraph.graph.depth import with_depth
from prunegraph.layerwise.recalibrate import recalibrate_on
from prunegraph.layerwise.reconstruct import Reconstruction, drawn_samples
from prunegraph.layerwise.room import most_fitted
from prunegraph.layerwise.sequential import LayerwiseReconstruction
from prunegraph.methods.context import Context
from prunegraph.methods.custom import as_method
from prunegraph.methods.method import Method, Problem, Result
from prunegraph.methods.registry import make_method
from prunegraph.models import within_config
from prunegraph.rewards.config import Metric
from prunegraph.runs.predicted_latency import layer_times
from prunegraph.runs.report.speed import latencies
from prunegraph.tasks.classification import model_device

OUTCOMES, PRIORS, LATENCY = "outcomes.json", "priors.json", "latency.json"
"""Files of a checkpoint."""

FITTING = 2**29
"""Bytes of activations of the batch that the final network is fitted on."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PruneResult:
    """What ``prune`` returns.

    Attributes:
        model: the pruned network in eval mode; fine-tune it next.
        mask: which prunable units, or single weights, were kept.
        graph: the structure of the dense network; None where single weights became zero.
        report: costs and scores before and after, and what the method says, as JSON values.
        task: what was pruned.
    """

    model: nn.Module
    mask: ChannelMask | WeightMask
    graph: StructureGraph | None
    report: Mapping[str, Any]
    task: Task


def prune(
    task: Task,
    method: str | Method | object,
    budget: Budget,
    *,
    networks: int = 400,
    seed: int = 0,
    checkpoint: Path | str | None = None,
    reconstruct: bool = True,
    attention: AttentionUnit = "head",
    progress: Callable[[int, str], None] | None = None,
) -> PruneResult:
    """Prune a network by any method; nothing is fine-tuned.

    Args:
        task: the trained network, which stays as it is, its data, and what counts as good
            (``prunegraph.tasks``).
        method: a name, such as ``"taylor/global"``, ``"cem"``, ``"agent"`` or
            ``"policy:resnet-cifar"``, or a ``Method``.
        budget: what may remain.
        networks: pruned networks that a method which searches may run.
        seed: fixes every random choice.
        checkpoint: folder from which an interrupted search goes on. That of another network,
            method, budget, seed or other data is refused; what a loss and a score of one's own
            compute it cannot tell.
        reconstruct: the kept weights make up for the removed units, by least squares on
            train data; those of the final network layer by layer, if it is better then.
        attention: what can leave it: "head", a whole one, or "width", a part of all of them.
        progress: called with the number of networks run, by methods of single weights with the
            percent done, and what the method says of itself.

    Returns:
        The pruned, recalibrated network, its mask, and a report.

    Raises:
        PruneGraphError: the network cannot be analysed, the budget cannot be met, the data do not
            fit, or the method cannot serve the task: before any work.
    """
    chosen = as_method(make_method(method) if isinstance(method, str) else method)
    _check_precision(task)
    checkpoint = None if checkpoint is None else Path(checkpoint)
    if chosen.kind == "weights":
        context = Context(task=task, structure=None, seed=seed, reconstruct=False)
        return _prune_weights(chosen, context.problem(budget, folder=checkpoint, progress=progress))
    budget.check_channels()
    graph = analyse(task.model, task.example_inputs, attention=attention)
    if budget.uniform:
        graph = within_config(task.model, graph)
    if budget.depth:
        graph = with_depth(task.model, graph, task.example_inputs)
    context = Context(
        task=task,
        structure=graph,
        seed=seed,
        reconstruct=reconstruct,
        layer_by_layer=False,  # the final network alone
        metric=_metric(chosen),
        subset_size=_subset(chosen),
    )
    chosen.check(context.untimed_problem(budget, networks))
    logs: list[OutcomeLog] = []
    if checkpoint is not None:
        identity = _identity(task, chosen, budget, seed, attention, reconstruct)
        logs = [OutcomeLog(checkpoint / name, identity) for name in (OUTCOMES, PRIORS)]
        context = replace(context, unlabelled_log=logs[1])
    if budget.max_latency is not None and chosen.searches:
        context = replace(context, structure=_predicting(task, graph, budget, checkpoint))
    problem = context.problem(
        budget,
        max_networks=networks,
        log=logs[0] if logs else None,
        folder=checkpoint,
        progress=progress,
    )
    try:
        result = chosen.prune(problem)
    finally:  # an interrupted search goes on from its last network
        for log in logs:
            log.write()
    return _finished(problem, chosen, result, reconstruct=reconstruct)


def _check_precision(task: Task) -> None:
    """Raise ModelError for weights that gradients cannot be measured in."""
    on_cpu = model_device(task.model).type == "cpu"
    if on_cpu and any(item.dtype == torch.float16 for item in task.model.parameters()):
        msg = "the network's weights are float16, which a CPU does not train: give model.float()"
        raise ModelError(msg)


def _metric(method: Method) -> Metric:
    """Return what searches compare: what the agent's options say, else the steadiest figure."""
    return method.options.metric if isinstance(method, AgentSearch) else "soft_accuracy"


def _subset(method: Method) -> int | None:
    return method.options.subset if isinstance(method, AgentSearch) else None


def _prune_weights(method: Method, problem: Problem) -> PruneResult:
    """Return the network with zeros where a method of single weights keeps nothing."""
    task, budget = problem.task, problem.budget
    method.check(problem)
    result = method.prune(problem)
    assert isinstance(result.mask, WeightMask)
    small = result.mask.apply(unwrap(task.model)) if result.model is None else result.model
    recalibrate_on(small, task, problem.calibration)
    report = {
        **_scores(task, small.eval()),
        "budget": budget.as_dict(),
        "method": method.name,
        "networks_evaluated": result.networks,
        **result.details,
    }
    report["pruned"] |= {
        "sparsity": result.mask.sparsity,
        "mask_digest": result.mask.digest(),
    }
    return PruneResult(model=small.eval(), mask=result.mask, graph=None, report=report, task=task)


def _finished(
    problem: Problem, method: Method, result: Result, *, reconstruct: bool
) -> PruneResult:
    """Return the network of a mask, and its report."""
    task, graph, mask = problem.task, problem.graph, result.channels
    odd = unequal(task.model, graph, mask, task.example_inputs)
    if odd is not None:
        warnings.warn(odd, stacklevel=3)
    if result.model is None:
        ways = _layer_by_layer(problem) if reconstruct else []
        small = problem.unlabelled.nearest(mask, *ways)
    else:
        small = result.model
    report = structure_report(graph, mask, problem.budget)
    for name, scores in _scores(task, small.eval()).items():
        report[name] = report[name] | scores if isinstance(scores, dict) else scores
    report |= {"method": method.name, "networks_evaluated": result.networks, **result.details}
    if problem.budget.max_latency is not None:
        report["latency_ms"] = times = latencies(task.model, graph, mask, task.example_inputs)
        _warn_if_slow(times, problem.budget.max_latency)
    return PruneResult(model=small.eval(), mask=mask, graph=graph, report=report, task=task)


def _scores(task: Task, small: nn.Module) -> dict[str, Any]:
    """Return the scores on the search split, before and after."""
    return {
        "task": task.kind,
        "score_name": task.score_name,
        "higher_is_better": task.higher_is_better,
        "dense": {"score": task.score(task.model).value},
        "pruned": {"score": task.score(small).value},
    }


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


def structure_report(graph: StructureGraph, mask: ChannelMask, budget: Budget) -> dict[str, Any]:
    """Return budget, costs and widths before and after, as JSON values."""
    cost, dense = graph.cost(mask), graph.dense_cost
    return {
        "budget": budget.as_dict(),
        "dense": {
            "macs": dense.macs,
            "params": dense.params,
            "peak_memory": graph.peak_memory(graph.dense_mask()),
        },
        "pruned": {
            "macs": cost.macs,
            "params": cost.params,
            "peak_memory": graph.peak_memory(mask),
            "widths": graph.group_widths(mask),
            "mask_digest": mask.digest(),
        },
    }


def _identity(
    task: Task,
    method: Method,
    budget: Budget,
    seed: int,
    attention: AttentionUnit,
    reconstruct: bool,
) -> dict[str, Any]:
    """Return what names a search, as JSON values."""
    agent = method if isinstance(method, AgentSearch) else None
    given = None if agent is None else agent.initial
    return {
        "network": parameter_digest(unwrap(task.model)),
        "method": method.name,
        "options": None if agent is None else repr((agent.options, agent.shares)),
        "policy": None if given is None else parameter_digest(given.network),
        "budget": budget.as_dict(),
        "seed": seed,
        "attention": attention,
        "reconstruct": reconstruct,
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
