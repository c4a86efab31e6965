"""Statistics of feature maps: their rank, and what they add to those beside them.

The feature maps of a unit are what the layers that read it see: after norm and activation
function, whatever they are. They are taken from the convolutions that read it; from linear layers,
whose maps have a single column, only where no convolution does.
"""

import numpy as np
import torch
from torch import Tensor

from prunegraph.core.masks import Float64Array
from prunegraph.layerwise.capture import Read
from prunegraph.methods.criteria.dense import Dense
from prunegraph.methods.criteria.registry import measured_criterion
from prunegraph.methods.criteria.weights import ClassMean

BATCH_SIZE = 64

MOST_ENTRIES = 2**24
"""Numbers of all matrices whose eigenvalues are computed at once."""


class _MapMean:
    """Means over images and layers, convolutions before linear layers.

    Args:
        num_units: N.
    """

    def __init__(self, num_units: int) -> None:
        self._conv, self._linear = ClassMean(num_units), ClassMean(num_units)

    def add(self, read: Read, values: Tensor, count: int) -> None:
        """Add sums ``[U]`` over ``count`` images of one read."""
        mean = self._conv if read.op.kind == "conv" else self._linear
        mean.add(read.unique, values, count)

    def result(self) -> Float64Array:
        """Return ``[N]`` means; NaN where nothing was read."""
        of_conv = self._conv.result()
        return np.where(np.isnan(of_conv), self._linear.result(), of_conv)


@measured_criterion("hrank", num_samples=256, of_the_layer=True)
def average_rank(dense: Dense) -> Float64Array:
    """Return the mean rank of each unit's feature maps.

    Lin et al. 2020 (CVPR, "HRank: Filter Pruning using High-Rank Feature Map"), equation 6.

    Returns:
        ``[N]`` from 0 to the smaller side of the map; NaN where a unit is not read.
    """
    mean = _MapMean(dense.graph.num_units)

    def visit(read: Read) -> None:
        ranks = torch.linalg.matrix_rank(_maps(read).float())  # [B, C]
        counts = torch.from_numpy(np.bincount(read.column.cpu().numpy()))
        total = read.by_unit(ranks.double().sum(0)).cpu() / counts
        mean.add(read, total, len(ranks))

    dense.show_reads(visit, BATCH_SIZE)
    return mean.result()


@measured_criterion("chip", num_samples=128, of_the_layer=True)
def channel_independence(dense: Dense) -> Float64Array:
    """Return what the feature maps lose in nuclear norm without each unit.

    Sui et al. 2021 (NeurIPS, "CHIP: CHannel Independence-based Pruning for Compact Neural
    Networks"), equation 4: the maps of one image are the rows of a matrix; the unit's rows are set
    to zero; the difference of the nuclear norms is averaged over the images. It costs one
    eigenvalue problem a unit, layer and image, of the smaller of channels and positions.

    Returns:
        ``[N]`` from 0 up; NaN where a unit is not read.
    """
    mean = _MapMean(dense.graph.num_units)

    def visit(read: Read) -> None:
        maps = _maps(read).flatten(2).double()  # [B, C, P]
        losses = [nuclear_loss(rows, read.column, len(read.unique)) for rows in maps]
        mean.add(read, torch.stack(losses).sum(0), len(maps))

    dense.show_reads(visit, BATCH_SIZE)
    return mean.result()


def nuclear_loss(rows: Tensor, column: Tensor, num_units: int) -> Tensor:
    """Return by how much the nuclear norm of a matrix falls when a unit's rows become zero.

    Args:
        rows: ``[C, P]`` float64, one row a channel.
        column: ``[C]`` the class of each row.
        num_units: U.

    Returns:
        ``[U]`` from 0 up.
    """
    by_row = rows.shape[0] <= rows.shape[1]
    gram = rows @ rows.T if by_row else rows.T @ rows  # its eigenvalues: squared singular values
    norms = []
    for numbers in torch.arange(num_units, device=rows.device).split(
        max(MOST_ENTRIES // gram.numel(), 1)
    ):
        belongs = (numbers[:, None] == column).double()  # [K, C]
        if by_row:
            stays = 1.0 - belongs
            without = stays[:, :, None] * gram * stays[:, None, :]  # [K, C, C]
        else:
            own = (belongs[:, :, None] * rows).transpose(1, 2) @ rows  # [K, P, P]
            without = gram - own
        norms.append(_nuclear_norm(without))
    return (_nuclear_norm(gram) - torch.cat(norms)).clamp(min=0.0)


def _nuclear_norm(gram: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0.0).sqrt().sum(-1)
    return norm


def _maps(read: Read) -> Tensor:
    """Return the feature maps ``[B, C, H, W]``; axes that are missing have size 1."""
    maps = read.activation.detach().movedim(read.axis, 1)
    while maps.dim() < 4:
        maps = maps[..., None]
    return maps.flatten(2, -2)
