"""What the layers that read a unit lose without it, by the columns of their weights alone."""

import numpy as np
import torch
from torch import Tensor

from prunegraph.core.masks import Float64Array
from prunegraph.layerwise.capture import Read
from prunegraph.methods.criteria.dense import Dense, add_seen
from prunegraph.methods.criteria.registry import measured_criterion

BATCH_SIZE = 32


class _InputSums:
    """Sums over what one layer reads in each channel.

    Args:
        read: its first call.
    """

    def __init__(self, read: Read) -> None:
        self.read = read
        self.count = 0
        self._sum = torch.zeros(len(read.units), dtype=torch.float64)
        self._squares = torch.zeros_like(self._sum)

    def add(self, read: Read) -> None:
        """Add what it reads in one call."""
        values = read.activation.detach().movedim(read.axis, -1).flatten(0, -2).float()
        self.count += len(values)
        self._sum += values.sum(0, dtype=torch.float64).cpu()
        self._squares += values.square().sum(0, dtype=torch.float64).cpu()

    def losses(self, *, centred: bool) -> Tensor:
        """Return ``[U]`` the energy that each unit gives to the outputs, or its variance."""
        energy = self._squares / self.count
        if centred:
            energy -= (self._sum / self.count).square()
        return self.read.by_unit((energy * _weight_energy(self.read)).to(self.read.column.device))


@measured_criterion("wanda", num_samples=256, of_the_layer=True)
def input_energy(dense: Dense) -> Float64Array:
    """Return the energy of what each unit gives to the layers that read it.

    ``sum over inputs j of the unit of ||W_j||^2 * mean of x_j^2``: the squared scores of Wanda (Sun
    et al. 2024, arXiv 2306.11695, equation 1), summed over a column. Padding counts as what it
    takes the place of.

    Returns:
        ``[N]`` from 0 up, summed over the layers that read; NaN where a unit is not read.
    """
    return _summed(dense, centred=False)


@measured_criterion("flap", num_samples=256, of_the_layer=True)
def input_fluctuation(dense: Dense) -> Float64Array:
    """Return the variance of what each unit gives to the layers that read it.

    ``sum over inputs j of the unit of ||W_j||^2 * variance of x_j``: the fluctuation metric of FLAP
    (An et al. 2024, AAAI, arXiv 2312.11983, section 3.2). What a removed input gives in the mean is
    no loss, since a bias takes it up: ``Reconstruction`` does that where a layer has one, or a
    batch norm behind it; it gives none to layers without.

    Returns:
        ``[N]`` from 0 up, summed over the layers that read; NaN where a unit is not read.
    """
    return _summed(dense, centred=True)


def _summed(dense: Dense, *, centred: bool) -> Float64Array:
    found: dict[str, _InputSums] = {}

    def visit(read: Read) -> None:
        if not read.op.depthwise:  # it passes a unit on to the layer that reads it next
            found.setdefault(str(read.op.param), _InputSums(read)).add(read)

    dense.show_reads(visit, BATCH_SIZE)
    values = np.full(dense.graph.num_units, np.nan)
    for each in found.values():
        add_seen(values, each.read.unique, each.losses(centred=centred).cpu().numpy())
    return values


def _weight_energy(read: Read) -> Tensor:
    """Return ``[C]`` float64 the squared norm of the weights on each channel that a layer reads."""
    weight = getattr(read.module, str(read.op.param).rpartition(".")[2]).detach().double().cpu()
    channels, groups = len(read.units), read.op.groups
    found: Tensor
    if groups > 1 and read.op.out_axis == 0:
        parts = weight.unflatten(0, (groups, -1)).movedim(2, 1)  # [G, C / G, out / G, ...]
        found = parts.flatten(2).square().sum(2).flatten()
    else:
        by_channel = weight.movedim(1 - read.op.out_axis, 0)
        found = by_channel.reshape(channels, -1).square().sum(1)
    return found
