"""Gates on what layers read: one number for each unit, which multiplies its weights."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunegraph.core.masks import BoolArray, Float64Array, IntArray
from prunegraph.graph import OpNode, StructureGraph

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
"""What takes means over channels, beside the modules that a graph names."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Reader:
    """A weight that reads gated units.

    Attributes:
        name: of the parameter.
        axis: of the weight, along which it reads.
        units: unit at each position of the axis.
    """

    name: str
    axis: int
    units: IntArray


def readers_of(model: nn.Module, graph: StructureGraph) -> tuple[list[Reader], list[int]]:
    """Return the weights that can be gated, and the groups that nothing else reads.

    A gate of zero must be the unit's removal. So there are no gates on what a norm takes a mean
    over, as on the stream of a transformer, on what a depthwise, grouped or recurrent layer reads,
    and on what a weight reads that the forward computes.
    """
    ops = [op for op in graph.ops if op.param is not None]
    gated = {op.param: op for op in ops if op.param and _plain(op)}
    known = {f"{op.param}:{op.out_axis}" for op in ops}
    known |= {f"{name}:{1 - op.out_axis}" for name, op in gated.items()}
    averaged = np.zeros(graph.num_units, dtype=bool)
    for axes in graph.means.values():
        for units, _ in axes:
            averaged[units[units >= 0]] = True

    def gates(number: int) -> bool:
        group = graph.groups[number]
        names = {member: member.rpartition(":")[0] for member in group.members}
        wide = {member for member, name in names.items() if len(graph.param_units[name]) > 1}
        owners = [model.get_submodule(name.rpartition(".")[0]) for name in names.values()]
        normed = averaged[group.units].any() or any(isinstance(each, NORMS) for each in owners)
        return wide <= known and not normed

    reading = {int(group) for op in gated.values() for group in graph.group_of[op.in_units]}
    found = [int(group) for group in graph.free_groups if int(group) in reading and gates(group)]
    readers = [
        Reader(name=name, axis=1 - op.out_axis, units=op.in_units)
        for name, op in sorted(gated.items())
        if np.isin(graph.group_of[op.in_units], found).any()
    ]
    return readers, found


def gated_units(model: nn.Module, graph: StructureGraph) -> IntArray:
    """Return ``[K]`` the units that have gates, group by group."""
    _, groups = readers_of(model, graph)
    free = [graph.groups[group].units for group in groups]
    return np.concatenate([*free, np.zeros(0, dtype=np.int64)])


def _plain(op: OpNode) -> bool:
    return not (op.depthwise or op.groups > 1 or op.computed)


class _Scaled(nn.Module):
    """A weight times the gates of what it reads."""

    def __init__(self, gates: Tensor, places: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._gates = [gates]  # no parameter: it is shared by all
        self.register_buffer("places", places, persistent=False)
        self._shape = shape

    def forward(self, weight: Tensor) -> Tensor:
        return (weight * self.factors(self._gates[0])).to(weight.dtype)

    def factors(self, values: Tensor) -> Tensor:
        """Return values ``[K]`` of gates as factors of the weight; 1 where it reads no gate."""
        filled = torch.cat([values, values.new_ones(1)])
        return filled[self.places].reshape(self._shape)  # type: ignore[index]


class Gates:
    """The gates of a network: in its forward while they are attached, in its weights afterwards.

    Args:
        model: a copy of the dense network; its gated weights alone are trained.
        graph: its structure.

    Attributes:
        units: ``[K]`` the unit of each gate.
        values: ``[K]`` the gates, all one at first.
        weights: the parameters that they multiply, by name.
        places: ``[in]`` of each weight the gate of what it reads; K = none.
    """

    def __init__(self, model: nn.Module, graph: StructureGraph) -> None:
        readers, _ = readers_of(model, graph)
        self.units = gated_units(model, graph)
        device = next(model.parameters()).device
        self.values = torch.ones(len(self.units), device=device, requires_grad=True)
        place_of = np.full(graph.num_units, len(self.units))
        place_of[self.units] = np.arange(len(self.units))
        self._model = model
        self._learn = {name: item.requires_grad for name, item in model.named_parameters()}
        model.requires_grad_(False)
        self.weights: dict[str, nn.Parameter] = {}
        self.places: dict[str, IntArray] = {}
        self._scaled: dict[str, tuple[nn.Module, str, _Scaled]] = {}
        for reader in readers:
            path, _, name = reader.name.rpartition(".")
            module, weight = model.get_submodule(path), model.get_parameter(reader.name)
            shape = [1] * weight.ndim
            shape[reader.axis] = len(reader.units)
            self.places[reader.name] = place_of[reader.units]
            places = torch.from_numpy(self.places[reader.name]).to(device)
            scaled = _Scaled(self.values, places, tuple(shape))
            parametrize.register_parametrization(module, name, scaled, unsafe=True)
            self._scaled[reader.name] = module, name, scaled
            weight.requires_grad = True
            self.weights[reader.name] = weight

    def product(self, name: str, values: Tensor) -> Tensor:
        """Return a weight times values ``[K]`` in place of the gates."""
        return self.weights[name] * self._scaled[name][2].factors(values)

    def fold(self) -> None:
        """Write the products into the weights, and let the network go: what learned, learns."""
        for module, name, _ in self._scaled.values():
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self._learn[name])

    def of_kinds(self, graph: StructureGraph, *, apart: bool) -> Iterator[tuple[int, IntArray]]:
        """Yield the kind and the places of gates that are ranked together.

        Args:
            graph: the structure.
            apart: those of each group, else those of all groups of a kind.
        """
        groups = graph.group_of[self.units]
        kinds = graph.kinds[groups]
        ranked = groups if apart else kinds
        for number in np.unique(ranked):
            places = np.flatnonzero(ranked == number)
            yield int(kinds[places[0]]), places


class Shares:
    """What a network costs whose layers keep shares of their gated units.

    Shares and costs are of what the gates may remove: 1 = nothing is gone, 0 = each group is at its
    minimum.

    Args:
        graph: the structure.
        units: ``[K]`` the gated units.
        limits: ``[2]`` the most MACs and params that may remain; infinite = any.
        budgeted: which of the two limits count.
    """

    def __init__(
        self, graph: StructureGraph, units: IntArray, limits: Float64Array, budgeted: BoolArray
    ) -> None:
        self._graph, self._units = graph, units
        self.kinds = np.unique(graph.kinds[graph.group_of[units]])
        self._column = np.searchsorted(self.kinds, graph.kinds[graph.group_of[units]])
        sizes = graph.group_sizes[graph.group_of[units]]
        self.least = np.array(
            [
                float((graph.min_keep[graph.group_of[units]] / sizes)[self._column == column].max())
                for column in range(len(self.kinds))
            ]
        )
        ends = [self._costs(shares) for shares in (self.least, np.ones(len(self.kinds)))]
        self._floor, self._span = ends[0], np.maximum(ends[1] - ends[0], 1e-12)
        self.targets = np.where(budgeted, (limits - self._floor) / self._span, np.inf)

    def _probabilities(self, shares: Float64Array) -> Float64Array:
        keep = np.ones((1, self._graph.num_units))
        keep[0, self._units] = shares[self._column]
        return keep

    def _costs(self, shares: Float64Array) -> Float64Array:
        return np.asarray(self._graph.cost_model.expected(self._probabilities(shares))[0])

    def gap(self, shares: Float64Array, done: float) -> tuple[float, Float64Array]:
        """Return how far a cost is above its target, of whichever is farthest, and its slopes.

        Args:
            shares: ``[S]`` of each kind.
            done: share of the way from 1 to the target that is gone.
        """
        above = (self._costs(shares) - self._floor) / self._span
        above -= 1.0 + (np.minimum(self.targets, 1.0) - 1.0) * done
        above[np.isinf(self.targets)] = -np.inf
        worst = int(above.argmax())
        slopes = self._graph.cost_model.slopes(self._probabilities(shares))[0, worst]
        of_kind = np.bincount(self._column, weights=slopes[self._units], minlength=len(self.kinds))
        return float(above[worst]), of_kind / self._span[worst]

    def even(self, done: float) -> Float64Array:
        """Return the shares ``[S]``, as far above the least alike, that meet the target."""
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            above, _ = self.gap(self.least + (1.0 - self.least) * middle, done)
            low, high = (low, middle) if above > 0.0 else (middle, high)
        return np.asarray(self.least + (1.0 - self.least) * low)
