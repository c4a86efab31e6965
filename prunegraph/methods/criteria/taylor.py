"""Measured arrays, one value a prunable unit: what features and heuristics are made of."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.errors import ModelError
from prunegraph.core.masks import Float64Array, FloatArray
from prunegraph.core.splits import TrainSplit
from prunegraph.graph import StructureGraph
from prunegraph.graph.features import rank_in_group
from prunegraph.layerwise.capture import Read, readable_copy, reads
from prunegraph.methods.criteria.registry import Given, criterion
from prunegraph.methods.criteria.weights import filter_statistics
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
    model: nn.Module,
    graph: StructureGraph,
    calibration: TrainSplit,
    *,
    num_images: int = 512,
    batch_size: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Mapping[str, FloatArray]:
    """Measure weights, gradients and activations of a dense network.

    One forward and backward over ``num_images`` shuffled train images in eval mode, on a copy of
    the network. The Taylor importance of a unit follows Molchanov et al. 2019 (CVPR, "Importance
    Estimation for Neural Network Pruning"), equation 8: the squared sum of ``weight * gradient``,

    ``taylor = sum over layers that read the class of
    mean over images i of (sum over the layer's weights w on the class of w * dL_i/dw)^2``

    with L_i the cross-entropy of one image. The weights are those of the layers that *read* the
    class: for each, the inner sum equals ``sum over positions of a * dL_i/da`` with the activation
    ``a`` that the layer reads, to first order what the loss gains when the layer no longer sees it
    (after norm and activation function, whatever they are). Per MAC, at half the MACs of a
    ResNet-20, this kept 0.70 accuracy on search images; the same with the scales and shifts of the
    norms that *write* the unit, 0.48.

    ``activation_mean`` and ``apoz`` are the mean magnitude and the share of zeros (Hu et al. 2016,
    arXiv 1607.03250) of the activations that those layers read. For the others see
    ``filter_statistics``.

    Args:
        model: the dense network; never changed.
        graph: its structure.
        calibration: train images, taken without augmentation.
        num_images: how many; fewer if the split is smaller.
        batch_size: images a forward; does not change the result but for rounding.
        seed: fixes which images.
        device: where forward and backward run.

    Returns:
        ``[N]`` float32 of each name in ``STATISTIC_NAMES``, finite; frozen units hold 0. A free
        class that a statistic cannot see (no norm over it, no layer that reads it) holds the mean
        of the units that it can see.

    Raises:
        ModelError: a gradient is not finite.
    """
    dense = readable_copy(model, device)
    images = calibration.sample(num_images, seed)
    return _measured(dense, graph, lambda: run_losses(dense, images, batch_size), len(images))


def measure_by(
    model: nn.Module,
    graph: StructureGraph,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> Mapping[str, FloatArray]:
    """Measure a network of any task: as ``measure``, by a loss that is given.

    Args:
        model: the dense network; never changed.
        graph: its structure.
        batches: what the loss is computed on.
        loss: of a network on a batch, summed over its samples.

    Returns:
        The arrays named in ``STATISTIC_NAMES``, Taylor importance up to a common factor.

    Raises:
        ModelError: a gradient is not finite, or the loss is no sum that gradients flow from.
    """
    dense = readable_copy(model, model_device(model), None)

    def run() -> None:
        dense.requires_grad_()  # what the first layer reads need not have a gradient
        with torch.enable_grad():
            for batch in batches:
                _checked_sum(loss(dense, batch)).backward()
        dense.requires_grad_(False)

    return _measured(dense, graph, run, 1)


def _checked_sum(value: object) -> Tensor:
    """Return what a loss has returned, if it is a sum that gradients flow from."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad:
        if not bool(value.isfinite()):
            msg = f"the loss returns {float(value)} on calibration data: check it, and the data"
            raise ModelError(msg)
        return value
    what = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    msg = (
        f"the loss returns {what}, not a sum over the batch that gradients flow from: reduce "
        "it with sum(), and leave detach() and no_grad() away"
    )
    raise ModelError(msg)


def _measured(
    dense: nn.Module, graph: StructureGraph, run: Callable[[], None], num_samples: int
) -> dict[str, FloatArray]:
    """Return the arrays of a network that is sent forward and backward by ``run``."""
    effects = Effects(graph.num_units)
    with reads(dense, graph, effects.visit, attentions=True):
        run()
    if not np.isfinite(effects.squared_effect).all():
        msg = "gradients hold NaN or infinity: check the network's weights and its images"
        raise ModelError(msg)
    absolute, zeros = effects.activations()
    values = filter_statistics(dense, graph)
    values |= {
        "taylor": np.where(np.isnan(zeros), np.nan, effects.squared_effect / max(num_samples, 1)),
        "activation_mean": absolute,
        "apoz": zeros,
    }
    return {
        name: fill_unseen(graph, values[name], lambda: values["l2"]) for name in STATISTIC_NAMES
    }


def run_losses(model: nn.Module, images: TrainSplit, batch_size: int) -> None:
    """Send gradients of each image's own loss through the network (no weight gets one)."""
    device = model_device(model)
    with torch.enable_grad():
        for batch, labels in images.batches(batch_size):
            logits = model(batch.to(device, torch.float32).requires_grad_())
            F.cross_entropy(logits, labels.to(device), reduction="sum").backward()


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


@criterion("taylor")
def taylor(given: Given) -> FloatArray:
    """Return first-order Taylor importances (Molchanov et al. 2019, CVPR), see ``measure``."""
    return given.statistics["taylor"]


@criterion("activation", of_the_layer=True)
def mean_activation(given: Given) -> FloatArray:
    """Return the mean magnitude of what the next layers read."""
    return given.statistics["activation_mean"]


@criterion("apoz", of_the_layer=True)
def share_of_non_zeros(given: Given) -> Float64Array:
    """Return the share of non-zero activations: mostly zero = unimportant (arXiv 1607.03250)."""
    return 1.0 - given.statistics["apoz"].astype(np.float64)
