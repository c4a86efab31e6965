"""What one forward leaves behind: labels, and what was seen of operations, sizes and heads."""

from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from prunegraph.graph.graph import FrozenOp
from prunegraph.graph.trace.labels import (
    NEUTRAL,
    LabelSet,
    LabelStore,
    labelled,
    narrow_constant,
    varying_axes,
)
from prunegraph.graph.trace.lifetimes import LifetimeRecorder
from prunegraph.graph.trace.weight_views import WeightView

WIDE = 4096
"""Outputs that are more are one unit: see ``Recording.resolve_wide_outputs``."""

UNREAD = "not read with this example"
MERGED = "lies beside channels that were merged with it"


@dataclass(frozen=True, kw_only=True)
class RecordedOp:
    """One operation with multiply-adds, its axes as labels; fields as in ``OpNode``."""

    module: str
    kind: str
    in_labels: Tensor
    out_labels: Tensor
    macs_coefficient: float
    param: str | None
    kernel_size: int = 1
    stride: int = 1
    groups: int = 1
    depthwise: bool = False
    spatial: int = 1
    out_axis: int = 0
    computed: bool = False


@dataclass(frozen=True, kw_only=True)
class SizeUse:
    """A size that a module's code gave to a labelled axis: ``view(b, n, self.num_heads, -1)``.

    Attributes:
        module: path of the module whose forward ran.
        labels: the labels, narrowed to one position along axes where they do not vary.
        axis: the axis in question.
        part: which of the sizes of a split it is.
        by_name: the size was not seen to be used: only an attribute with a width's name holds it.
        copies: it is how many query heads share a head of keys: an attribute so called holds it.
    """

    module: str
    labels: Tensor
    axis: int
    part: int = 0
    by_name: bool = False
    copies: bool = False


@dataclass(frozen=True, kw_only=True)
class RecordedMean:
    """A mean over channels, as in an RMS norm written out.

    Attributes:
        module: path of the module whose forward ran.
        labels: ``[size]`` labels of the axis.
        axis: the axis, counted from the end: -1 is the last.
    """

    module: str
    labels: Tensor
    axis: int


@dataclass(frozen=True, kw_only=True)
class RecordedShare:
    """What each part of a divided axis was combined with: these may be heads.

    Attributes:
        one: its labels.
        parts: labels of the parts, which broadcast with them.
        cause: why it is frozen if they are.
    """

    one: Tensor
    parts: Tensor
    cause: FrozenOp


@dataclass(kw_only=True)
class RecordedParts:
    """Equal parts of a labelled axis.

    Attributes:
        parts: their labels.
        batched: they were put along the batch, as heads may be.
        sliced: slices made them, one after the other, as queries and keys may be.
    """

    parts: list[Tensor]
    batched: bool = False
    sliced: bool = False


@dataclass(frozen=True, kw_only=True)
class RecordedCopy:
    """Copies of channels along an axis of size 1, as of one key head for each query head.

    Attributes:
        index: which call of ``expand`` or ``repeat`` of the forward made them.
        module: path of the module whose own code ran.
        labels: those of the channels.
        size: how many copies.
    """

    index: int
    module: str | None
    labels: Tensor
    size: int


@dataclass(frozen=True, kw_only=True)
class RecordedConstant:
    """Constants that were read as channels: a layer may make these later, as those of a state.

    Attributes:
        labels: ``[size]`` their labels.
        cause: why they are frozen if none does.
        readers: paths of modules whose attributes may hold their number.
    """

    labels: Tensor
    cause: FrozenOp
    readers: set[str]


@dataclass(frozen=True, kw_only=True)
class RecordedGather:
    """One call of a ``ChannelGather`` module."""

    module: str
    in_labels: Tensor
    out_labels: Tensor


@dataclass
class Recording:
    """What one forward left behind.

    Attributes:
        store: labels, equalities and freezes.
        axis_labels: parameter or buffer name -> axis -> ``[size]`` labels, in order of first use.
        element_labels: name -> label tensor of the parameter's own shape (raw uses).
        ops: operations with multiply-adds.
        gathers: calls of ``ChannelGather`` modules.
        splits: label tensors of views that divided a labelled axis.
        divided: all labels of them.
        parts_of_axes: equal parts into which labelled axes were split.
        heads: labels of the batch axes of products: one unit a head, not to be tied to others.
        shared: what parts of divided axes were combined with.
        size_uses: sizes that a forward may have read from a module's attributes.
        filled: sizes of constants beside channels: any other use of an attribute counts more.
        reads: module paths and attributes of own classes that the forward read.
        inputs: module path -> ``[size]`` labels along the last axis of its first argument.
        means: means over channels.
        copies: copies of channels, which may be as many as heads.
        num_expands: calls of ``expand`` and ``repeat`` so far.
        constants: constants that were read as channels.
        beside: constant that a forward made -> axis, counted from the end -> labels that it met.
        makers: size of an axis of some constant -> paths of modules that made one.
        sums: labels of channels that additions unite.
        pairs: channels of which two must stay: the forward fails where one is left.
        computed: names of the parameters and buffers of which layers' weights are made.
        divisors: names of the parameters and buffers by which something was divided.
        outputs: labels of what the network returns.
        parts: name of a stored weight and an axis -> which positions were read.
        positions: what holds positions of channels -> labels of these.
        stacks: name of a stored weight and two axes that were merged -> ``[., .]`` labels.
        lifetimes: which storages lived when.
    """

    store: LabelStore = field(default_factory=LabelStore)
    axis_labels: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    element_labels: dict[str, Tensor] = field(default_factory=dict)
    ops: list[RecordedOp] = field(default_factory=list)
    gathers: list[RecordedGather] = field(default_factory=list)
    splits: list[Tensor] = field(default_factory=list)
    divided: LabelSet = field(default_factory=LabelSet)
    parts_of_axes: list[RecordedParts] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    shared: list[RecordedShare] = field(default_factory=list)
    size_uses: list[SizeUse] = field(default_factory=list)
    filled: list[SizeUse] = field(default_factory=list)
    reads: set[tuple[str, str]] = field(default_factory=set)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    means: list[RecordedMean] = field(default_factory=list)
    copies: list[RecordedCopy] = field(default_factory=list)
    num_expands: int = 0
    constants: list[RecordedConstant] = field(default_factory=list)
    beside: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    makers: dict[int, set[str]] = field(default_factory=dict)
    sums: list[Tensor] = field(default_factory=list)
    pairs: list[Tensor] = field(default_factory=list)
    computed: set[str] = field(default_factory=set)
    outputs: list[Tensor] = field(default_factory=list)
    divisors: set[str] = field(default_factory=set)
    stacks: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)
    parts: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    positions: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    lifetimes: LifetimeRecorder = field(default_factory=LifetimeRecorder)

    @property
    def touched(self) -> set[str]:
        """The names of the parameters and buffers that the forward has used."""
        return self.axis_labels.keys() | self.element_labels.keys()

    def resolve_parts_of_axes(self) -> None:
        """Tie equal parts of an axis position by position, but for heads along the batch.

        Slices that hold heads are not tied, either: as many queries as keys and values together.
        """
        for each in self.parts_of_axes:
            if not (each.batched or each.sliced):
                self._tie(each.parts)
        rest = [each.parts for each in self.parts_of_axes if each.batched or each.sliced]
        if rest:
            component, is_head = self._heads()
            for parts in rest:
                if not all(bool(is_head[component[labelled(part)]].all()) for part in parts):
                    self._tie(parts)

    def _tie(self, parts: list[Tensor]) -> None:
        for part in parts[1:]:
            self.store.unite(parts[0], part)

    def resolve_splits(self) -> None:
        """Tie the parts of divided axes position by position, unless the parts are heads.

        ``view(b, groups, c // groups)`` gives each group as many channels as any other; in
        attention whole heads leave instead, and the heads that stay are as wide as before. Where
        each part hangs together as a whole, as ``view(b, -1, 4, 4)`` before a convolution gives
        each channel its positions, it leaves as a whole.
        """
        component, is_head = self._heads()
        for share in self.shared:
            if bool(is_head[component[labelled(share.parts)]].any()):
                self.store.freeze(share.one, share.cause)
            else:
                self.store.unite(share.one, share.parts)
        for labels in self.splits:
            axis = varying_axes(labels)[0]
            parts = labels.movedim(axis, 0).flatten(1)
            known = component[labelled(parts)]
            whole = known.shape == (parts.numel(),) and torch.equal(
                component[parts], component[parts[:, :1]].expand_as(parts)
            )
            if not whole and not bool(is_head[known].any()):
                self.store.unite(labels, labels.narrow(axis, 0, 1))

    def read(self, place: tuple[str, int], labels: Tensor, start: int, size: int) -> Tensor:
        """Return labels of a part of a stored weight's axis, and note that it was read."""
        read = self.parts.setdefault(place, torch.zeros(len(labels), dtype=torch.bool))
        read[start : start + size] = True
        return labels.narrow(0, start, size)

    def resolve_parts(self) -> None:
        """Freeze what was not read of an axis: other inputs may read it."""
        for (name, axis), read in self.parts.items():
            cause = FrozenOp(op="parameter", module=name, reason=UNREAD)
            self.store.freeze(self.axis_labels[name][axis][~read], cause)

    def hold_positions(self, tensors: Iterable[Tensor], channels: Tensor) -> None:
        """Note what holds positions of channels, as ``max`` gives them."""
        for tensor in tensors:
            if not tensor.is_floating_point():
                self.positions[tensor] = channels

    def note_positions(self, tensors: Iterable[Tensor], cause: FrozenOp) -> None:
        """Freeze the channels whose positions are used: they are others once some are gone."""
        for tensor in tensors:
            if tensor in self.positions:
                self.store.freeze(self.positions[tensor], cause)

    def merged(self, view: WeightView, axes: tuple[int, ...]) -> Tensor:
        """Return ``[size]`` labels of axes of a stack that were merged, see ``resolve_stacks``."""
        key = view.name, axes
        if key not in self.stacks:
            sizes = [view.shape[axis] for axis in axes]
            self.stacks[key] = self.store.fresh(prod(sizes)).view(sizes[0], -1)
        return self.stacks[key].reshape(-1)

    def resolve_stacks(self) -> None:
        """Let one of two axes that were merged lose channels: whole heads, or a part of each.

        Where the positions of each head hang together, heads leave; else all heads, or experts,
        stay, and lose the same positions.
        """
        component = self.store.components()
        for (name, (first, second)), labels in self.stacks.items():
            own = component[labels]
            if torch.equal(own, own[:, :1].expand_as(own)):
                lost, whole, channels = first, second, labels[:, 0]
            else:
                self.store.unite(labels, labels[:1])
                lost, whole, channels = second, first, labels[0]
            axes = self.axis_labels.setdefault(name, {})
            self.store.unite(axes.setdefault(lost, channels), channels)
            if whole in axes:
                cause = FrozenOp(op="parameter", module=name, reason=MERGED)
                self.store.freeze(axes[whole], cause)

    def resolve_wide_outputs(self) -> None:
        """Make one unit of outputs that are very many, as the words of a language model.

        All stay: each alone would be a node of the graph, and a row of what is measured.
        """
        for labels in self.outputs:
            own = labelled(narrow_constant(labels)).unique()
            if own.numel() > WIDE:
                self.store.unite(own[1:], own[:1])

    def resolve_constants(self) -> None:
        """Freeze constants that were read as channels, but those that a layer makes later.

        A recurrent cell of a user's own begins with zeros, as many as an attribute says.
        """
        component = self.store.components()
        outputs = [labelled(op.out_labels) for op in self.ops]
        made = component[torch.cat(outputs)] if outputs else component[:0]
        for read in self.constants:
            if not bool(torch.isin(component[read.labels], made).all()):
                self.store.freeze(read.labels, read.cause)
                continue
            self.filled += [
                SizeUse(module=path, labels=read.labels, axis=0, by_name=True)
                for path in sorted(read.readers)
            ]

    def tie_to_inputs(self, modules: set[str], *, heads: bool) -> bool:
        """Tie channels that cannot leave alone to those of their module's input, as many.

        A forward such as ``x.view(b, n, num_heads, c // num_heads) ... .view(b, n, c)``, with ``c``
        read from its input, needs as many channels in the stream as in its heads: then a head
        leaves with its share of the stream. ``self.conv(x).view(b, c, -1)``, where the convolution
        shortens the sequence that attention looks at, needs as many after it as before.

        Args:
            modules: paths of modules whose forward could not follow.
            heads: tie heads; False = channels that are no heads.

        Returns:
            Whether something was tied that was not before.
        """
        component, is_head = self._heads()
        found: dict[str, dict[bool, list[Tensor]]] = {}
        for use in self.size_uses:
            stream, merged = self.inputs.get(use.module), use.labels.reshape(-1)
            if use.module not in modules or stream is None or stream.shape != merged.shape:
                continue
            own = component[merged]
            if bool((merged != NEUTRAL).all() and (is_head[own] == heads).all()):
                in_order = own.unique_consecutive().numel() == own.unique().numel()
                found.setdefault(use.module, {True: [], False: []})[in_order].append(merged)
        tied = False
        for module, kinds in found.items():
            stream = self.inputs[module]
            others = kinds[False] if heads else []  # they may be a batch of heads
            for merged in kinds[True] or others:
                tied |= not torch.equal(component[merged], component[stream])
                self.store.unite(merged, stream)
        return tied

    def tie_same_numbers(self, numbers: Set[tuple[str, int]]) -> bool:
        """Tie channels of several kinds whose number a module says by one attribute.

        Args:
            numbers: paths of modules, and what such attributes hold.

        Returns:
            Whether something was tied that was not before.
        """
        component = self.store.components()
        named: dict[tuple[str, int], Tensor] = {}
        tied = False
        for use in (*self.size_uses, *self.filled):
            key, own = (use.module, use.labels.shape[use.axis]), use.labels.reshape(-1)
            if key not in numbers or len(own) != key[1] or bool((own == NEUTRAL).any()):
                continue
            first = named.setdefault(key, own)
            tied |= not torch.equal(component[own], component[first])
            self.store.unite(own, first)
        return tied

    def tells_apart(self, modules: set[str]) -> bool:
        """Return whether some module named one number for sizes of different channels."""
        named: dict[tuple[str, int], Tensor] = {}
        component = self.store.components()
        for use in self.size_uses:
            own = component[use.labels.reshape(-1)]
            key = use.module, use.labels.shape[use.axis]
            if use.module in modules and not torch.equal(named.setdefault(key, own), own):
                return False
        return True

    def _heads(self) -> tuple[Tensor, Tensor]:
        """Return the component of each label, and whether a component is a head."""
        component = self.store.components()
        is_head = torch.zeros(self.store.num_labels, dtype=torch.bool)
        for labels in self.heads:
            is_head[component[labelled(labels)]] = True
        return component, is_head
