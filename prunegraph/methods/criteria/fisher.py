"""The Fisher information of a gate on each unit."""

import numpy as np
from torch import Tensor

from prunegraph.core.masks import Float64Array
from prunegraph.layerwise.capture import Read, layer_inputs
from prunegraph.methods.criteria.dense import Dense
from prunegraph.methods.criteria.registry import measured_criterion


@measured_criterion("fisher", num_samples=128)
def gate_information(dense: Dense) -> Float64Array:
    """Return the Fisher information of a gate on all that a unit gives.

    ``mean over samples i of (dL_i/dm)^2``, m the factor 1 by which every layer that reads the unit
    sees it multiplied: the group Fisher of Liu et al. 2021 (ICML, "Group Fisher Pruning for
    Practical Network Compression", equations 4 and 5). Taylor importance squares the effect on each
    layer by itself; here what a unit does in one layer may undo what it does in another.

    Each sample takes one forward and backward.

    Returns:
        ``[N]`` from 0 up; NaN where a unit is not read.
    """
    total, seen, count = np.zeros(dense.graph.num_units), np.zeros(dense.graph.num_units, bool), 0
    effect = np.zeros(dense.graph.num_units)

    def visit(read: Read) -> None:
        activation, axis = read.activation, read.axis
        if read.op.depthwise or not activation.requires_grad:
            return
        values = activation.detach()
        seen[read.unique] = True

        def add(gradient: Tensor) -> None:
            channels = (values * gradient).movedim(axis, -1).flatten(0, -2).sum(0)
            effect[read.unique] += read.by_unit(channels).double().cpu().numpy()

        activation.register_hook(add)

    with layer_inputs(dense.model, dense.graph, visit, attentions=True):
        for sample in dense.singles():
            dense.loss(sample).backward()
            dense.model.zero_grad()
            total += effect**2
            effect[:] = 0.0
            count += 1
    dense.model.requires_grad_(False)
    return np.where(seen, total / max(count, 1), np.nan)
