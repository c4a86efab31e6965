"""Measured arrays, one value a prunable unit: what features and heuristics are made of."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunegraph.core.errors import ModelError
from prunegraph.core.masks import ChannelMask, Float64Array, FloatArray
from prunegraph.core.splits import SearchSplit, TrainSplit
from prunegraph.core.task import Task
from prunegraph.evaluation.evaluator import QUICK_CALIBRATION, Evaluator
from prunegraph.graph import StructureGraph
from prunegraph.graph.features import rank_in_group
from prunegraph.layerwise.capture import Read, readable_copy, reads
from prunegraph.layerwise.reconstruct import Reconstruction
from prunegraph.methods.criteria.weights import filter_statistics
from prunegraph.tasks.batches import num_samples
from prunegraph.tasks.classification import model_device

STATISTIC_NAMES: tuple[str, ...] = (
    "taylor",
    "l1",
    "l2",
    "bn_scale",
    "fpgm",
    "lamp",
    "activation_mean",
    "apoz",
    "twin_similarity",
    "twin_rank",
)
"""What ``measure`` returns; ``"sensitivity"`` is measured apart, since it runs networks."""

UNLABELLED_SAMPLES = 2048
"""Train samples that ``unlabelled_evaluator`` compares pruned and dense outputs on."""


class Effects:
    """Sums up gradients and activations where convolutions and linear layers read.

    Args:
        num_units: N.
    """

    def __init__(self, num_units: int) -> None:
        self.squared_effect = np.zeros(num_units)
        self._absolute = np.zeros(num_units)
        self._zeros = np.zeros(num_units)
        self._count = np.zeros(num_units)

    def visit(self, read: Read) -> None:
        """Note a read; its gradient follows when it is computed."""
        activation, axis, unique = read.activation, read.axis, read.unique
        if not activation.requires_grad:
            return
        values = activation.detach()

        def per_class(tensor: Tensor) -> Tensor:
            rows = tensor.movedim(axis, 1).flatten(2).sum(2) if tensor.dim() > 2 else tensor
            return read.by_class(rows)  # [B, U]

        def gradient_hook(gradient: Tensor) -> None:
            effect = per_class(values * gradient).double()
            self.squared_effect[unique] += effect.square().sum(0).cpu().numpy()

        activation.register_hook(gradient_hook)
        positions = values.numel() // values.shape[axis]
        self._absolute[unique] += per_class(values.abs()).double().sum(0).cpu().numpy()
        self._zeros[unique] += per_class((values == 0).float()).double().sum(0).cpu().numpy()
        self._count[unique] += positions * np.bincount(read.column.cpu().numpy())

    def activations(self) -> tuple[Float64Array, Float64Array]:
        """Return ``[N]`` mean |activation| and ``[N]`` share of zeros; NaN where none was seen."""
        count = np.where(self._count > 0, self._count, np.nan)
        return self._absolute / count, self._zeros / count


def measure(
    task: Task,
    graph: StructureGraph,
    *,
    num_samples: int = 512,
    batch_size: int = 64,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Mapping[str, FloatArray]:
    """Measure weights, gradients and activations of a dense network.

    One forward and backward over ``num_samples`` shuffled train samples in eval mode, on a copy of
    the network. The Taylor importance of a unit follows Molchanov et al. 2019 (CVPR, "Importance
    Estimation for Neural Network Pruning"), equation 8: the squared sum of ``weight * gradient``,

    ``taylor = sum over layers that read the class of
    mean over samples i of (sum over the layer's weights w on the class of w * dL_i/dw)^2``

    with L_i the loss of one sample. The weights are those of the layers that *read* the
    class: for each, the inner sum equals ``sum over positions of a * dL_i/da`` with the activation
    ``a`` that the layer reads, to first order what the loss gains when the layer no longer sees it
    (after norm and activation function, whatever they are). Per MAC, at half the MACs of a
    ResNet-20, this kept 0.70 accuracy on search images; the same with the scales and shifts of the
    norms that *write* the unit, 0.48.

    ``activation_mean`` and ``apoz`` are the mean magnitude and the share of zeros (Hu et al. 2016,
    arXiv 1607.03250) of the activations that those layers read. For the others see
    ``filter_statistics``.

    Args:
        task: gives the dense network, which is never changed, its loss and train samples, which are
            taken without augmentation.
        graph: structure of the network.
        num_samples: how many; fewer if the split is smaller.
        batch_size: samples a forward; does not change the result but for rounding.
        seed: fixes which samples.
        device: where forward and backward run; None = where the network is.

    Returns:
        ``[N]`` float32 of each name in ``STATISTIC_NAMES``, finite; frozen units hold 0. A free
        class that a statistic cannot see (no norm over it, no layer that reads it) holds the mean
        of the units that it can see.

    Raises:
        ModelError: a gradient is not finite, or the loss is no mean that gradients flow from.
    """
    dense = measurable(task, device)
    samples = task.train.sample(num_samples, seed)
    effects = Effects(graph.num_units)
    with reads(dense, graph, effects.visit, attentions=True):
        count = run_losses(dense, task, samples, batch_size)
    if not np.isfinite(effects.squared_effect).all():
        msg = "gradients hold NaN or infinity: check the network's weights and its data"
        raise ModelError(msg)
    absolute, zeros = effects.activations()
    values = filter_statistics(dense, graph)
    values |= {
        "taylor": np.where(np.isnan(zeros), np.nan, effects.squared_effect / max(count, 1)),
        "activation_mean": absolute,
        "apoz": zeros,
    }
    return {
        name: fill_unseen(graph, values[name], lambda: values["l2"]) for name in STATISTIC_NAMES
    }


def measurable(task: Task, device: str | torch.device | None) -> nn.Module:
    """Return a copy of a task's network to measure on; in float32 if the task allows it."""
    where = model_device(task.model) if device is None else device
    return readable_copy(task.model, where, torch.float32 if task.autocast else None)


def run_losses(model: nn.Module, task: Task, samples: TrainSplit, batch_size: int) -> int:
    """Send gradients of each sample's own loss through the network; return how many there were.

    Gradients begin at the network's inputs, if those are no numbers of tokens, and its weights.
    """
    count = 0
    handle = model.register_forward_pre_hook(_watch_inputs, with_kwargs=True)
    model.requires_grad_()
    try:
        with torch.enable_grad():
            for batch in samples.batches(batch_size):
                size = max(num_samples(batch), 1)
                (_checked_mean(task.loss(model, batch)) * size).backward()
                count += size
    finally:
        handle.remove()
        model.requires_grad_(False).zero_grad()
    return count


def _watch_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Let gradients flow from inputs; a network may change the copies in place."""

    def watched(item: Tensor) -> Tensor:
        able = item.is_floating_point() and not item.requires_grad
        return item.detach().requires_grad_().clone() if able else item

    seen: tuple[Any, dict[str, Any]] = tree_map_only(Tensor, watched, (args, kwargs))
    return seen


def _checked_mean(value: Tensor) -> Tensor:
    """Return a loss, if it is finite and gradients flow from it."""
    if not value.requires_grad:
        msg = "no gradients flow from the loss: leave detach() and no_grad() away"
        raise ModelError(msg)
    if not bool(value.isfinite()):
        msg = (
            f"the loss on train data is {float(value.detach())}: check the network's weights, the "
            "data, and the loss"
        )
        raise ModelError(msg)
    return value


def fill_unseen(
    graph: StructureGraph, values: Float64Array, by: Callable[[], Float64Array]
) -> FloatArray:
    """Give free units without a value (NaN) one, and frozen units 0.

    In each group they get evenly spaced quantiles of what is seen, in the order of ``by``: where
    groups compete, theirs loses the share that all lose. Nothing seen is 0.

    Args:
        graph: the structure.
        values: ``[N]``.
        by: returns ``[N]``, such as the norms, if a unit has no value; NaN there counts as 0.
    """
    seen = np.isfinite(values) & graph.free
    filled = np.where(seen, values, 0.0)
    unseen = graph.free & ~seen
    if seen.any() and unseen.any():
        ranks = rank_in_group(graph, np.nan_to_num(by()))
        filled[unseen] = np.quantile(values[seen], ranks[unseen])
    result: FloatArray = filled.astype(np.float32)
    return result


def num_sensitivity_networks(graph: StructureGraph) -> int:
    """Return how many networks ``sensitivity`` runs: one for each free group, and the dense one."""
    return len(graph.free_groups) + 1


def sensitivity(
    evaluator: Evaluator,
    graph: StructureGraph,
    scores: FloatArray,
    *,
    subset: Tensor | None = None,
    by: Literal["loss", "kl"] = "loss",
) -> FloatArray:
    """Measure what the loss gains when half of one group goes, for each group in turn.

    Half is rounded down, and the group's minimum stays.

    The evaluator counts the networks: one for each free group, and one for the whole network
    under the same recalibration.

    Args:
        evaluator: scores masks on search images.
        graph: the structure.
        scores: ``[N]``, the group's lowest go.
        subset: positions in the search split; None = all.
        by: the loss, or the divergence from the dense outputs, which needs no labels.

    Returns:
        ``[N]`` the group's gain (nats), at each of its units; frozen 0.
    """

    def measured(mask: ChannelMask) -> float:
        if by == "kl":
            return measure_divergence(evaluator, mask, subset)
        return evaluator.evaluate(mask, subset).loss

    dense = measured(graph.dense_mask())
    gains = np.zeros(graph.num_units, dtype=np.float32)
    for group in graph.groups:
        units = group.units[graph.free[group.units]]
        if not units.size:
            continue
        num_removed = min(units.size // 2, len(group.units) - group.min_keep)
        keep = np.ones(graph.num_units, dtype=bool)
        keep[units[np.argsort(scores[units], kind="stable")[: max(num_removed, 0)]]] = False
        gains[units] = measured(graph.mask(keep)) - dense
    return gains


def unlabelled_evaluator(
    task: Task,
    graph: StructureGraph,
    *,
    num_calibration: int = QUICK_CALIBRATION,
    seed: int = 0,
    device: str | torch.device | None = None,
    reconstruction: Reconstruction | None = None,
) -> Evaluator:
    """Return an evaluator that measures the divergence from the dense outputs on train samples.

    For what a policy may know of a network that it is applied to: no label, no search sample. A
    task without a search split judges by its score instead.

    Args:
        task: network and data; ``UNLABELLED_SAMPLES`` train samples are drawn, others than those
            that calibrate if there are enough.
        graph: structure of the network.
        num_calibration: samples that recalibrate batch norm.
        seed: fixes the samples.
        device: where networks run; None = where the task's network is.
        reconstruction: changes the weights that stay; None = they stay as they are.
    """
    train, search = task.train, None
    if task.search is not None:
        drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).flip(0)
        search = SearchSplit(train.source, train.index[drawn[:UNLABELLED_SAMPLES]])
    return Evaluator(
        task,
        graph,
        search=search,
        num_calibration=num_calibration,
        seed=seed,
        device=device,
        metric="kl",
        reconstruction=reconstruction,
    )


def measure_divergence(
    evaluator: Evaluator, mask: ChannelMask, subset: Tensor | None = None
) -> float:
    """Return how far a mask's outputs are from the dense network's (KL in nats for classes).

    An evaluator that does not measure it tells how far the score's utility falls below 0.
    """
    outcome = evaluator.evaluate(mask, subset)
    return -outcome.accuracy if outcome.kl is None else outcome.kl
