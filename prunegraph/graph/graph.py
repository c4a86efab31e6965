"""The structure graph: prunable units, groups, operations and exact costs, as pure data.

A *prunable unit* is the unit of decision: all slices of parameters and buffers that must live or
die together. A *group* holds the units with the same set of (parameter, axis) members: a layer's
inner channels, a residual stream. Nothing here refers to the model; a graph can be pickled, sent to
another process and compared by its fingerprint.
"""

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from torch import Tensor

from prunegraph.core.budget import Budget, Cost
from prunegraph.core.errors import MaskError, ModelError
from prunegraph.core.masks import BoolArray, ChannelMask, Float64Array, FloatArray, IntArray
from prunegraph.core.renamed import Renamed
from prunegraph.graph.branches import Leaving
from prunegraph.graph.costs.macs import MACS, CostFunction, CostModel
from prunegraph.graph.costs.memory import MemoryModel
from prunegraph.graph.projection import Limits, project, repair
from prunegraph.graph.rounding import allowed, kinds_of


@dataclass(frozen=True, kw_only=True)
class Group:
    """Units that share one set of (parameter, axis) members.

    Attributes:
        name: module path of the first layer that produces the channels.
        units: ``[size]`` their numbers.
        members: the slices removed with a unit, as ``"parameter:axis"``.
        frozen: why no unit of the group may be removed, or None.
        min_keep: the least number of units that stays.
    """

    name: str
    units: IntArray
    members: tuple[str, ...]
    frozen: str | None
    min_keep: int = 1

    classes = Renamed("units")


@dataclass(frozen=True, kw_only=True)
class OpNode:
    """One call of a convolution, linear layer or matrix product, in execution order.

    ``MACs = macs_coefficient * kept input positions * kept output positions``; a depthwise
    convolution has no input axis of its own: ``macs_coefficient * kept output positions``.

    Attributes:
        name: module path, with ``#2``, ``#3`` for further calls of the same module.
        kind: ``"conv"``, ``"linear"`` or ``"matmul"``.
        in_units: unit at each position of the weight's input axis (per group of a grouped
            convolution); empty for a matrix product of activations.
        out_units: unit at each position of the output channels.
        macs_coefficient: multiply-adds a pair of positions.
        kernel_size: taps of the kernel (1 for linear).
        stride: stride of the first spatial axis (1 for linear).
        groups: groups of the convolution (1 for linear).
        depthwise: True if every channel is convolved alone.
        spatial: output positions a channel.
        param: name of the weight, or None.
        depth: position in the order of execution.
        out_axis: the weight's axis of output channels; 1 for a transposed convolution.
        computed: the forward computes its weight from the stored one, as where it is standardised.
    """

    name: str
    kind: str
    in_units: IntArray
    out_units: IntArray
    macs_coefficient: float
    kernel_size: int
    stride: int
    groups: int
    depthwise: bool
    spatial: int
    param: str | None
    depth: int
    out_axis: int = 0
    computed: bool = False

    in_classes = Renamed("in_units")
    out_classes = Renamed("out_units")

    @property
    def read_units(self) -> IntArray:
        """Unit at each position that it reads; a depthwise one reads what it writes."""
        return self.out_units if self.depthwise else self.in_units


@dataclass(frozen=True, kw_only=True)
class FrozenOp:
    """An operation that keeps units from being pruned.

    Attributes:
        op: name of the ATen op, or of the condition.
        module: path of the module that called it.
        reason: why, in words.
    """

    op: str
    module: str
    reason: str


Place = tuple[int | str, ...]
"""Keys that lead into nested containers."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SizeAttribute:
    """An integer attribute of a module that its forward may use as a size, as ``num_heads``.

    Attributes:
        module: path of the module.
        name: of the attribute.
        place: keys under which the integer lies in it, if it is a tuple, list or dict, perhaps of
            tuples, as einops' layers have it, or an object of settings; () = it is the integer
            itself.
        units: units of the positions that the size counts, with one axis for each axis of
            the shape that varies: ``[heads, width]``; -1 = a position that always stays.
        axis: the axis of ``units`` that the attribute counts.
    """

    module: str
    name: str
    place: Place
    units: IntArray
    axis: int

    @property
    def key(self) -> str:
        """The name by which a forward asks for the integer: its own, or that of the attribute."""
        last = self.place[-1] if self.place else self.name
        return last if isinstance(last, str) else self.name

    @property
    def varies(self) -> bool:
        """True if the units differ along the axis, so that its size can change."""
        return bool((self.units != self.units.take([0], self.axis)).any())

    def kept(self, keep: BoolArray) -> int:
        """Return the attribute's value for ``[N]`` keep bits."""
        alive = np.where(self.units < 0, True, keep[self.units])
        others = tuple(axis for axis in range(alive.ndim) if axis != self.axis)
        return int(alive.any(axis=others).sum())


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class StructureGraph:
    """What can be removed from a network, what belongs together and what it costs.

    Attributes:
        num_units: N, the number of prunable units, frozen ones included.
        groups: every unit lies in exactly one; in order of execution.
        group_of: ``[N]`` index of each unit's group.
        frozen: ``[N]`` True where the unit must stay.
        ops: M operations with multiply-adds, in order of execution.
        frozen_ops: what froze units, and why.
        param_units: parameter or buffer name -> axis -> unit at each position of the axis.
        gathers: path of each ``ChannelGather`` -> units of its input and output channels.
        attention: what a unit of attention is, "head" or "width"; see ``analyse``.
        size_attributes: attributes of modules that surgery sets to the kept sizes.
        means: path of a module -> units of each axis of its means; the axis, from the end.
        cost_model: the exact costs.
        memory_model: the exact peak memory; None in a graph that comes from no recorded forward.
        latency_model: a prediction of the milliseconds of a forward; None until it is measured.
        summed: ``[N]`` True where an addition unites channels that different operations wrote:
            residual streams do, gates (products) do not.
        divisors: parameters and buffers, no weights, by which a masked network divides: they stay.
        widths: numbers of units that alone may stay in a group, ascending, where not all may.
        origin: fingerprint of the structure as it was analysed, where a choice changed it.
        leaving: modules that leave with the last of their units (``with_depth``).
        numbered: attributes that number blocks, and the modules that have them.
        not_run: layers that no example ran, and that may read channels which can leave.
        proof: with which weights trials found it right: its own, drawn ones (meta device), none.
    """

    num_units: int
    groups: tuple[Group, ...]
    group_of: IntArray
    frozen: BoolArray
    ops: tuple[OpNode, ...]
    frozen_ops: tuple[FrozenOp, ...]
    param_units: Mapping[str, Mapping[int, IntArray]]
    gathers: Mapping[str, tuple[IntArray, IntArray]]
    attention: str = "head"
    size_attributes: tuple[SizeAttribute, ...] = ()
    means: Mapping[str, tuple[tuple[IntArray, int], ...]] = field(default_factory=dict)
    cost_model: CostModel = field(repr=False)
    memory_model: MemoryModel | None = field(default=None, repr=False)
    latency_model: CostFunction | None = field(default=None, repr=False)
    summed: BoolArray
    divisors: Set[str] = frozenset()
    widths: Mapping[int, Sequence[int]] = field(default_factory=dict)
    origin: str | None = None
    leaving: tuple[Leaving, ...] = ()
    numbered: tuple[tuple[str, tuple[str, ...]], ...] = ()
    not_run: tuple[str, ...] = ()
    proof: Literal["own weights", "drawn weights", "none"] = "none"

    channels_per_class = Renamed("channels_per_unit")
    num_classes = Renamed("num_units")
    param_classes = Renamed("param_units")

    @cached_property
    def dense_cost(self) -> Cost:
        """Cost of the whole network."""
        return self.cost(np.ones(self.num_units, dtype=bool))

    def __repr__(self) -> str:
        return (
            f"StructureGraph({len(self.groups)} groups, {self.num_units} units, of which "
            f"{self.free.sum()} may go, {self.dense_cost.macs:,} multiply-adds, "
            f"{self.dense_cost.params:,} parameters)"
        )

    @cached_property
    def free(self) -> BoolArray:
        """``[N]`` True where a unit may be removed."""
        return ~self.frozen

    @cached_property
    def free_groups(self) -> IntArray:
        """Positions of the groups with free units, in order of execution."""
        return np.unique(self.group_of[self.free])

    @cached_property
    def min_keep(self) -> IntArray:
        """``[G]`` least number of units that stay in each group."""
        return np.array([group.min_keep for group in self.groups], dtype=np.int64)

    @cached_property
    def group_sizes(self) -> IntArray:
        """``[G]`` number of units of each group."""
        return np.array([len(group.units) for group in self.groups], dtype=np.int64)

    @cached_property
    def kinds(self) -> IntArray:
        """``[G]`` number of each group's kind: what stands at one place of repeated blocks."""
        return kinds_of(self)

    @cached_property
    def channels_per_unit(self) -> IntArray:
        """``[G]`` channels in a unit of each group, which are positions on every axis it lies on.

        1 for plain layers; a grouped convolution has a unit's channel in each of its groups.
        """
        positions = np.zeros(self.num_units, dtype=np.int64)
        for axes in self.param_units.values():
            for units in axes.values():
                count = np.bincount(units, minlength=self.num_units)
                positions = np.gcd(positions, count)  # gcd(n, 0) is n
        each = [np.gcd.reduce(positions[group.units]) for group in self.groups]
        return np.maximum(np.array(each, dtype=np.int64), 1)

    def cost(self, keep: ChannelMask | BoolArray) -> Cost:
        """Return the exact cost of the network pruned by ``keep``."""
        bits = keep.keep if isinstance(keep, ChannelMask) else keep
        macs, params = self.cost_model.totals(bits.astype(np.float64))
        return Cost(macs=round(macs), params=round(params))

    def peak_memory(self, keep: ChannelMask | BoolArray) -> int:
        """Return the most bytes of activations alive at once in the network pruned by ``keep``.

        On inputs of the shape, type and memory layout of the example. Inputs, outputs and all that
        is made on the way count, each storage once from the operation that makes it until its
        last tensor dies; parameters, buffers and what a kernel needs inside do not. Not exact
        where surgery puts another module in (``nn.MultiheadAttention``): its temporaries differ.

        Raises:
            ModelError: the graph comes from no recorded forward.
        """
        return self._known_memory.peak(keep.keep if isinstance(keep, ChannelMask) else keep)

    @property
    def _known_memory(self) -> MemoryModel:
        if self.memory_model is None:
            msg = "peak memory is not known of a graph that was put together by hand: use analyse"
            raise ModelError(msg)
        return self.memory_model

    def class_costs(self) -> tuple[Float64Array, Float64Array]:
        """Return ``[N]`` MACs and ``[N]`` params that removing one unit alone would free."""
        freed = self.cost_model.freed_by_each(np.ones(self.num_units, dtype=bool))
        return freed[0], freed[1]

    def macs_by_group(self, keep: BoolArray) -> Float64Array:
        """Return ``[G]`` multiply-adds of the operations that write each group, at ``[N]`` bits.

        Products without channels (the scores of attention) belong to no group and are left out.
        """
        macs = np.zeros(len(self.groups))
        for term in self.cost_model.terms:
            if term.kind == MACS and term.axes:
                written, *read = term.axes
                each = term.coefficient * float(np.prod([keep[axis].sum() for axis in read]))
                macs += each * np.bincount(
                    self.group_of[written], weights=keep[written], minlength=len(macs)
                )
        return macs

    def limits(self, budget: Budget) -> Float64Array:
        """Return ``[4]`` the most MACs, params, bytes and ms that may remain, infinite if any.

        Raises:
            BudgetError: the budget is one of single weights.
        """
        budget.check_channels()
        dense = self.dense_cost
        macs = np.inf if budget.keep_macs is None else budget.keep_macs * dense.macs
        params = np.inf if budget.keep_params is None else budget.keep_params * dense.params
        return np.array([macs, params, budget.max_memory or np.inf, budget.max_latency or np.inf])

    @property
    def others(self) -> tuple[CostFunction | None, CostFunction | None]:
        """The costs of the last two of ``limits``, where they are known."""
        return self.memory_model, self.latency_model

    def bounded(self, budget: Budget) -> list[tuple[CostFunction, float]]:
        """Return the costs besides MACs and params that a budget limits, each with its limit.

        A latency that is not predicted is left out.
        """
        found: list[tuple[CostFunction, float]] = []
        if budget.max_memory is not None:
            found.append((self._known_memory, budget.max_memory))
        if budget.max_latency is not None and self.latency_model is not None:
            found.append((self.latency_model, budget.max_latency))
        return found

    def at_stake(self, budget: Budget) -> BoolArray:
        """Return the free units ``[N]`` that cost something of what a budget limits.

        The others may all stay. Of memory what counts is who is alive when it runs short.
        """
        macs, params = self.class_costs()
        stake = np.zeros(self.num_units, dtype=bool)
        if budget.keep_macs is not None:
            stake |= macs > 0
        if budget.keep_params is not None:
            stake |= params > 0
        for model, limit in self.bounded(budget):
            stake |= model.at_stake(limit)
        return stake & self.free

    def cost_ratio(self, keep: BoolArray, budget: Budget) -> float:
        """Return the cost over its limit, of whichever is nearest to it."""
        cost, limits, bits = self.cost(keep), self.limits(budget), keep[None].astype(np.float64)
        others = [model.expected(bits)[0] / limit for model, limit in self.bounded(budget)]
        return float(max(cost.macs / limits[0], cost.params / limits[1], *others))

    def fits(self, keep: ChannelMask | BoolArray, budget: Budget) -> bool:
        """Return whether a mask meets a budget's limits and what it asks of widths.

        A latency counts where it is predicted.
        """
        bits = keep.keep if isinstance(keep, ChannelMask) else keep
        return Limits(self, budget).fits(bits) and (
            not budget.in_blocks or allowed(self, bits, budget)
        )

    def mask(self, keep: BoolArray) -> ChannelMask:
        """Check ``keep`` (``[N]``, True = keep) and return it as a mask.

        Raises:
            MaskError: wrong shape, a frozen unit removed, or too few units left in a group.
        """
        if keep.shape != (self.num_units,) or keep.dtype != np.bool_:
            msg = (
                f"a mask of shape {keep.shape}, {keep.dtype} does not fit: "
                f"this graph needs {self.num_units} booleans"
            )
            raise MaskError(msg)
        kept = np.bincount(self.group_of[keep], minlength=len(self.groups))
        removed_frozen = np.flatnonzero(self.frozen & ~keep)
        if removed_frozen.size:
            group = self.groups[int(self.group_of[removed_frozen[0]])]
            msg = f"unit {removed_frozen[0]} of {group.name} is frozen: {group.frozen}"
            raise MaskError(msg)
        short = np.flatnonzero(kept < self.min_keep)
        if short.size:
            group = self.groups[int(short[0])]
            msg = f"{group.name} keeps {kept[short[0]]} units, at least {group.min_keep} must stay"
            raise MaskError(msg)
        return ChannelMask(keep.copy())

    def dense_mask(self) -> ChannelMask:
        """Return the mask that keeps everything."""
        return ChannelMask(np.ones(self.num_units, dtype=bool))

    def project(self, scores: FloatArray | Tensor, budget: Budget) -> ChannelMask:
        """Keep units in descending score while they fit; see ``projection.project``."""
        array = scores.detach().cpu().numpy() if isinstance(scores, Tensor) else scores
        return project(self, array, budget)

    def repair(
        self, keep: BoolArray, budget: Budget, rng: np.random.Generator
    ) -> tuple[ChannelMask, float]:
        """Flip bits in random order until the budget is met; see ``projection.repair``."""
        return repair(self, keep, budget, rng)

    def group_widths(self, mask: ChannelMask) -> dict[str, int]:
        """Return the number of kept units of each group that may be pruned, by group name."""
        kept = np.bincount(self.group_of[mask.keep], minlength=len(self.groups))
        return {
            group.name: int(count)
            for group, count in zip(self.groups, kept, strict=True)
            if group.frozen is None
        }

    def prunable_params(self, names: set[str]) -> tuple[int, int]:
        """Return how many elements of the named parameters touch a free unit, and how many exist.

        An element counts as prunable if some axis holds a free unit at its position.
        """
        return self.cost_model.prunable_elements(names, self.free)

    def fingerprint(self) -> str:
        """Return 16 hex digits that name the structure (equal for equal networks)."""
        if self.origin is not None:
            return self.origin
        digest = hashlib.sha256(f"{self.num_units};".encode())
        for name in sorted(self.param_units):
            for axis, units in sorted(self.param_units[name].items()):
                digest.update(f"{name}:{axis};".encode() + units.tobytes())
        digest.update(np.packbits(self.frozen).tobytes())
        digest.update(f"{self.dense_cost.macs},{self.dense_cost.params}".encode())
        return digest.hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return what ``inspect --json`` prints."""
        share = self.macs_by_group(self.dense_mask().keep) / max(self.dense_cost.macs, 1)
        return {
            "macs": self.dense_cost.macs,
            "params": self.dense_cost.params,
            "units": self.num_units,
            "groups": [
                {
                    "name": group.name,
                    "size": len(group.units),
                    "members": list(group.members),
                    "frozen": group.frozen,
                    "macs_share": round(float(group_share), 6),
                }
                for group, group_share in zip(self.groups, share, strict=True)
            ],
            "frozen_ops": [
                {"op": item.op, "module": item.module, "reason": item.reason}
                for item in self.frozen_ops
            ],
        }
