"""The modules of a network: units inside of one that a single linear layer reads."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.masks import IntArray
from prunegraph.graph import StructureGraph
from prunegraph.layerwise.admm import Activation
from prunegraph.layerwise.weights import prunable_weights

ACTIVATIONS: tuple[Activation, ...] = (F.silu, F.gelu, F.relu, torch.tanh, torch.sigmoid)
"""Tried after those that the module itself holds."""

NEAR = 0.02
"""Root of the relative squared error up to which outputs in bfloat16 are those of an activation."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Module:
    """Units that one linear layer reads.

    Attributes:
        group: their number in the graph.
        units: ``[B]`` at each input of the layer.
        reader: its weight.
        writers: weights of linear layers, each of which gives a value for each of the inputs; of
            neurons, with a gate or without.
    """

    group: int
    units: IntArray
    reader: str
    writers: tuple[str, ...]


def linear_layers(graph: StructureGraph, model: nn.Module) -> dict[str, int]:
    """Return the weights of linear layers that are called once, as modules, and when each is."""
    calls = Counter(str(op.param) for op in graph.ops)
    weights = prunable_weights(model)
    return {
        str(op.param): op.depth
        for op in graph.ops
        if op.param in weights
        and len(weights[op.param].shape) == 2
        and calls[op.param] == 1
        and op.name == weights[op.param].module
    }


def find_modules(graph: StructureGraph, model: nn.Module, *, heads: bool) -> list[Module]:
    """Return the modules whose units may leave, in the order in which they run.

    Residual streams are none: several layers read them.

    Args:
        graph: the structure.
        model: the network.
        heads: whether there may be others than neurons: heads of attention.
    """
    layers, found = linear_layers(graph, model), []
    for number in graph.free_groups.tolist():
        units = graph.groups[number].units
        if graph.frozen[units].any():
            continue
        readers = [op for op in graph.ops if op.param and np.isin(op.read_units, units).any()]
        if len(readers) != 1 or readers[0].param not in layers:
            continue
        read = readers[0].in_units
        writers = [op for op in graph.ops if op.param and np.isin(op.out_units, units).any()]
        alike = len(writers) in (1, 2) and all(
            op.param in layers and np.array_equal(op.out_units, read) for op in writers
        )
        if writers and np.isin(read, units).all() and (alike or heads):
            names = tuple(str(op.param) for op in writers) if alike else ()
            reader = str(readers[0].param)
            found.append(Module(group=number, units=read, reader=reader, writers=names))
    return sorted(found, key=lambda module: layers[module.reader])


def find_activation(
    model: nn.Module, module: Module, written: list[Tensor], read: Tensor
) -> tuple[Activation, list[int]] | None:
    """Return the activation between a module's writers and its reader; None if it is none known.

    Args:
        model: the network.
        module: the module.
        written: ``[S, B]`` what each writer gives.
        read: ``[S, B]`` what the reader is given.

    Returns:
        The activation, and the numbers of the writers: first the one that goes into it.
    """
    for order in ([0, 1], [1, 0]) if len(written) == 2 else ([0],):
        for activation in _activations(model, module):
            value = activation(written[order[0]])
            if len(order) == 2:
                value = value * written[order[1]]
            if float((value - read).norm()) <= NEAR * float(read.norm()):
                return activation, order
    return None


def _activations(model: nn.Module, module: Module) -> Iterator[Activation]:
    """Yield what may be an activation: what lies beside the reader without weights, and others."""
    parent = model.get_submodule(module.reader.rpartition(".")[0].rpartition(".")[0])
    for child in parent.children():
        if next(child.parameters(), None) is None and next(child.children(), None) is None:
            yield partial(_of_copy, child)
    yield from ACTIVATIONS
    yield _gelu_tanh


def _of_copy(module: nn.Module, values: Tensor) -> Tensor:
    """Return what a module gives, which may write into what it is given."""
    found: Tensor = module(values.clone())
    return found


def _gelu_tanh(values: Tensor) -> Tensor:
    return F.gelu(values, approximate="tanh")
