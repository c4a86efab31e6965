"""Runs a forward once and labels every position of every tensor that it makes.

The forward is the user's own eager code under a dispatch mode: whatever runs can be analysed. What
each ATen op does to labels is in ``rules``; an op without a rule is decomposed if it can be, else
it freezes what it touches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.weak import WeakTensorKeyDictionary

from prunegraph.graph.channel_gather import ChannelGather
from prunegraph.graph.graph import FrozenOp
from prunegraph.graph.slim_attention import is_dense_attention
from prunegraph.graph.trace.attribute_reads import attribute_reads, is_custom
from prunegraph.graph.trace.calls import tensors_in
from prunegraph.graph.trace.labels import (
    NEUTRAL,
    LabelSet,
    along,
    is_neutral,
    narrow_alike,
    narrow_constant,
    neutral,
    varying_axes,
)
from prunegraph.graph.trace.lifetimes import LIKE
from prunegraph.graph.trace.module_stack import ModuleStack
from prunegraph.graph.trace.recording import RecordedGather, RecordedMean, Recording, SizeUse
from prunegraph.graph.trace.steps import StepRecorder
from prunegraph.graph.trace.weight_views import Sources, WeightView, constants, recurrent_weights

MAX_ELEMENT_LABELS = 1 << 20
"""A raw parameter with more elements than this is frozen instead of labelled by element."""

CHANNEL_AXES = (0, 1)
"""Axes of a weight along which channels may lie; the others are those of a kernel."""

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "convolution"})

Rule = Callable[["LabelRecorder", "OpCall"], None]


@dataclass(frozen=True, kw_only=True)
class OpCall:
    """One call of an ATen op.

    Attributes:
        func: the op.
        args: its positional arguments.
        kwargs: its keyword arguments.
        out: what it returned.
        name: short name, as ``"convolution"``.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    name: str

    def argument(self, place: int, name: str, default: Any) -> Any:
        """Return an argument, which may be given by its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def tensors(self) -> list[Tensor]:
        """Return the tensor inputs in order."""
        return tensors_in((self.args, self.kwargs))

    def outputs(self) -> list[Tensor]:
        """Return the tensor outputs in order."""
        return tensors_in(self.out)


class LabelRecorder(StepRecorder):
    """Dispatch mode that runs each op and applies its label rule.

    Args:
        model: the network (its parameters and buffers are known by identity).
        rules: ATen op name -> rule.
        by_width: attention is pruned by the width of its heads, not by whole heads.
    """

    def __init__(
        self, model: nn.Module, rules: Mapping[str, Rule], *, by_width: bool = False
    ) -> None:
        super().__init__(rules)
        self._model = model
        self.by_width = by_width
        self._recurrent = recurrent_weights(model)
        self.recording = Recording()
        self.store = self.recording.store
        self.lifetimes = self.recording.lifetimes
        self.lifetimes.leave_out([*model.parameters(), *model.buffers()])
        self.modules = ModuleStack(model)
        self._rules = rules
        self._labels = WeakTensorKeyDictionary()
        self._weight_views = WeakTensorKeyDictionary()
        self._gather_depth = 0
        self._is_quiet = False
        held = constants(model)
        for name, tensor in [*model.named_parameters(), *held]:
            if tensor in self._weight_views:  # known by its first name
                continue
            self._weight_views[tensor] = WeightView(
                name=name,
                shape=tuple(tensor.shape),
                axes=tuple(range(tensor.ndim)),
                starts=(0,) * tensor.ndim,
            )
        self.sources = Sources(self._stored_name, lambda tensor: is_neutral(self.labels_of(tensor)))
        self._buffers = {name for name, _ in held}
        self._buffer_labels, self._element_labels = LabelSet(), LabelSet()

    def _runs_whole(self, name: str) -> bool:
        return self._is_quiet or bool(self._gather_depth) or name in self._rules

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        out = func(*args, **kwargs)
        if self._is_quiet:
            return out
        call = OpCall(func=func, args=args, kwargs=kwargs, out=out, name=name)
        self.recording.note_positions(call.tensors(), self.cause(call, "reads their positions"))
        outputs = call.outputs()
        self.lifetimes.step(outputs)
        if not self._gather_depth:
            self._note(name, outputs)
        if not self._gather_depth or name == "cat":  # inside a gather cat's labels tell its size
            try:
                self._rules.get(name, unknown_op)(self, call)
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
                self.freeze_all(call, f"the rule for aten.{name} does not know this use of it")
        if not self._gather_depth and name not in PRODUCTS:  # what those make is no weight
            self.sources.note(call.tensors(), call.outputs())
        if not self._gather_depth and name in LIKE and self.weight_view(args[0]) is None:
            self.lifetimes.note_labels(out, self.labels_of(args[0]))
        return out

    @property
    def in_multihead_attention(self) -> bool:
        """True in an ``nn.MultiheadAttention``, whose slim successor keeps the scale."""
        return is_dense_attention(self.modules.running)

    @property
    def in_norm_module(self) -> bool:
        """True in a layer, RMS or group norm of torch's, whose sizes surgery knows."""
        return isinstance(self.modules.running, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm)

    def is_recurrent(self, weight: Tensor) -> bool:
        """Return whether a stored weight is the recurrent one of a layer or cell of torch's."""
        view = self.weight_view(weight)
        name = "" if view is None else view.name
        return name in self._recurrent and name.rpartition(".")[2].startswith("weight_hh")

    def cause(self, call: OpCall, reason: str) -> FrozenOp:
        """Return a freeze's cause for an op."""
        return FrozenOp(op=call.name, module=self.modules.current, reason=reason)

    def labels_of(self, tensor: Tensor) -> Tensor:
        """Return the label tensor; a raw parameter is labelled by element at its first use."""
        if tensor in self._labels:
            labels: Tensor = self._labels[tensor]
            return labels
        if tensor in self._weight_views:
            view: WeightView = self._weight_views[tensor]
            make = self._computed_weight if view.computed else self._raw_parameter
            labels = make(tensor, view)
            self._labels[tensor] = labels
            return labels
        return neutral(tensor.shape)

    def _computed_weight(self, tensor: Tensor, view: WeightView) -> Tensor:
        """Return labels of what was computed from a weight, if channels lie along one axis."""
        known = [(axis, self.channels(tensor, axis)) for axis in range(tensor.ndim)]
        found = [(axis, labels) for axis, labels in known if labels is not None]
        if len(found) == 1:
            return along(found[0][1], found[0][0], tensor.shape)
        cause = FrozenOp(op="parameter", module=view.name, reason="computed weight used otherwise")
        for _, labels in found:
            self.store.freeze(labels, cause)
        return self.store.frozen(cause, tensor.shape)

    def _raw_parameter(self, tensor: Tensor, view: WeightView) -> Tensor:
        if not (tensor.is_floating_point() and tensor.numel() > 1):
            return neutral(tensor.shape)
        if view.name not in self.recording.element_labels:
            shape = view.shape
            if prod(shape) > MAX_ELEMENT_LABELS:
                cause = FrozenOp(
                    op="parameter", module=view.name, reason="raw parameter too large to label"
                )
                labels = self.store.frozen(cause, shape)
            else:
                labels = self.store.fresh(prod(shape)).view(shape)
            self.recording.element_labels[view.name] = labels
            self._element_labels.add(labels)
            if view.name in self._buffers:
                self._buffer_labels.add(labels)
        parts = [each if isinstance(each, tuple) else (each,) for each in view.axes]
        stored = [axis for part in parts for axis in part if axis is not None]
        labels = self.recording.element_labels[view.name]
        for axis, position in view.selected:
            labels = labels.narrow(axis, position, 1)
        left_out = [axis for axis in range(len(view.shape)) if axis not in stored]
        for axis in left_out:  # positions that computed indices pick: any of them
            self.store.unite(labels, labels.narrow(axis, 0, 1))
            labels = labels.narrow(axis, 0, 1)
        labels = labels.permute(*stored, *left_out).reshape(
            [prod(view.shape[a] for a in part if a is not None) for part in parts]
        )
        for axis, (own, start) in enumerate(zip(view.axes, view.starts, strict=True)):
            if own is not None:  # others are as long as they were expanded to
                labels = labels.narrow(axis, start, tensor.shape[axis])
        return labels.expand(tensor.shape)

    def is_constant(self, labels: Tensor) -> bool:
        """Return whether the tensor was made from buffers and constants alone."""
        return is_neutral(labels) or self._buffer_labels.has_all(narrow_constant(labels))

    def is_raw(self, labels: Tensor) -> bool:
        """Return whether the tensor has no labels but those of elements of stored tables."""
        return self._element_labels.has_all(narrow_constant(labels))

    def is_head(self, labels: Tensor) -> bool:
        """Return whether the labels lie on a channel axis that a view divided."""
        return self.recording.divided.has_any(narrow_constant(labels))

    def set_labels(self, tensor: Tensor, labels: Tensor) -> None:
        """Label a tensor.

        Raises:
            AssertionError: the label tensor has another shape (a wrong rule).
        """
        assert labels.shape == tensor.shape, (labels.shape, tensor.shape)
        self._labels[tensor] = labels
        self.lifetimes.note_labels(tensor, labels)

    def weight_view(self, tensor: Tensor) -> WeightView | None:
        """Return which part of which stored weight the tensor is, or None if it is not one."""
        if tensor in self._labels:
            return None
        view: WeightView | None = self._weight_views.get(tensor)
        return view

    def is_stored(self, tensor: Tensor) -> bool:
        """Return whether the tensor is a stored weight or a view of one, however it was used."""
        return tensor in self._weight_views

    def _stored_name(self, tensor: Tensor) -> str | None:
        return self._weight_views[tensor].name if self.is_stored(tensor) else None

    def set_weight_view(self, tensor: Tensor, view: WeightView) -> None:
        """Say that ``tensor`` is a view of a parameter."""
        self._weight_views[tensor] = view

    def axis_labels(self, tensor: Tensor, position: int) -> Tensor | None:
        """Return ``[size]`` labels of one axis of a stored weight, or None if it is not stored."""
        view = self.weight_view(tensor)
        if view is None:
            return None
        axis = view.axes[position]
        if axis is None:
            return torch.tensor([NEUTRAL]).expand(tensor.shape[position])
        if isinstance(axis, int):
            own = self._stored_axis(view, axis)
            start, size = view.starts[position], tensor.shape[position]
            return self.recording.read((view.name, axis), own, start, size)
        channels = [place for place in axis if place in CHANNEL_AXES]
        if len(channels) != 1:
            return None
        own, sizes = self._stored_axis(view, channels[0]), [view.shape[place] for place in axis]
        return along(own, axis.index(channels[0]), sizes).reshape(-1)

    def stored_labels(self, tensor: Tensor, position: int) -> Tensor:
        """Return ``[size]`` labels of one axis of a tensor that is known to be stored."""
        labels = self.axis_labels(tensor, position)
        assert labels is not None
        return labels

    def matrix_labels(self, tensor: Tensor, position: int) -> Tensor | None:
        """Return the labels of an axis of a matrix: two merged ones of a stack, too."""
        view = self.weight_view(tensor)
        if view is not None and isinstance(axis := view.axes[position], tuple) and view.is_stack:
            return self.recording.merged(view, axis) if len(axis) == 2 else None
        return self.axis_labels(tensor, position)

    def _stored_axis(self, view: WeightView, axis: int) -> Tensor:
        """Return the labels of one axis of a parameter or buffer, fresh at its first use."""
        axes = self.recording.axis_labels.setdefault(view.name, {})
        if axis not in axes:
            size = view.shape[axis]
            axes[axis] = self.store.fresh(size) if size > 1 else torch.tensor([NEUTRAL])
        return axes[axis]

    def channels(self, tensor: Tensor, position: int) -> Tensor | None:
        """Return the labels of a weight's axis if channels may lie along it: not of a kernel's."""
        view = self._weight_views.get(tensor)
        axis = None if view is None else view.axes[position]
        places = axis if isinstance(axis, tuple) else (axis,)
        if tensor.shape[position] == 1 or not set(places) & set(CHANNEL_AXES):
            return None
        return self.axis_labels(tensor, position)

    def tie_empty(self, tensor: Tensor, labels: Tensor) -> None:
        """Tie the axes of a stored weight without elements to labels beside which it lies."""
        for name in self.sources.of(tensor):
            view = next(each for each in self._weight_views.values() if each.name == name)
            for axis in range(-min(len(view.shape), labels.ndim), 0):
                if view.shape[axis] == labels.shape[axis] > 1:
                    own = self._stored_axis(view, axis % len(view.shape))
                    self.store.unite(own, self.channel_labels(labels, axis))

    def note_sizes(self, labels: Tensor, part: int = 0) -> None:
        """Note the sizes of labelled axes that the running module's code has just named."""
        caller = self.modules.caller()
        if caller is None or not labels.numel():
            return
        compact = narrow_alike(labels)
        self.recording.size_uses += [
            SizeUse(module=caller, labels=compact, axis=axis, part=part)
            for axis, size in enumerate(compact.shape)
            if size > 1
        ]

    def note_mean(self, channels: Tensor, axis: int | None) -> None:
        """Note a mean over channels, or a norm without weights: its module's sizes, its axis.

        Args:
            channels: ``[size]`` labels, or ``[groups, size of a group]``.
            axis: the axis that it normalises over, counted from the end; None = within groups.
        """
        module = self.modules.current
        self.recording.size_uses += [
            SizeUse(module=module, labels=labels, axis=0)
            for labels in (channels, channels.reshape(-1))
        ]
        if axis is not None:
            mean = RecordedMean(module=module, labels=channels, axis=axis)
            self.recording.means.append(mean)

    def freeze_inputs(self, call: OpCall, reason: str) -> None:
        """Freeze all labels that enter an op."""
        for tensor in call.tensors():
            labels = self.labels_of(tensor)
            if not is_neutral(labels):
                self.store.freeze(labels, self.cause(call, reason))

    def set_unlabelled(self, call: OpCall, reason: str) -> None:
        """Give the outputs one frozen label: they hold data without channels."""
        for tensor in call.outputs():
            self.set_labels(tensor, self.store.frozen(self.cause(call, reason), tensor.shape))

    def freeze_all(self, call: OpCall, reason: str) -> None:
        """Freeze what goes into an op, and what comes out of it."""
        self.freeze_inputs(call, reason)
        self.set_unlabelled(call, reason)

    # ChannelGather modules are one opaque operation

    def _before_module(self, module: nn.Module, args: Sequence[Any]) -> None:
        if isinstance(module, ChannelGather):
            self._gather_depth += 1
        elif isinstance(module, _InstanceNorm) and not module.affine and args:
            first = 1 if args[0].ndim == module._get_no_batch_dim() + 1 else 0
            use = SizeUse(
                module=self.modules.current,
                labels=self.channel_labels(self.labels_of(args[0]), first),
                axis=0,
            )
            self.recording.size_uses.append(use)

    def _note_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the channels of the first input of a module that has some."""
        for tensor in tensors_in((args, kwargs)):
            labels = self.labels_of(tensor) if tensor in self._labels else neutral(())
            if axes := varying_axes(labels):
                for axis in set(range(labels.ndim)) - {axes[-1]}:
                    labels = labels.narrow(axis, 0, 1)
                if not bool((labels == NEUTRAL).any()):
                    self.recording.inputs.setdefault(self.modules.current, labels.reshape(-1))
                break

    def _after_module(self, module: nn.Module, args: Sequence[Any], out: Any) -> None:
        if not isinstance(module, ChannelGather):
            return
        in_labels = self.channel_labels(self.labels_of(args[0]), 1)
        out_labels = self.store.fresh(out.shape[1])
        self.set_labels(out, along(out_labels, 1, out.shape))
        self.recording.gathers.append(
            RecordedGather(module=self.modules.current, in_labels=in_labels, out_labels=out_labels)
        )
        self._gather_depth -= 1

    def _quiet(self, hook: Callable[..., None]) -> Callable[..., None]:
        """Return a module hook whose own operations, on labels, are not recorded."""

        def quiet_hook(*args: Any) -> None:
            self._is_quiet = True
            try:
                hook(*args)
            finally:
                self._is_quiet = False

        return quiet_hook

    def channel_labels(self, labels: Tensor, axis: int) -> Tensor:
        """Return ``[size]`` labels along one axis; positions along other axes are united."""
        first = labels
        for other in range(labels.ndim):
            if other != axis % labels.ndim:
                first = first.narrow(other, 0, 1)
        if any(other != axis % labels.ndim for other in varying_axes(labels)):
            self.store.unite(labels, first)
        return first.reshape(-1)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record everything that runs while the context is open."""
        with ExitStack() as stack:
            quiet = self._quiet
            stack.callback(register_module_forward_hook(quiet(self._after_module)).remove)
            stack.enter_context(self.modules.tracking())
            stack.callback(register_module_forward_pre_hook(quiet(self._before_module)).remove)
            for module in self._model.modules():
                if is_custom(type(module)) and not isinstance(module, torch.jit.ScriptModule):
                    add, hook = module.register_forward_pre_hook, quiet(self._note_input)
                    stack.callback(add(hook, with_kwargs=True).remove)
            stack.enter_context(self)
            reads = stack.enter_context(attribute_reads(self._model))
            yield
            self.recording.reads |= self.modules.named(reads)


def unknown_op(recorder: LabelRecorder, call: OpCall) -> None:
    """Freeze everything an op without a rule touches."""
    recorder.freeze_all(call, f"no rule for aten.{call.name}")
