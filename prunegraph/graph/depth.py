"""Depth: which sub-layers of residual blocks may leave wholly, as an analysis of its own.

A group may keep no unit at all where the layers that read it write to a residual stream and to
nothing else: then its branch adds nothing, or its last bias. Width and depth so compete under one
budget. Everything that is claimed is tried, as in ``proof``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from prunegraph.core.errors import ModelError
from prunegraph.core.masks import BoolArray
from prunegraph.core.task import ExampleInputs
from prunegraph.graph.analyse import evaluation_mode, runner, unwrap
from prunegraph.graph.branches import Leaving, numbered, without_blocks
from prunegraph.graph.costs.macs import CostModel
from prunegraph.graph.features import in_stream
from prunegraph.graph.graph import OpNode, StructureGraph
from prunegraph.graph.proof.outputs import difference_of
from prunegraph.graph.proof.subjects import Subject
from prunegraph.graph.proof.trial import ROUGH, failure_of
from prunegraph.graph.surgery import apply_mask, zero_mask
from prunegraph.graph.trace.calls import tensors_in


def with_depth(
    model: nn.Module, graph: StructureGraph, example_inputs: ExampleInputs
) -> StructureGraph:
    """Return the structure in which sub-layers of residual blocks may leave wholly.

    Where a sub-layer is a module of its own (an attention, an MLP), it leaves, and with it the norm
    that it alone reads, and a block of which nothing is left. Else its layers stay without width.
    A group between two layers of one branch keeps its minimum.

    Args:
        model: the dense network.
        graph: its structure; the fingerprint stays.
        example_inputs: what its forward takes.

    Raises:
        ModelError: no sub-layer can leave.
    """
    model = unwrap(model)
    subject = Subject(model, runner(example_inputs))
    with evaluation_mode(model):
        modules = _Modules(subject, graph, _readers(graph))
        able = _able(partial(_fails, subject, modules), list(modules.readers))
        if not able:
            msg = f"no sub-layer of {type(model).__name__} can leave wholly: leave depth out"
            raise ModelError(msg)
        parts = (able, able[::2], able[len(able) // 2 :])
        whole = modules.graph_without(able)
        right = all(_same(subject, whole, part) for part in parts)
    return whole if right else modules.graph_without(able, blocks=False)


def _readers(graph: StructureGraph) -> dict[int, list[OpNode]]:
    """Return the groups that only layers read which write to residual streams, with these."""
    stream = in_stream(graph)
    readers: dict[int, list[OpNode]] = {}
    for op in graph.ops:
        for group in np.unique(graph.group_of[op.in_units]).tolist():
            readers.setdefault(group, []).append(op)
    return {
        number: ops
        for number, ops in sorted(readers.items())
        if graph.groups[number].frozen is None
        and not stream[graph.groups[number].units].any()
        and all(stream[op.out_units].all() for op in ops)
    }


def _without(graph: StructureGraph, numbers: Sequence[int]) -> BoolArray:
    """Return the keep bits ``[N]`` without whole groups."""
    return ~np.isin(graph.group_of, numbers)


def _fails(subject: Subject, modules: "_Modules", numbers: Sequence[int]) -> bool:
    """Return whether a network cannot do without groups, its blocks left in place."""
    graph = modules.graph_without(numbers)
    return failure_of(subject, graph, _without(graph, numbers)) is not None


def _able(fails: Callable[[Sequence[int]], bool], numbers: list[int]) -> list[int]:
    """Return those of the groups that can leave, by halves where they cannot all."""
    if not numbers or not fails(numbers):
        return numbers
    half = len(numbers) // 2
    return [] if not half else [*_able(fails, numbers[:half]), *_able(fails, numbers[half:])]


def _same(subject: Subject, graph: StructureGraph, numbers: Sequence[int]) -> bool:
    """Return whether a network without the modules of groups computes what the masked one does."""
    mask = graph.mask(_without(graph, numbers))
    try:
        slim, zero = (cut(subject.model, graph, mask) for cut in (apply_mask, zero_mask))
        slim = without_blocks(slim, graph, mask.keep)
        given = (tensors_in(subject.run(each, None)) for each in (slim, zero))
        params = sum(parameter.numel() for parameter in slim.parameters())
        return difference_of(*given) <= ROUGH and params == graph.cost(mask).params
    except Exception:  # a forward may count its blocks
        return False


@dataclass(kw_only=True)
class _Branch:
    """A sub-layer that is a module of its own, and what a run shows of it."""

    number: int
    bias: str | None
    results: int = 0
    calls: int = 0
    reads: str | None = None


def _plain(module: nn.Module, but: str) -> tuple[tuple[str, object], ...]:
    """Return a module's attributes that are plain values, but for one."""
    plain = (bool, int, float, str, type(None))
    return tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, plain) and name != but
    )


def _common(names: set[str]) -> str:
    """Return the path of the smallest module that holds all parameters."""
    path = min(names)
    while path and not all(name.startswith(f"{path}.") for name in names):
        path = path.rpartition(".")[0]
    return path


class _Modules:
    """Finds the modules that leave with branches.

    Args:
        subject: the dense network.
        graph: its structure.
        branches: number of a group -> the layers that read it.
    """

    def __init__(
        self, subject: Subject, graph: StructureGraph, branches: dict[int, list[OpNode]]
    ) -> None:
        self.model, self.graph, self.readers = subject.model, graph, dict(branches)
        self.numbered = tuple(numbered(self.model))
        self.names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        self.branches: dict[str, _Branch] = {}
        for number, readers in branches.items():
            self._add(number, readers)
        self._watch(subject)

    def _add(self, number: int, readers: list[OpNode]) -> None:
        """Note a branch if a module holds it and nothing else, but one bias."""
        units = self.graph.groups[number].units
        own = {
            name
            for name, axes in self.graph.param_units.items()
            if any(np.isin(each, units).any() for each in axes.values())
        }
        path = _common(own)
        if self._differs(path):
            del self.readers[number]
            return
        biases = {f"{str(op.param).removesuffix('weight')}bias" for op in readers}
        others = set(self._under(path)) - own
        linear = all(op.kind == "linear" for op in readers)
        if path and linear and len(others) <= 1 and others <= biases:
            self.branches[path] = _Branch(number=number, bias=next(iter(others), None))

    def _differs(self, path: str) -> bool:
        """Return whether blocks are of several kinds, so that their numbers mean something.

        A cache of keys and values has another layer for sliding windows, say.
        """
        for name, paths in self.numbered:
            if any(f"{path}.".startswith(f"{own}.") for own in paths):
                kinds = {_plain(self.model.get_submodule(own), name) for own in paths}
                if len(kinds) > 1:
                    return True
        return False

    def _under(self, path: str) -> list[str]:
        return [name for name in self.names if name.startswith(f"{path}.")]

    def _watch(self, subject: Subject) -> None:
        """Run once, and see what branches return and which module made what they read."""
        made: dict[int, str] = {}
        alive: list[Any] = []  # so that no two tensors have one id
        handles = []

        def before(path: str, args: Any, kwargs: Any) -> None:
            own, given = self.branches[path], list(tensors_in((args, kwargs)))
            own.calls += 1
            own.reads = made.get(id(given[0])) if given else None

        def after(path: str, output: Any) -> None:
            alive.append(output)
            if path in self.branches:
                own = self.branches[path]
                own.results = len(output) if isinstance(output, tuple) else 0
                first = output[0] if isinstance(output, tuple) else output
                own.calls += 0 if isinstance(first, Tensor) else 2
            elif isinstance(output, Tensor):
                made[id(output)] = path

        for path, module in self.model.named_modules():
            if path in self.branches:
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _, args, kwargs, path=path: before(path, args, kwargs),
                        with_kwargs=True,
                    )
                )
            plain = not list(module.children()) and bool(module._parameters)
            if path in self.branches or plain:
                handles.append(
                    module.register_forward_hook(lambda _, __, out, path=path: after(path, out))
                )
        try:
            subject.outputs()
        finally:
            for handle in handles:
                handle.remove()
        self.branches = {path: own for path, own in self.branches.items() if own.calls == 1}

    def graph_without(self, numbers: Sequence[int], *, blocks: bool = True) -> StructureGraph:
        """Return the structure in which groups may keep no unit, with the modules that then leave.

        What norms cost counts while a branch reads them.
        """
        graph = self.graph
        groups = tuple(
            replace(group, min_keep=0) if number in numbers else group
            for number, group in enumerate(graph.groups)
        )
        leaving = [*self._branches(numbers), *self._norms(numbers)]
        leaving += self._blocks(leaving) if blocks else ()
        norms = {each.module: each.units for each in leaving if each.kind == "norm"}
        terms = [
            replace(term, present=norms.get(term.name.rpartition(".")[0]))
            for term in graph.cost_model.terms
        ]
        return replace(
            graph,
            groups=groups,
            leaving=tuple(leaving),
            numbered=self.numbered,
            cost_model=CostModel(graph.num_units, terms),
            origin=graph.fingerprint(),
        )

    def _branches(self, numbers: Sequence[int]) -> Iterator[Leaving]:
        for path, own in self.branches.items():
            if own.number in numbers:
                units = self._units([own.number])
                yield Leaving(
                    module=path, units=units, kind="branch", results=own.results, bias=own.bias
                )

    def _norms(self, numbers: Sequence[int]) -> Iterator[Leaving]:
        """Yield the modules with parameters of one axis whose outputs branches read."""
        readers: dict[str, list[int]] = {}
        for own in self.branches.values():
            if own.reads is not None:
                readers.setdefault(own.reads, []).append(own.number)
        for path, reading in readers.items():
            flat = all(item.ndim == 1 for item in self.model.get_submodule(path).parameters())
            if flat and set(reading) <= set(numbers):
                yield Leaving(module=path, units=self._units(reading), kind="norm")

    def _blocks(self, parts: Sequence[Leaving]) -> list[Leaving]:
        """Return the entries of lists that hold nothing but what leaves."""
        found = []
        for where, blocks in self.model.named_modules():
            for name, _ in blocks.named_children() if isinstance(blocks, nn.ModuleList) else ():
                path = f"{where}.{name}"
                own = [each for each in parts if each.module.startswith(f"{path}.")]
                left = {name for each in own for name in self._under(each.module)}
                if own and left >= set(self._under(path)) and not any(each.bias for each in own):
                    units = np.unique(np.concatenate([each.units for each in own]))
                    found.append(Leaving(module=path, units=units, kind="block"))
        return found

    def _units(self, numbers: Sequence[int]) -> Any:
        return np.concatenate([self.graph.groups[number].units for number in numbers])
