"""Hooks that show what each convolution and linear layer of a network reads."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.masks import IntArray
from prunegraph.graph import OpNode, StructureGraph, copy_network, unwrap
from prunegraph.graph.module_sizes import is_self_attention, slim_all_attentions
from prunegraph.graph.trace.calls import CallMode
from prunegraph.layerwise.order import hooked


@dataclass(frozen=True, eq=False)
class Read:
    """One call of a layer, before it runs.

    Attributes:
        op: the operation.
        module: the layer.
        activation: what it reads. A view that no other layer has, so that the gradient that
            arrives here is the layer's own share, whoever else reads the same tensor.
        axis: the activation's channel axis.
        units: unit at each position of that axis.
    """

    op: OpNode
    module: nn.Module
    activation: Tensor
    axis: int
    units: IntArray

    @cached_property
    def unique(self) -> IntArray:
        """``[U]`` the distinct units, ascending."""
        return np.unique(self.units)

    @cached_property
    def column(self) -> Tensor:
        """``[C]`` position in ``unique`` of each channel's unit, on the activation's device."""
        inverse = np.searchsorted(self.unique, self.units)
        return torch.from_numpy(inverse).to(self.activation.device)

    def by_unit(self, values: Tensor) -> Tensor:
        """Return the sums ``[..., U]`` of values ``[..., C]`` over each unit's channels."""
        sums = values.new_zeros(*values.shape[:-1], len(self.unique))
        return sums.index_add_(-1, self.column, values)


def readable_copy(
    model: nn.Module,
    device: str | torch.device,
    dtype: torch.dtype | None = torch.float32,
) -> nn.Module:
    """Return a copy of a network to measure on: in eval mode, no gradients of weights.

    ``nn.MultiheadAttention`` uses the weight of its output layer without calling that layer; in the
    copy a module that computes the same takes its place, so that what enters the layer is seen.
    """
    dense = slim_all_attentions(copy_network(unwrap(model)))
    return dense.to(device, dtype).eval().requires_grad_(False)


@contextmanager
def layer_inputs(
    model: nn.Module,
    graph: StructureGraph,
    visit: Callable[[Read], None],
    *,
    attentions: bool = False,
) -> Iterator["LinearCalls"]:
    """Show each read of prunable units to ``visit`` while the network runs.

    Layers that are called as modules of the network are seen, and those whose weight is given to
    ``linear`` (``LinearCalls``); a weight that another function or a scripted module uses is not.

    Args:
        model: the network; its hooks are gone afterwards.
        graph: its structure.
        visit: called before each call of a layer.
        attentions: shows what queries, keys and values of ``nn.MultiheadAttention`` are made of,
            too, where that is one tensor; its weight is ``in_proj_weight``.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    handles = []
    for op in _called(graph):
        path, _, leaf = str(op.param).rpartition(".")
        module, weight = modules.get(path), parameters.get(str(op.param))
        if module is None or isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            continue
        if getattr(module, "weight", None) is weight:
            handles.append(module.register_forward_pre_hook(_hook(op, visit)))
        elif attentions and is_self_attention(module, leaf):
            handles.append(module.register_forward_pre_hook(_hook(op, visit, copies=3)))
    with hooked(handles), LinearCalls(model) as calls:
        yield calls


class LinearCalls(CallMode):
    """Where a network gives the weight of a linear layer to a function, calls the layer.

    So do the attentions of Swin and BEiT; the hooks of their layers see nothing otherwise.

    Args:
        model: the network.

    Attributes:
        needed: whether there has been such a call.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.needed = False
        self._layers = {
            id(item.weight): item
            for item in model.modules()
            if isinstance(item, nn.Linear)
            and type(item).forward is nn.Linear.forward
            and isinstance(item.weight, nn.Parameter)
        }
        self._running: list[nn.Module] = []

    def __enter__(self) -> "LinearCalls":
        """Follow which layers run."""
        self._handles = ExitStack()
        for item in self._layers.values():
            self._handles.enter_context(item.register_forward_pre_hook(self._begin))
            self._handles.enter_context(item.register_forward_hook(self._end))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Let the network be as it was."""
        super().__exit__(*exception)
        self._handles.close()

    def _begin(self, layer: nn.Module, _: Any) -> None:
        self._running.append(layer)

    def _end(self, *_: Any) -> None:
        self._running.pop()

    def call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the function, or the layer in its place."""
        if function is F.linear:
            inputs, weight, bias = linear_arguments(*args, **kwargs)
            layer = self._layers.get(id(weight))
            if layer is not None and layer not in self._running:
                own: Tensor | None = layer.bias
                if own is bias or own is None:
                    self.needed = True
                    outputs = layer(inputs)
                    return outputs if own is bias else outputs + bias
        return function(*args, **kwargs)


def linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the arguments of ``linear`` in order."""
    return input, weight, bias


def _called(graph: StructureGraph) -> Iterable[OpNode]:
    """Return the op of each weight: where there are several, one that reads it as a layer does."""
    found: dict[str, OpNode] = {}
    for op in graph.ops:
        own = graph.param_units.get(str(op.param), {}).get(1)
        as_layer = own is not None and np.array_equal(own, op.in_units)
        if op.param and (op.param not in found or as_layer):
            found[op.param] = op
    return found.values()


def _hook(
    op: OpNode, visit: Callable[[Read], None], copies: int = 1
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    """Return a hook that shows the first argument, which is also the next ones of ``copies``."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if len(args) < copies or any(other is not args[0] for other in args[:copies]):
            return None
        axis = 1 if op.kind == "conv" else args[0].dim() - 1
        units = _input_units(op, args[0].shape[axis])
        if units is None:
            return None
        view = args[0].view_as(args[0])
        visit(Read(op, module, view, axis, units))
        return (*[view] * copies, *args[copies:])

    return hook


def _input_units(op: OpNode, width: int) -> IntArray | None:
    """Return the unit at each of ``width`` input channels of an op, or None if unknown."""
    known = op.out_units[:: max(op.out_units.size // width, 1)] if op.depthwise else op.in_units
    if not known.size or width % known.size:
        return None
    return np.tile(known, width // known.size)  # a grouped convolution's groups read alike
