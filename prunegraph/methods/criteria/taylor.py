"""Measured arrays, one value a prunable unit: what features and heuristics are made of."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from prunegraph.core.errors import ModelError
from prunegraph.core.masks import Float64Array, FloatArray
from prunegraph.core.task import Task
from prunegraph.graph import StructureGraph
from prunegraph.graph.features import rank_in_group
from prunegraph.layerwise.capture import Read
from prunegraph.methods.criteria.dense import Dense
from prunegraph.methods.criteria.registry import Given, criterion, statistic_criterion
from prunegraph.methods.criteria.weights import filter_statistics

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
"""What ``measure`` returns."""


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
        by_unit = replace(read, activation=values).by_unit

        def per_unit(tensor: Tensor) -> Tensor:  # the hook must not hold the activation it is of
            rows = tensor.movedim(axis, 1).flatten(2).sum(2) if tensor.dim() > 2 else tensor
            return by_unit(rows)  # [B, U]

        def gradient_hook(gradient: Tensor) -> None:
            effect = per_unit(values * gradient).double()
            self.squared_effect[unique] += effect.square().sum(0).cpu().numpy()

        activation.register_hook(gradient_hook)
        positions = values.numel() // values.shape[axis]
        self._absolute[unique] += per_unit(values.abs()).double().sum(0).cpu().numpy()
        self._zeros[unique] += per_unit((values == 0).float()).double().sum(0).cpu().numpy()
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

    ``taylor = sum over layers that read the unit of
    mean over samples i of (sum over the layer's weights w on the unit of w * dL_i/dw)^2``

    with L_i the loss of one sample. The weights are those of the layers that *read* the
    unit: for each, the inner sum equals ``sum over positions of a * dL_i/da`` with the activation
    ``a`` that the layer reads, to first order what the loss gains when the layer no longer sees it
    (after norm and activation function, whatever they are). Per MAC, at half the MACs of a
    ResNet-20, this kept 0.70 accuracy on search images; the same with the scales and shifts of the
    norms that *write* the unit, 0.48.

    ``activation_mean`` and ``apoz`` are the mean magnitude and the share of zeros (Hu et al. 2016,
    arXiv 1607.03250) of the activations that those layers read. For the others see
    ``filter_statistics``.

    Args:
        task: the dense network, its train data and its loss.
        graph: its structure.
        num_samples: how many, taken without augmentation; fewer if the split is smaller.
        batch_size: samples a forward, fewer of large ones (``Dense.show_gradients``); does not
            change the result but for rounding.
        seed: fixes which samples.
        device: where forward and backward run; None = where the network is.

    Returns:
        ``[N]`` float32 of each name in ``STATISTIC_NAMES``, finite; frozen units hold 0. A free
        unit that a statistic cannot see (no norm over it, no layer that reads it) holds the mean
        of the units that it can see.

    Raises:
        ModelError: a gradient is not finite.
    """
    train = task.train.sample(num_samples, seed)
    dense = Dense(task=task, graph=graph, train=train, seed=seed, device=device)
    effects = Effects(graph.num_units)
    dense.show_gradients(effects.visit, batch_size, attentions=True)
    if not np.isfinite(effects.squared_effect).all():
        msg = "gradients hold NaN or infinity: check the network's weights and its train data"
        raise ModelError(msg)
    absolute, zeros = effects.activations()
    per_sample = effects.squared_effect / max(dense.num_samples, 1)
    values = filter_statistics(dense.model, graph)
    values |= {
        "taylor": np.where(np.isnan(zeros), np.nan, per_sample),
        "activation_mean": absolute,
        "apoz": zeros,
    }
    return {
        name: fill_unseen(graph, values[name], lambda: values["l2"]) for name in STATISTIC_NAMES
    }


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


statistic_criterion("taylor", "taylor")
statistic_criterion("activation", "activation_mean", of_the_layer=True)


@criterion("apoz", of_the_layer=True)
def share_of_non_zeros(given: Given) -> Float64Array:
    """Return the share of non-zero activations: mostly zero = unimportant (arXiv 1607.03250)."""
    return 1.0 - given.statistics["apoz"].astype(np.float64)
