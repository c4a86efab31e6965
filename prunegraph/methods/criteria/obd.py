"""Second-order saliency of the weights that read a prunable unit."""

import numpy as np
import torch
from torch import Tensor

from prunegraph.core.masks import Float64Array, IntArray
from prunegraph.graph import StructureGraph
from prunegraph.methods.criteria.dense import Dense
from prunegraph.methods.criteria.registry import measured_criterion


@measured_criterion("obd", num_samples=256)
def fisher_saliency(dense: Dense) -> Float64Array:
    """Return what the loss gains, to second order, when the weights that read a unit become zero.

    ``0.5 * sum over weights w on the class of h * w^2`` (LeCun, Denker and Solla 1990, "Optimal
    Brain Damage", equation 5) with channels as units as in the OBD-C of Wang et al. 2019 (ICML,
    "EigenDamage", section 3.2). The diagonal ``h`` is that of the empirical Fisher matrix,
    ``mean over images i of (dL_i/dw)^2``, from the gradients of single images. OBD-C sums over the
    filter that writes the channel; here it is the weights that read it, since their loss is what
    removes a channel exactly (a norm would still give a silent filter its shift).

    Each image takes one forward and backward.

    Returns:
        ``[N]`` nats from 0 up, summed over the layers that read; NaN where a unit is not read.
    """
    model, graph = dense.model, dense.graph
    parameters = dict(model.named_parameters(remove_duplicate=False))
    columns = {name: place for name, place in _columns(graph).items() if name in parameters}
    weights = [parameters[name] for name in columns]
    fisher = [torch.zeros_like(weight) for weight in weights]
    count = 0
    for sample in dense.singles():
        count += 1
        gradients = torch.autograd.grad(dense.loss(sample), weights, allow_unused=True)
        for total, gradient in zip(fisher, gradients, strict=True):
            if gradient is not None:
                total += gradient.square()
    saliency = np.full(graph.num_units, np.nan)
    for (axis, units), weight, total in zip(columns.values(), weights, fisher, strict=True):
        own = _along(0.5 * total / max(count, 1) * weight.detach().square(), axis)
        unique = np.unique(units)
        saliency[unique] = np.nan_to_num(saliency[unique])
        np.add.at(saliency, units, own)
    return saliency


def _columns(graph: StructureGraph) -> dict[str, tuple[int, IntArray]]:
    """Return weight -> the axis by which it reads, and the unit at each position."""
    found = {}
    for op in graph.ops:
        read = op.read_units
        axes = graph.param_units.get(str(op.param), {})
        ordered = sorted(axes.items(), key=lambda item: (item[0] == op.out_axis) != op.depthwise)
        axis = next((a for a, own in ordered if np.array_equal(own, read)), None)
        if read.size and axis is not None:
            found[str(op.param)] = (axis, read)
    return found


def _along(values: Tensor, axis: int) -> Float64Array:
    """Return the sums over all axes but one."""
    result: Float64Array = values.double().movedim(axis, 0).flatten(1).sum(1).cpu().numpy()
    return result
