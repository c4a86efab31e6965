"""From a recording of labels to the structure graph."""

import itertools
from collections.abc import Iterable, Mapping
from math import prod

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from prunegraph.core.masks import BoolArray, IntArray
from prunegraph.graph.attribute_sizes import (
    Reading,
    attributes_of_size,
    fit,
    tells_copies,
    tells_width,
)
from prunegraph.graph.costs.macs import MACS, PARAMS, CostModel, CostTerm
from prunegraph.graph.costs.memory import MemoryModel
from prunegraph.graph.graph import FrozenOp, Group, OpNode, Place, SizeAttribute, StructureGraph
from prunegraph.graph.slim_attention import is_dense_attention
from prunegraph.graph.trace.attribute_reads import is_custom, named_by_forward
from prunegraph.graph.trace.labels import NEUTRAL, FreezeEvent, labelled
from prunegraph.graph.trace.recording import UNREAD, Recording, SizeUse

MODEL_INPUT, MODEL_OUTPUT = "model input", "model output"

PARAMETRISED = ".parametrizations."
"""Part of the names of parameters of which ``torch.nn.utils.parametrize`` makes weights."""

ALONE = "all its channels leave together, and one must stay"

NO_UNITS = np.empty(0, dtype=np.int64)

LAYER_SIZES = frozenset({"in_channels", "out_channels", "in_features", "out_features"})

ParamUnits = dict[str, dict[int, IntArray]]


class GraphBuilder:
    """Turns labels into units, groups, operations and costs.

    Args:
        model: the network that was recorded.
        recording: what its forward left behind.
        reading: how modules' attributes are read.
        attention: "head" or "width", see ``analyse``.
    """

    def __init__(
        self, model: nn.Module, recording: Recording, reading: Reading, attention: str
    ) -> None:
        self.model = model
        self.attention = attention
        self.recording = recording
        self.reading = reading
        self.components = recording.store.components().numpy()
        self._sizes = np.bincount(self.components)
        self.events: dict[int, FreezeEvent] = {}
        for label, event in recording.store.events.items():
            self.events.setdefault(int(self.components[label]), event)

    def build(self) -> StructureGraph:
        """Return the structure graph."""
        self._check_means()
        params = self._param_components()
        used = [components for axes in params.values() for components in axes.values()]
        distinct, first = np.unique(np.concatenate([NO_UNITS, *used]), return_index=True)
        num_units = len(distinct)
        lookup = np.full(int(self.components.max(initial=-1)) + 1, NEUTRAL, dtype=np.int64)
        lookup[distinct[np.argsort(first)]] = np.arange(num_units)
        self._lookup = lookup
        units = {
            name: {axis: lookup[components] for axis, components in sorted(axes.items())}
            for name, axes in params.items()
        }
        self._check_products()
        events = {int(lookup[c]): e for c, e in self.events.items() if lookup[c] != NEUTRAL}
        frozen = np.zeros(num_units, dtype=bool)
        frozen[[*events]] = True
        ops = self._ops()
        groups, group_of = self._groups(units, ops, frozen, events)
        summed = np.zeros(num_units, dtype=bool)
        for found in map(self._units, self.recording.sums):
            summed[found[found != NEUTRAL]] = True
        return StructureGraph(
            num_units=num_units,
            groups=groups,
            group_of=group_of,
            frozen=frozen,
            ops=ops,
            frozen_ops=self._frozen_ops(events.values()),
            param_units=units,
            gathers={
                gather.module: (self._units(gather.in_labels), self._units(gather.out_labels))
                for gather in self.recording.gathers
            },
            attention=self.attention,
            size_attributes=self._size_attributes(),
            means=self._means(),
            cost_model=CostModel(num_units, self._terms(units, ops)),
            memory_model=MemoryModel(
                num_units, self.recording.lifetimes.storages(self.components, lookup)
            ),
            summed=summed,
            divisors=self.recording.divisors - {op.param for op in ops},
        )

    def labels_of(self, units: IntArray) -> Tensor:
        """Return one label of each unit (after ``build``)."""
        components, first = np.unique(self.components, return_index=True)
        wanted = np.isin(self._lookup[components], units)
        return torch.from_numpy(first[wanted])

    def _units(self, labels: Tensor) -> IntArray:
        """Return the unit at each position that is labelled, NEUTRAL where no parameter has it."""
        result: IntArray = self._lookup[self.components[labelled(labels).numpy()]]
        return result

    def _size_attributes(self) -> tuple[SizeAttribute, ...]:
        """Find the integer attributes that hold a size which a module's forward named."""
        reading = self.reading
        found: dict[tuple[str, str, Place], tuple[SizeAttribute, tuple[bool, ...]]] = {}
        inputs = [
            SizeUse(module=path, labels=self.recording.inputs[path], axis=0, by_name=True)
            for path in sorted(self.recording.inputs.keys() & reading.checked)
        ]
        first = [use for use in inputs if use.module in reading.checked_first]
        uses = (*first, *self.recording.size_uses, *inputs)
        for number, use in enumerate((*uses, *self.recording.filled)):
            if use.module in reading.literal:
                continue
            labels = use.labels.numpy()
            units = np.where(labels == NEUTRAL, -1, self._lookup[self.components[labels]])
            if not (units >= 0).any():
                continue
            owner = self.model.get_submodule(use.module)
            if is_dense_attention(owner):  # its slim successor sets its own
                continue
            size = use.labels.shape[use.axis]
            for name, place in attributes_of_size(owner, size, reading.written):
                attribute = SizeAttribute(
                    module=use.module, name=name, place=place, units=units, axis=use.axis
                )
                if not self._may_hold(attribute, owner, use):
                    continue
                suits = fit(attribute, use.part)
                known = found.get((use.module, name, place))
                late = known is not None and suits == known[1] and use.module in reading.last_named
                weak = number >= len(uses)
                resolved = known is not None and (weak or use.module in reading.checked_first)
                if known is None or (not resolved and (suits > known[1] or late)):
                    found[use.module, name, place] = attribute, suits
        return tuple(attribute for attribute, _ in found.values() if attribute.varies)

    def _may_hold(self, attribute: SizeAttribute, owner: nn.Module, use: SizeUse) -> bool:
        """Return whether an attribute may hold a size that was used."""
        name, key = attribute.name, attribute.key
        if (type(owner), name, attribute.place) in self.reading.ignored:
            return False
        if tells_copies(key) != use.copies or (use.by_name and not tells_width(key)):
            return False
        if isinstance(owner, _ConvNd | nn.Linear) and name in LAYER_SIZES:
            return False  # those surgery sets by the layer's weight
        return self._may_read(owner, use.module, name)

    def _may_read(self, owner: nn.Module, path: str, name: str) -> bool:
        """Return whether a forward reads an attribute, or may read a width elsewhere.

        einops' layers read ``_axes_lengths``, and are copied by ``axes_lengths``.
        """
        if not is_custom(type(owner)) or {(path, name), (path, f"_{name}")} & self.recording.reads:
            return True  # torch's own may read all
        return tells_width(name) and name in named_by_forward(type(owner))

    def _freeze(self, components: IntArray, name: str, reason: str) -> None:
        event = FreezeEvent(
            cause=FrozenOp(op="parameter", module=name, reason=reason), expected=False
        )
        for component in np.unique(components).tolist():
            self.events.setdefault(component, event)

    def _check_means(self) -> None:
        """Freeze means of one module over different channels that cannot be told apart."""
        seen: dict[tuple[str, int, int], IntArray] = {}
        for mean in self.recording.means:
            own = self.components[mean.labels.numpy()]
            first = seen.setdefault((mean.module, len(own), mean.axis), own)
            if not np.array_equal(first, own):
                reason = "one module takes means over several kinds of as many channels"
                for components in (first, own):
                    self._freeze(components, mean.module, reason)

    def _means(self) -> dict[str, tuple[tuple[IntArray, int], ...]]:
        """Return the means that modules take: those of one number and axis are the same."""
        means = self.recording.means
        kinds = {(mean.module, len(mean.labels), mean.axis): mean.labels for mean in means}
        found: dict[str, tuple[tuple[IntArray, int], ...]] = {}
        for (path, _, axis), labels in kinds.items():
            found[path] = (*found.get(path, ()), (self._units(labels), axis))
        return found

    def _check_products(self) -> None:
        """Freeze the axes of products on which some positions are of no parameter: all stay."""
        for op in self.recording.ops:
            for labels in (op.in_labels, op.out_labels):
                if (self._units(labels) == NEUTRAL).any():
                    known = self.components[labelled(labels).numpy()]
                    self._freeze(known, op.module, "product with constants among its channels")

    def _param_components(self) -> dict[str, dict[int, IntArray]]:
        """Return the component at each position of each labelled axis, by parameter."""
        params: dict[str, dict[int, IntArray]] = {}
        for name, axes in self.recording.axis_labels.items():
            kept = {axis: labels.numpy() for axis, labels in axes.items() if labels.numel() > 1}
            params[name] = {axis: self.components[labels] for axis, labels in kept.items()}
        for name, labels in self.recording.element_labels.items():
            components = self.components[np.ascontiguousarray(labels.numpy())]
            axis = None if name in params else self._read_axis(components)
            if axis is not None:
                params[name] = axis
                continue
            varying = [
                axis
                for axis, size in enumerate(components.shape)
                if size > 1 and (components != components.take([0], axis)).any()
            ]
            if name in params or len(varying) > 1:
                reason = "raw parameter whose channels do not lie along one axis"
                self._freeze(components, name, reason)
                for axis_components in params.get(name, {}).values():
                    self._freeze(axis_components, name, reason)
            elif varying:
                rows = np.moveaxis(components, varying[0], 0)
                own = rows.reshape(len(rows), -1)[:, 0]
                params[name] = {varying[0]: own}
                unread = (self._sizes[own] == 1) & ~np.isin(own, [*self.events])
                self._freeze(own[unread & ~unread.all()], name, UNREAD)
        return {name: axes for name, axes in params.items() if axes}

    def _read_axis(self, components: IntArray) -> dict[int, IntArray] | None:
        """Return the channels of a raw parameter of which a part is not read, if on one axis.

        Of a table of positions that is longer than the example (``x + self.positions[:, :n]``) the
        rest says nothing: its elements have labels that nothing else has.
        """
        events = np.fromiter(self.events, dtype=np.int64)
        read = (self._sizes[components] > 1) | np.isin(components, events)
        if read.all() or not read.any():
            return None
        found = {}
        for axis, size in enumerate(components.shape):
            rows = np.moveaxis(components, axis, 0).reshape(size, -1)
            known = np.moveaxis(read, axis, 0).reshape(size, -1)
            first = rows[np.arange(size), known.argmax(1)]
            if size > 1 and known.any(1).all() and ((rows == first[:, None]) | ~known).all():
                found[axis] = first
        return found if len(found) == 1 else None

    def _ops(self) -> tuple[OpNode, ...]:
        calls: dict[str, int] = {}
        nodes = []
        for depth, op in enumerate(self.recording.ops):
            calls[op.module] = calls.get(op.module, 0) + 1
            suffix = f"#{calls[op.module]}" if calls[op.module] > 1 else ""
            coefficient, axes = op.macs_coefficient, []
            for labels in (op.in_labels, op.out_labels):
                units = self._units(labels)
                if (units == NEUTRAL).any():  # all stay, see ``_check_products``
                    units, coefficient = NO_UNITS, coefficient * labels.numel()
                axes.append(units)
            nodes.append(
                OpNode(
                    name=op.module + suffix,
                    kind=op.kind,
                    in_units=axes[0],
                    out_units=axes[1],
                    macs_coefficient=coefficient,
                    kernel_size=op.kernel_size,
                    stride=op.stride,
                    groups=op.groups,
                    depthwise=op.depthwise,
                    spatial=op.spatial,
                    param=op.param,
                    depth=depth,
                    out_axis=op.out_axis,
                    computed=op.computed,
                )
            )
        return tuple(nodes)

    def _terms(self, units: ParamUnits, ops: tuple[OpNode, ...]) -> list[CostTerm]:
        terms = [
            CostTerm(
                kind=MACS,
                coefficient=op.macs_coefficient,
                axes=tuple(axis for axis in (op.out_units, op.in_units) if axis.size),
            )
            for op in ops
        ]
        for name, parameter in self.model.named_parameters():
            axes = units.get(name, {})
            rest = prod(size for axis, size in enumerate(parameter.shape) if axis not in axes)
            terms.append(
                CostTerm(kind=PARAMS, coefficient=float(rest), axes=tuple(axes.values()), name=name)
            )
        return terms

    def _groups(
        self,
        units: ParamUnits,
        ops: tuple[OpNode, ...],
        frozen: BoolArray,
        events: Mapping[int, FreezeEvent],
    ) -> tuple[tuple[Group, ...], IntArray]:
        """Gather the units with the same members, in order of their first unit.

        One alone is frozen: nothing of such a group can go.
        """
        slices = [(name, axis) for name, axes in units.items() for axis in axes]
        own = [np.unique(units[name][axis]) for name, axis in slices]
        positions = np.repeat(np.arange(len(slices)), [len(indices) for indices in own])
        shape = (len(frozen), len(slices))
        where = (np.concatenate([NO_UNITS, *own]), positions)
        table = sparse.csr_array((np.ones(len(positions), dtype=np.int8), where), shape=shape)
        table.sort_indices()
        ends = table.indptr.tolist()
        members = [table.indices[a:b] for a, b in itertools.pairwise(ends)]
        reasons = {unit: event.cause.reason for unit, event in events.items()}
        found: dict[tuple[bytes, str | None], list[int]] = {}
        for index, row in enumerate(members):
            found.setdefault((row.tobytes(), reasons.get(index)), []).append(index)
        alike = {
            (tuple(members[indices[0]].tolist()), reason): indices
            for (_, reason), indices in found.items()
        }
        names = _group_names(alike, slices, ops)
        pairs = {index for labels in self.recording.pairs for index in self._units(labels)}
        group_of = np.zeros(len(frozen), dtype=np.int64)
        groups: list[Group] = []
        for ((custom_slices, reason), indices), name in zip(alike.items(), names, strict=True):
            group_of[indices] = len(groups)
            if reason is None and len(indices) == 1:
                reason, frozen[indices] = ALONE, True
            groups.append(
                Group(
                    name=name,
                    units=np.array(indices, dtype=np.int64),
                    members=tuple(f"{slices[p][0]}:{slices[p][1]}" for p in custom_slices),
                    frozen=reason,
                    min_keep=1 if pairs.isdisjoint(indices) else 2,
                )
            )
        return tuple(groups), group_of

    def _frozen_ops(self, events: Iterable[FreezeEvent]) -> tuple[FrozenOp, ...]:
        """Return what froze units, the network's own input and output left out."""
        causes = [event.cause for event in events if not event.expected]
        return (*dict.fromkeys(causes), *self._unused())

    def _unused(self) -> list[FrozenOp]:
        """Return the modules with weights that the forward never touched, as training heads."""
        touched = self.recording.touched
        names = [name for name, p in self.model.named_parameters() if p.ndim > 1]
        modules = [name.rpartition(".")[0] for name in names if name not in touched]
        reason = "not used by this forward: left whole"
        return [FrozenOp(op="parameter", module=module, reason=reason) for module in modules]


def _group_names(
    alike: Mapping[tuple[tuple[int, ...], str | None], list[int]],
    slices: list[tuple[str, int]],
    ops: tuple[OpNode, ...],
) -> list[str]:
    """Name each group after the module that first produces its channels, made unique."""
    producers: dict[int, str] = {}
    wanted = {indices[0] for indices in alike.values()}
    for op in ops:
        if op.param is not None:
            for index in wanted.intersection(op.out_units.tolist()):
                producers.setdefault(index, _layer_of(op.param))
    used: dict[str, int] = {}
    names = []
    for (custom_slices, reason), indices in alike.items():
        first = slices[custom_slices[0]][0]
        fallback = "input" if reason == MODEL_INPUT else _layer_of(first)
        name = producers.get(indices[0], fallback)
        used[name] = used.get(name, 0) + 1
        names.append(name if used[name] == 1 else f"{name}#{used[name]}")
    return names


def _layer_of(parameter: str) -> str:
    """Return the path of the module whose weight a parameter is, or makes."""
    layer, made, _ = parameter.partition(PARAMETRISED)
    return layer if made else parameter.rpartition(".")[0] or parameter
