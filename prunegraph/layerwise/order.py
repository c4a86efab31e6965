"""The blocks of a network in the order in which they run, and which of them feed one another."""

import fnmatch
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from prunegraph.core.errors import ConfigError
from prunegraph.layerwise.weights import PrunableWeight

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a module's forward."""

Place = int | str
"""Position or name of the argument that holds the hidden states."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Segment:
    """Blocks that run one after the other, or a single one.

    Attributes:
        blocks: names of modules.
        place: the argument of each block after the first that is the output of the one before;
            None if there is one block.
        first: whether the output is the first item of what a block returns.
        alike: whether all blocks are given the same other arguments.
        size: bytes of the hidden states of one batch.
    """

    blocks: Sequence[str]
    place: Place | None = None
    first: bool = False
    alike: bool = True
    size: int = 0


@dataclass(frozen=True, eq=False)
class _Mark:
    """Stands for one tensor, which need not stay in memory.

    Attributes:
        size: its bytes.
    """

    size: int


@dataclass(eq=False)
class _Calls:
    """What a block was given and gave, each time it ran; marks in the place of tensors."""

    arguments: list[Arguments] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


def find_segments(
    model: nn.Module,
    weights: Mapping[str, PrunableWeight],
    run: Callable[[], Any],
    *,
    blocks: str | None = None,
) -> list[Segment]:
    """Return what is pruned together, in the order in which it runs.

    Blocks are the children of the outermost ``nn.ModuleList`` and ``nn.Sequential`` of which at
    least two hold prunable weights: decoder layers, stages, layers of a plain network. A layer
    outside of them is a block of its own. Blocks feed one another if each runs once and is given
    what the one before returned.

    Args:
        model: the network.
        weights: its prunable weights.
        run: runs the network on one batch.
        blocks: glob of the names of modules that are blocks, as ``"model.layers.*"``; default: as
            above.

    Raises:
        ConfigError: no module with prunable weights has such a name.
    """
    groups = group_blocks(model, [weight.module for weight in weights.values()], blocks)
    calls = _record(model, [name for names in groups for name in names], run)
    order = {name: number for number, name in enumerate(calls)}
    segments: list[Segment] = []
    for names in groups:
        ran = sorted((name for name in names if name in calls), key=order.__getitem__)
        chain = _chain(ran, calls)
        segments += [Segment(blocks=[name]) for name in ran] if chain is None else [chain]
    return sorted(segments, key=lambda segment: order[segment.blocks[0]])


def group_blocks(model: nn.Module, layers: Sequence[str], blocks: str | None) -> list[list[str]]:
    """Return the names of blocks, grouped by the container that holds them.

    Raises:
        ConfigError: no module with prunable weights has such a name.
    """
    if blocks is None:
        groups = list(_containers(model, "", layers))
    else:
        named = [name for name, _ in model.named_modules() if fnmatch.fnmatchcase(name, blocks)]
        outer = [name for name in named if not any(_inside(name, [other]) for other in named)]
        groups = [[name for name in outer if any(_holds(name, layer) for layer in layers)]]
        if not groups[0]:
            msg = f"blocks={blocks!r} names no module with prunable weights: give a glob of names"
            raise ConfigError(msg)
    held = [name for names in groups for name in names]
    alone = [layer for layer in layers if not any(_holds(name, layer) for name in held)]
    return [*groups, *([layer] for layer in dict.fromkeys(alone))]


def _containers(module: nn.Module, path: str, layers: Sequence[str]) -> Iterator[list[str]]:
    """Yield the blocks of each outermost container below a module."""
    children = [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]
    filled = [name for name, _ in children if any(_holds(name, layer) for layer in layers)]
    if isinstance(module, nn.ModuleList | nn.Sequential) and len(filled) > 1:
        # the first to the last: what stands between two blocks feeds them too
        names = [name for name, _ in children]
        yield names[names.index(filled[0]) : names.index(filled[-1]) + 1]
        return
    for name, child in children:
        yield from _containers(child, name, layers)


def _holds(block: str, layer: str) -> bool:
    return layer == block or layer.startswith(f"{block}.")


def _inside(name: str, others: Iterable[str]) -> bool:
    return any(name != other and name.startswith(f"{other}.") for other in others)


def _record(model: nn.Module, names: Sequence[str], run: Callable[[], Any]) -> dict[str, _Calls]:
    """Return what each block was given and gave, in the order of their first calls."""
    calls: dict[str, _Calls] = {}
    marks: Any = WeakTensorKeyDictionary()

    def mark(tensor: Tensor) -> _Mark:
        return marks.setdefault(tensor, _Mark(tensor.numel() * tensor.element_size()))  # type: ignore[no-any-return]

    def watch(name: str) -> list[Any]:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            arguments = tree_map_only(Tensor, mark, (args, dict(kwargs)))
            calls.setdefault(name, _Calls()).arguments.append(arguments)

        def after(_: nn.Module, args: Any, outputs: Any) -> None:
            calls[name].outputs.append(tree_map_only(Tensor, mark, outputs))

        module = model.get_submodule(name)
        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]

    with hooked(handle for name in names for handle in watch(name)), torch.no_grad():
        run()
    return calls


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Remove hooks afterwards."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _chain(names: Sequence[str], calls: Mapping[str, _Calls]) -> Segment | None:
    """Return blocks as a chain if each is given what the one before returned; None otherwise."""
    if len(names) < 2 or any(len(calls[name].arguments) != 1 for name in names):
        return None
    found: set[tuple[Place, bool]] | None = None
    for before, name in itertools.pairwise(names):
        outputs, arguments = calls[before].outputs[0], calls[name].arguments[0]
        ways = set(_ways(outputs, arguments))
        found = ways if found is None else found & ways
        if not found:
            return None
    assert found
    place, first = min(found, key=str)
    rest = [_others(calls[name].arguments[0], place) for name in names]
    alike = all(_same(rest[0], other) for other in rest)
    outputs = calls[names[0]].outputs[0]
    states = outputs[0] if first else outputs
    return Segment(blocks=names, place=place, first=first, alike=alike, size=_bytes(states))


def _ways(outputs: Any, arguments: Arguments) -> Iterator[tuple[Place, bool]]:
    """Yield where the outputs of a block, or their first item, stand among arguments."""
    args, kwargs = arguments
    places: list[tuple[Place, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if value is outputs:
            yield place, False
        elif isinstance(outputs, tuple) and outputs and value is outputs[0]:
            yield place, True


def put(arguments: Arguments, place: Place, value: Any) -> Arguments:
    """Return arguments with another value at one place."""
    args, kwargs = arguments
    if isinstance(place, str):
        return args, {**kwargs, place: value}
    return (*args[:place], value, *args[place + 1 :]), kwargs


def _others(arguments: Arguments, place: Place) -> Arguments:
    return put(arguments, place, None)


def _same(one: Any, other: Any) -> bool:
    """Tell whether two structures hold marks of the same tensors and equal plain values."""
    if one is other:
        return True
    if isinstance(one, tuple | list) and type(one) is type(other) and len(one) == len(other):
        return all(_same(left, right) for left, right in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return all(_same(one[name], other[name]) for name in one)
    plain = isinstance(one, int | float | str | bool) and isinstance(other, type(one))
    return plain and bool(one == other)


def _bytes(states: Any) -> int:
    return states.size if isinstance(states, _Mark) else 0
