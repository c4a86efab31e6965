"""Pruning in one call, for a network and a data loader at hand."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError, ModelError
from prunegraph.core.masks import ChannelMask
from prunegraph.core.memory import return_freed_memory
from prunegraph.core.splits import TrainSplit
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.graph import AttentionUnit, ExampleInputs, StructureGraph, analyse
from prunegraph.graph.apply import unequal
from prunegraph.graph.costs.latency import measure_latency_table
from prunegraph.graph.costs.latency_budget import project_budget
from prunegraph.layerwise.reconstruct import HELD_OUT, Reconstruction
from prunegraph.layerwise.room import most_samples
from prunegraph.layerwise.sequential import LayerwiseReconstruction
from prunegraph.methods.criteria.taylor import measure
from prunegraph.methods.prior import measure_divergence, rank_priors
from prunegraph.runs.adapt import NUM_DECISION_NETWORKS, Use, adapt, features_by_start
from prunegraph.runs.policies import find_policy
from prunegraph.runs.report.speed import latencies
from prunegraph.tasks.batches import num_samples
from prunegraph.tasks.classification import model_device
from prunegraph.tasks.image_classification import image_classification
from prunegraph.tasks.images import ImageBatch

FITTING = 2**29
"""Bytes of activations of the batch that the final network is fitted on."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PruneResult:
    """What ``prune`` returns.

    Attributes:
        model: the pruned, recalibrated network; fine-tune it next.
        mask: which prunable units were kept.
        graph: the structure of the dense network.
        report: costs before and after, widths, and what was measured, as JSON values.
    """

    model: nn.Module
    mask: ChannelMask
    graph: StructureGraph
    report: Mapping[str, Any]


def prune(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    policy: Path | str,
    calibration_data: Iterable[ImageBatch],
    keep_macs: float | None = None,
    keep_params: float | None = None,
    max_memory: int | None = None,
    max_latency: float | None = None,
    round_to: int | None = None,
    attention: AttentionUnit = "head",
    num_images: int = 1024,
    reconstruct: bool = True,
    seed: int = 0,
) -> PruneResult:
    """Prune a network with a trained policy: no search, no training.

    Args:
        model: the trained network; it is left as it is.
        example_inputs: what its forward takes.
        policy: resnet-cifar, which comes with the package; run folder of ``prunegraph train``, or a
            policy file.
        calibration_data: batches of training images ``[b, c, h, w]``, or of (images, labels
            ``[b]``), normalised and shuffled; without labels the network's own answers are used.
        keep_macs: at most this share of the multiply-adds remains.
        keep_params: at most this share of the parameters remains.
        max_memory: at most this many bytes of activations alive at once, on ``example_inputs``.
        max_latency: at most this many milliseconds a forward of ``example_inputs``, measured here.
        round_to: keep a multiple of this many channels in every group.
        attention: what can leave it: "head", a whole one, or "width", a part of all of them.
        num_images: how many images calibrate; masks are compared on as many further ones. Where
            there are fewer, some that calibrate fill up.
        reconstruct: the kept weights take over what the removed channels gave, by least squares
            on the calibration data (``Reconstruction``); those of the final network layer by layer
            (``LayerwiseReconstruction``), if its outputs are nearer to the dense network's then.
        seed: fixes what is drawn from them.

    Returns:
        The pruned network, in eval mode, and its report.

    Raises:
        PruneGraphError: the network cannot be analysed or is no classifier, the budget cannot be
            met, the policy cannot be read, or images and labels do not fit.
    """
    budget = Budget(
        keep_macs=keep_macs,
        keep_params=keep_params,
        max_memory=max_memory,
        max_latency=max_latency,
        round_to=round_to,
    )
    if num_images < 1:
        msg = f"num_images={num_images} must be at least 1"
        raise ConfigError(msg)
    trained = find_policy(Path(policy))
    graph = analyse(model, example_inputs, attention=attention)
    task = image_classification(
        model, train=calibration_data, example_inputs=example_inputs, num_images=num_images
    )
    train = task.train
    device = model_device(model)
    if device.type == "cpu" and any(item.dtype == torch.float16 for item in model.parameters()):
        msg = "the network's weights are float16, which a CPU does not train: give model.float()"
        raise ModelError(msg)
    others = TrainSplit(task.search.source, task.search.index[-HELD_OUT:])  # no label is read

    def fitted(kind: type[Reconstruction], samples: TrainSplit) -> Reconstruction:
        return kind.on_samples(task, graph, samples, held_out=others, seed=seed, device=device)

    evaluator = Evaluator(
        task,
        graph,
        num_calibration=num_images,
        seed=seed,
        device=device,
        metric="kl",
        reconstruction=fitted(Reconstruction, train) if reconstruct else None,
    )
    statistics = dict(measure(task, graph, seed=seed, device=device))
    names = trained.network.config.feature_names
    divergence = partial(measure_divergence, evaluator)
    starts = rank_priors(divergence, graph, statistics, budget)
    timed = budget.max_latency is not None
    table = measure_latency_table(model, graph, example_inputs, budget=budget) if timed else None
    use = Use(
        graph=graph,
        budget=budget,
        features=features_by_start(graph, statistics, budget, names, starts),
        project=lambda scores: project_budget(model, graph, scores, budget, example_inputs, table),
        divergence=divergence,
    )
    adapted = adapt(trained, [use])
    mask = adapted.masks[0]
    warn_if_unequal(model, graph, mask, example_inputs)
    report = {
        **structure_report(graph, mask, budget),
        "networks_evaluated": NUM_DECISION_NETWORKS,
        "start": adapted.starts[0],
        "share": adapted.share,
        "calibration_images": len(train),
    }
    if timed:
        report["latency_ms"] = latencies(model, graph, mask, example_inputs)
    if reconstruct:
        most = most_samples(graph, num_samples(example_inputs), memory=FITTING)
        return_freed_memory()
        again = fitted(LayerwiseReconstruction, train.sample(most, seed))
        small = evaluator.nearest(mask, lambda: again)
    else:
        small = evaluator.prune(mask)
    return PruneResult(model=small.eval(), mask=mask, graph=graph, report=report)


def warn_if_unequal(
    model: nn.Module, graph: StructureGraph, mask: ChannelMask, example_inputs: ExampleInputs
) -> None:
    """Warn if the pruned network computes something else than the zero-masked one."""
    problem = unequal(model, graph, mask, example_inputs)
    if problem is not None:
        warnings.warn(problem, stacklevel=3)


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
