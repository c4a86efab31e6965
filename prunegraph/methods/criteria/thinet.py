"""ThiNet's greedy choice: which channels can go while the next layer's output stays."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.masks import Float64Array, IntArray
from prunegraph.graph import StructureGraph
from prunegraph.layerwise.capture import Read
from prunegraph.methods.criteria.dense import Dense
from prunegraph.methods.criteria.registry import measured_criterion

INSTANCES = 10
"""Outputs that are sampled of each image and layer, as in the paper."""

BATCH_SIZE = 8
"""Images a forward: patches of a whole feature map take a kernel's taps times its memory."""

TIE_BREAK = 1e-6
"""Relative step between errors, so that the order outlives where the error does not rise."""


@measured_criterion("thinet", num_samples=256)
def removal_errors(dense: Dense) -> Float64Array:
    """Return the error of the next layers' outputs at which each unit goes.

    Luo et al. 2017 (ICCV, "ThiNet: A Filter Level Pruning Method for Deep Neural Network
    Compression"), equation 6 and algorithm 1: outputs ``y = sum over channels of x_c`` of the next
    layer are sampled (random filter, random position), and of the channels that are left the one
    goes next that lets the removed ones' sum stay smallest, ``sum over samples of (sum of x_c)^2``.

    The value is that sum over the energy of the sampled ``y``, summed over the layers that read the
    group: it orders a group's units as the greedy choice does, and compares groups. Selection
    alone: the paper's least-squares scale of the channels that stay (equation 7) is left out, since
    every method's network must be recalibrated by the same means. Convolutions in two dimensions
    without groups and linear layers count; others are not seen.

    Returns:
        ``[N]`` from 0 up, rising in the order of removal; NaN where no such layer reads a unit.
    """
    grams: dict[str, tuple[IntArray, Tensor]] = {}
    generator = torch.Generator().manual_seed(dense.seed)

    def visit(read: Read) -> None:
        sampled = sample_contributions(read, generator)
        if sampled is not None:
            own = read.by_unit(sampled).double().cpu()  # [S, U]
            unique, gram = grams.get(str(read.op.param), (read.unique, torch.tensor(0.0)))
            grams[str(read.op.param)] = (unique, gram + own.T @ own)

    dense.show_reads(visit, BATCH_SIZE)
    return _greedy_by_group(
        dense.graph, [(unique, gram.numpy()) for unique, gram in grams.values()]
    )


def sample_contributions(read: Read, generator: torch.Generator) -> Tensor | None:
    """Return what each channel gives to sampled outputs of a layer; None if it is another kind.

    Args:
        read: the call.
        generator: draws the outputs' filters and positions.

    Returns:
        ``[S, C]``: the sum of a row is an output without its bias.
    """
    module, inputs = read.module, read.activation
    if read.op.computed:
        return None
    if isinstance(module, nn.Conv2d):
        if module.groups > 1 or isinstance(module.padding, str) or module.padding_mode != "zeros":
            return None
        patches = F.unfold(
            inputs, module.kernel_size, module.dilation, module.padding, module.stride
        )  # [B, C * taps, L]
        patches = patches.unflatten(1, (inputs.shape[1], -1)).movedim(3, 1)  # [B, L, C, taps]
    elif isinstance(module, nn.Linear):
        patches = inputs.reshape(len(inputs), -1, inputs.shape[-1], 1)  # [B, L, C, 1]
    else:
        return None
    count = len(patches) * INSTANCES
    image = torch.arange(len(patches)).repeat_interleave(INSTANCES)
    position = torch.randint(patches.shape[1], (count,), generator=generator)
    drawn = torch.randint(len(module.weight), (count,), generator=generator)
    weight = module.weight.detach()[drawn].reshape(count, patches.shape[2], -1)  # [S, C, taps]
    return (patches[image, position] * weight).sum(2)


def _greedy_by_group(
    graph: StructureGraph, grams: list[tuple[IntArray, Float64Array]]
) -> Float64Array:
    """Add up the layers that read each group, each relative to its outputs' energy."""
    errors = np.full(graph.num_units, np.nan)
    for group in graph.groups:
        total, seen = np.zeros((len(group.units),) * 2), False
        for unique, gram in grams:
            units, here, there = np.intersect1d(group.units, unique, return_indices=True)
            energy = float(gram.sum())
            if units.size and energy > 0:
                total[np.ix_(here, here)] += gram[np.ix_(there, there)] / energy
                seen = True
        if seen:
            errors[group.units] = greedy_errors(total)
    return errors


def greedy_errors(gram: Float64Array) -> Float64Array:
    """Return the highest error so far when each channel goes, in the greedy order.

    Args:
        gram: ``[C, C]`` products of the channels' contributions, summed over samples.

    Returns:
        ``[C]``, rising in the order of removal.
    """
    errors = np.zeros(len(gram))
    gone, with_gone = np.zeros(len(gram), dtype=bool), np.zeros(len(gram))
    error = highest = 0.0
    for step in range(len(gram)):
        added = np.where(gone, np.inf, gram.diagonal() + 2.0 * with_gone)
        chosen = int(added.argmin())
        error += added[chosen]
        highest = max(highest, error)
        errors[chosen] = highest * (1.0 + TIE_BREAK * step)
        gone[chosen] = True
        with_gone += gram[:, chosen]
    return errors
