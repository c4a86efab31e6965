"""Weights of a copied network that are made when an operation reads them, and forgotten then.

So a pruned or masked copy needs the memory of one weight at a time, in any precision.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunegraph.graph.trace.calls import written_by

SMALL = 4096
"""Parameters of at most as many values are copied at once: they may be counters."""

_ATEN = torch.ops.aten


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """How a weight is made of a dense network's.

    Attributes:
        source: the dense network's values.
        keep: axis -> ``[size]`` booleans, True = keep; only axes that lose something.
        cut: what is not kept leaves; False = it becomes zero.
        factors: ``[size]`` numbers for each of the first axes, by which the values are multiplied.
        dtype: the precision of the result.
        seed: with which values are drawn where the source has none: it is on the meta device.
    """

    source: Tensor
    keep: Mapping[int, Tensor] = field(default_factory=dict)
    cut: bool = False
    factors: tuple[Tensor, ...] = ()
    dtype: torch.dtype
    seed: int = 0

    @property
    def shape(self) -> list[int]:
        """Return the shape of the result."""
        shape = [*self.source.shape]
        for axis, kept in self.keep.items() if self.cut else ():
            shape[axis] = int(kept.sum())
        return shape

    def rows(self, index: Tensor) -> "Change":
        """Return how some rows are made, where none is cut."""
        keep = {axis: kept[index] if axis == 0 else kept for axis, kept in self.keep.items()}
        factors = tuple(by if axis else by[index] for axis, by in enumerate(self.factors))
        return replace(self, source=self._values()[index], keep=keep, factors=factors)

    def _values(self) -> Tensor:
        """Return the source, or what is drawn for it."""
        return drawn(self.source, self.seed) if self.source.is_meta else self.source

    def made(self) -> Tensor:
        """Return the values, in memory of their own if they differ from the dense network's."""
        source = self._values()
        made = narrowed(source, self.keep) if self.cut else source
        for axis in range(made.ndim):
            if (by := self._by(axis)) is not None:
                by = by.view([-1 if other == axis else 1 for other in range(made.ndim)])
                made = made * by if made is source else made.mul_(by)
        return made.to(self.dtype)

    def _by(self, axis: int) -> Tensor | None:
        """Return by what the values along an axis are multiplied: zeros silence."""
        kept = self.keep.get(axis)
        by = self.factors[axis] if axis < len(self.factors) else None
        if kept is None:
            return by
        if by is None:
            return None if self.cut else kept.to(self.source.dtype)
        return by[kept] if self.cut else by * kept


def drawn(tensor: Tensor, seed: int) -> Tensor:
    """Return values that are drawn for a tensor: matrices keep the size of their inputs."""
    kind = torch.float64 if tensor.dtype is torch.float64 else torch.float32
    made = torch.empty(tensor.shape, dtype=kind)
    return draw(made, torch.Generator().manual_seed(seed)).to(tensor.dtype)


def draw(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a tensor's values in place; return it."""
    fan_in = math.prod(tensor.shape[1:])
    most = (3 / fan_in) ** 0.5
    return tensor.uniform_(*((0.5, 1.5) if fan_in == 1 else (-most, most)), generator=generator)


def narrowed(data: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """Return the kept positions; the data itself if all are."""
    for axis, kept in keep.items():
        data = data.index_select(axis, kept.nonzero().flatten())
    return data


class LateWeight(Tensor):
    """A tensor without memory: operations get what its ``change`` makes.

    One that an operation has written into has memory of its own from then on.
    """

    _change: list[Change]
    """The one change, shared with the tensors that are detached from this one."""

    @staticmethod
    def __new__(cls, change: Change | list[Change]) -> "LateWeight":
        """Return the weight that a change makes."""
        shared = change if isinstance(change, list) else [change]
        source, shape, dtype = shared[0].source, shared[0].shape, shared[0].dtype
        device = torch.device("cpu") if source.is_meta else source.device
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._change = shared
        return made

    @property
    def change(self) -> Change:
        """How the values are made."""
        return self._change[0]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # C's

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub is of the disabled one
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on values that are made for it."""
        if func is _ATEN.detach.default:
            return cls(args[0]._change)
        kwargs = kwargs or {}
        for item in written_by(func, args, kwargs):
            if isinstance(item, cls):
                own = item.change.made().clone()
                item._change[0] = Change(source=own, dtype=own.dtype)
        if func is _ATEN.embedding.default and isinstance(args[0], cls) and not kwargs:
            change: Change = args[0].change
            if not (change.cut and 0 in change.keep) and args[1].numel() < len(change.source):
                found, places = args[1].unique(return_inverse=True)
                return func(change.rows(found).made(), places)
        if kwargs or any(_holds_tensors(item) for item in args):
            args, kwargs = tree_map_only(cls, lambda item: item.change.made(), (args, kwargs))
            return func(*args, **kwargs)
        return func(*(item.change.made() if isinstance(item, cls) else item for item in args))


def _holds_tensors(item: object) -> bool:
    return isinstance(item, tuple | list) and any(isinstance(each, Tensor) for each in item)


def late(tensor: Tensor, change: Change) -> nn.Parameter:
    """Return a parameter in the place of another one, whose values are made later."""
    return nn.Parameter(LateWeight(change), requires_grad=tensor.requires_grad)


def can_be_late(tensor: Tensor) -> bool:
    """Return whether a tensor is a plain, large parameter: small ones may be counters."""
    return (
        type(tensor) in (nn.Parameter, LateWeight)
        and tensor.numel() > SMALL
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
    )


def change_of(tensor: Tensor) -> Change:
    """Return how a parameter is made: as it is, if it is no late one."""
    if isinstance(tensor, LateWeight):
        return tensor.change
    return Change(source=tensor.detach(), dtype=tensor.dtype)


@contextmanager
def _new_parameters() -> Iterator[None]:
    """Let modules whose precision changes take new parameters."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def cast_network(network: nn.Module, dtype: torch.dtype, *, lately: bool) -> None:
    """Put a copy into another precision, as ``to`` does, but for complex numbers.

    Args:
        network: the copy.
        dtype: the precision.
        lately: weights are cast when they are read.
    """

    def cast_one(item: Tensor) -> Tensor:
        if not item.is_floating_point():
            return item
        if lately and can_be_late(item):
            return LateWeight(replace(change_of(item), dtype=dtype))
        return item.to(dtype)

    with _new_parameters():
        network._apply(cast_one)
