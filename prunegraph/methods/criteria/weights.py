"""Statistics of prunable units that need no images: norms, distances and twins of filters.

A *producing filter* of a unit is the unit's slice of the weight of a convolution or linear layer
that writes it. Where several layers write a unit (a residual stream), norms and distances are the
mean over them, and similarity is that of the filters laid end to end.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from prunegraph.core.masks import Float64Array, IntArray
from prunegraph.graph import StructureGraph
from prunegraph.methods.criteria.registry import statistic_criterion

TIED = 1e-6
"""Cosines and norms that differ by less are equal: twins must not be told apart by rounding."""


@dataclass(frozen=True, eq=False)
class Filters:
    """The filters of one weight.

    Attributes:
        units: ``[U]`` distinct units that the layer writes, ascending.
        rows: ``[U, D]`` float32: each unit's slice, flattened.
    """

    units: IntArray
    rows: Tensor


class ClassMean:
    """Means over the parts that measure a unit.

    Args:
        num_units: N.
    """

    def __init__(self, num_units: int) -> None:
        self._sum = np.zeros(num_units)
        self._count = np.zeros(num_units)

    def add(self, units: IntArray, values: Tensor, count: int = 1) -> None:
        """Add a value for each of the distinct ``units``, a sum over ``count`` parts."""
        self._sum[units] += values.double().cpu().numpy()
        self._count[units] += count

    def result(self) -> Float64Array:
        """Return ``[N]`` means; NaN where nothing was measured."""
        with np.errstate(invalid="ignore"):
            mean: Float64Array = np.where(self._count > 0, self._sum / self._count, np.nan)
        return mean


def producing_filters(model: nn.Module, graph: StructureGraph) -> Iterator[Filters]:
    """Yield the filters of each convolution's and linear layer's weight, once a weight.

    But for those whose units all are frozen: a language model has as many outputs as words.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, op in {op.param: op for op in graph.ops if op.param}.items():
        axes, units = graph.param_units.get(name, {}), op.out_units
        ordered = sorted(axes.items(), key=lambda item: item[0] != op.out_axis)
        axis = next((a for a, own in ordered if np.array_equal(own, units)), None)
        if axis is None or name not in parameters or not graph.free[units].any():
            continue
        rows = parameters[name].detach().float().cpu().movedim(axis, 0).flatten(1)
        order = np.argsort(units, kind="stable")
        unique, first, counts = np.unique(units[order], return_index=True, return_counts=True)
        index = order[first[:, None] + np.arange(counts.min())]  # [U, positions of a unit]
        yield Filters(unique, rows[torch.from_numpy(index)].flatten(1))


def filter_statistics(model: nn.Module, graph: StructureGraph) -> dict[str, Float64Array]:
    """Measure norms, distances and twins.

    Args:
        model: the dense network.
        graph: its structure.

    Returns:
        ``[N]`` each, NaN where a unit has no filter (or no norm, for ``bn_scale``) or is frozen
        with all others that its layer writes:

        - ``l1``, ``l2``: norms of the producing filter (Li et al. 2017, arXiv 1608.08710);
        - ``bn_scale``: mean |scale| of the norms over the unit (Liu et al. 2017, 1708.06519);
        - ``fpgm``: sum of Euclidean distances to the other filters of the group (He et al. 2019,
          arXiv 1811.00250, equation 4);
        - ``lamp``: squared L2 norm over the sum of those of the group that are not smaller (Lee et
          al. 2021, arXiv 2010.07611, equation 4, with filters in the place of single weights);
        - ``twin_similarity``: highest absolute cosine with another filter of the group, 0 in a
          group of one;
        - ``twin_rank``: 1 if the unit has the larger L2 norm of the pair that it makes with its
          twin, else 0; of equal norms the lower index is the larger.
    """
    l1, l2, fpgm = (ClassMean(graph.num_units) for _ in range(3))
    grams: dict[int, Tensor] = {}
    for filters in producing_filters(model, graph):
        l1.add(filters.units, filters.rows.abs().sum(1))
        l2.add(filters.units, filters.rows.norm(dim=1))
        for group, part in _by_group(graph, filters):
            gram = part.rows @ part.rows.T  # [U', U']
            fpgm.add(part.units, _distances(gram).sum(1))
            size = len(graph.groups[group].units)
            total = grams.setdefault(group, torch.zeros(size, size))
            place = torch.from_numpy(np.searchsorted(graph.groups[group].units, part.units))
            total[place[:, None], place] += gram
    norms = l2.result()
    similarity, rank = _twins(graph, grams, norms)
    return {
        "l1": l1.result(),
        "l2": norms,
        "bn_scale": _norm_scale(model, graph),
        "fpgm": fpgm.result(),
        "lamp": _lamp(graph, norms),
        "twin_similarity": similarity,
        "twin_rank": rank,
    }


def _by_group(graph: StructureGraph, filters: Filters) -> Iterator[tuple[int, Filters]]:
    groups = graph.group_of[filters.units]
    for group in np.unique(groups).tolist():
        chosen = np.flatnonzero(groups == group)
        yield group, Filters(filters.units[chosen], filters.rows[torch.from_numpy(chosen)])


def _distances(gram: Tensor) -> Tensor:
    """Return Euclidean distances ``[U, U]`` from the products of all pairs of rows."""
    squares = gram.diagonal()
    return (squares[:, None] + squares - 2 * gram).clamp(min=0).sqrt()


def _norm_scale(model: nn.Module, graph: StructureGraph) -> Float64Array:
    """Return the mean |scale| of batch, layer, group and RMS norms over each unit."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))  # frozen batch norms hold buffers
    weights = {op.param for op in graph.ops}
    slopes = (name for name, module in model.named_modules() if isinstance(module, nn.PReLU))
    weights |= {f"{name}.weight".removeprefix(".") for name in slopes}
    mean = ClassMean(graph.num_units)
    for name, axes in graph.param_units.items():
        tensor = tensors.get(name)
        is_scale = name.rpartition(".")[2] == "weight" and name not in weights
        if tensor is not None and tensor.dim() == 1 and is_scale and 0 in axes:
            unique, first = np.unique(axes[0], return_index=True)
            mean.add(unique, tensor.detach().abs()[torch.from_numpy(first)])
    return mean.result()


def _lamp(graph: StructureGraph, norms: Float64Array) -> Float64Array:
    score = np.full(graph.num_units, np.nan)
    for group in graph.groups:
        squares = norms[group.units] ** 2
        order = np.argsort(squares, kind="stable")
        not_smaller = np.cumsum(squares[order][::-1])[::-1]
        score[group.units[order]] = squares[order] / np.maximum(not_smaller, 1e-30)
    return score


def _twins(
    graph: StructureGraph, grams: dict[int, Tensor], norms: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Return each unit's similarity to its twin, and its rank in the pair."""
    similarity = np.full(graph.num_units, np.nan)
    rank = np.full(graph.num_units, np.nan)
    for group, gram in grams.items():
        units = graph.groups[group].units
        length = gram.diagonal().clamp(min=1e-30).sqrt()
        cosine = (gram / length / length[:, None]).abs().clamp(max=1.0)
        cosine.fill_diagonal_(-1.0)
        best, _ = cosine.max(1)
        twin = (cosine >= best[:, None] - TIED).int().argmax(1).numpy()  # the first of equals
        own = norms[units]
        larger = own - own[twin] > TIED * own
        equal = np.abs(own - own[twin]) <= TIED * own
        similarity[units] = best.clamp(min=0.0).numpy()
        rank[units] = larger | (equal & (np.arange(len(units)) <= twin))
    return similarity, rank


statistic_criterion("l1", "l1", of_the_layer=True, reads_images=False)
statistic_criterion("l2", "l2", of_the_layer=True, reads_images=False)
statistic_criterion("bn_scale", "bn_scale", reads_images=False)
statistic_criterion("fpgm", "fpgm", of_the_layer=True, reads_images=False)
statistic_criterion("lamp", "lamp", reads_images=False)
