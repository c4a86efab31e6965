"""Views of stored weights: what ops that move axes make of a parameter or buffer."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from prunegraph.graph.trace.attribute_reads import set_after_init

Axis = int | tuple[int, ...] | None
"""An axis of a stored weight, several that were merged in order, or one that was added."""


@dataclass(frozen=True, kw_only=True)
class WeightView:
    """A stored parameter or buffer, perhaps with its axes permuted and narrowed.

    Attributes:
        name: of the parameter or buffer.
        shape: of the parameter or buffer.
        axes: axis of the parameter at each axis of the view; None where one was added. Those that
            are left out are of size 1, or selected, or, of a computed one, were reduced.
        starts: first position along each axis of the view.
        selected: axes of the parameter of which one position is left, and the position.
        computed: its values are other than the stored ones; see ``computed_weights``.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    starts: tuple[int, ...]
    selected: tuple[tuple[int, int], ...] = ()
    computed: bool = False

    @property
    def is_stack(self) -> bool:
        """Whether it may hold a matrix for each head or expert."""
        return len(self.shape) == 3 and not self.computed

    def arranged(self, places: Iterable[int | None]) -> "WeightView":
        """Return the view with its axes in another order, and new ones where a place is None."""
        order = [*places]
        return replace(
            self,
            axes=tuple(None if place is None else self.axes[place] for place in order),
            starts=tuple(0 if place is None else self.starts[place] for place in order),
        )

    def narrowed(self, axis: int, start: int) -> "WeightView":
        """Return the view that begins ``start`` positions later along one axis."""
        starts = list(self.starts)
        starts[axis] += start
        return replace(self, starts=tuple(starts))

    def at(self, place: int, position: int) -> "WeightView | None":
        """Return one position of an axis, which is left out; None of axes that were merged."""
        axis, selected = self.axes[place], self.selected
        if isinstance(axis, tuple):
            return None
        if axis is not None:
            selected = (*selected, (axis, self.starts[place] + position))
        others = (other for other in range(len(self.axes)) if other != place)
        return replace(self.arranged(others), selected=selected)

    def flattened(self, before: Sequence[int], after: Sequence[int]) -> "WeightView | None":
        """Return the matrices of a repeated stack one after the other, as ``matmul`` takes them."""
        repeated = len(after) == 3 and not any(axis is not None for axis in self.axes[:-3])
        if not repeated or list(before[-2:]) != list(after[1:]):
            return None
        return self.arranged([None, -2, -1])

    def viewed(self, before: Sequence[int], after: Sequence[int]) -> "WeightView | None":
        """Return the view in another shape; None if its axes cannot be told."""
        reshaped = self.reshaped(before, after)
        if reshaped is None and self.is_stack:  # as einsum does with heads and experts
            return self.merged(before, after) or self.flattened(before, after)
        return reshaped

    def reshaped(self, before: Sequence[int], after: Sequence[int]) -> "WeightView | None":
        """Return the view in a shape that differs by axes of size 1; None if it differs by more."""
        wide = [axis for axis, size in enumerate(before) if size > 1]
        if [before[axis] for axis in wide] != [size for size in after if size > 1]:
            return None
        left_out = [axis for size, axis in zip(before, self.axes, strict=True) if size == 1]
        if any(isinstance(axis, int) and self.shape[axis] > 1 for axis in left_out):
            return None
        left = iter(wide)
        return self.arranged(next(left) if size > 1 else None for size in after)

    def merged(self, before: Sequence[int], after: Sequence[int]) -> "WeightView | None":
        """Return the view with neighbouring axes merged, or divided again; None if it is another.

        Axes of size 1 come and go.
        """
        wide = [place for place, size in enumerate(before) if size > 1]
        new = [place for place, size in enumerate(after) if size > 1]
        axes: list[Axis] = [None] * len(after)
        starts = [0] * len(after)
        sizes = [before[place] for place in wide], [after[place] for place in new]
        for own, other in _grouped(*sizes):
            stored = [self.axes[wide[place]] for place in own]
            if len(own) == len(other) == 1:
                axes[new[other[0]]] = stored[0]
                starts[new[other[0]]] = self.starts[wide[own[0]]]
                continue
            flat = [a for each in stored for a in (each if isinstance(each, tuple) else (each,))]
            single = tuple(axis for axis in flat if axis is not None and self.shape[axis] > 1)
            if len(other) == 1 and prod(self.shape[a] for a in single) == sizes[1][other[0]]:
                axes[new[other[0]]] = single
            elif [self.shape[axis] for axis in single] == [sizes[1][place] for place in other]:
                for place, axis in zip(other, single, strict=True):
                    axes[new[place]] = axis
            else:
                return None
        return replace(self, axes=tuple(axes), starts=tuple(starts))


def _grouped(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return which axes of one shape make which axes of another, the smallest parts in order."""
    parts: list[tuple[list[int], list[int]]] = []
    left, right = 0, 0
    while left < len(before):
        own, other = [left], [right]
        while (wide := prod(before[i] for i in own)) != (new := prod(after[i] for i in other)):
            side = own if wide < new else other
            side.append(side[-1] + 1)
        parts.append((own, other))
        left, right = own[-1] + 1, other[-1] + 1
    return parts


def constants(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return what a network holds beside its parameters, by all names.

    Buffers, and tensors that are plain attributes of modules, as tables of positions may be, unless
    they are caches: a forward that keeps what it computes makes it anew where widths are others.
    """
    plain = [
        (f"{path}.{name}" if path else name, value)
        for path, module in model.named_modules(remove_duplicate=False)
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
        and value.layout is torch.strided
        and name not in set_after_init(type(module))
    ]
    return [*model.named_buffers(remove_duplicate=False), *plain]


class Sources:
    """Knows which tensors are made of stored ones and constants alone, and of which.

    Args:
        stored: returns the name of the parameter or buffer that a tensor is, or is a view of.
        is_constant: returns whether a tensor that is not was made of sizes and numbers.
    """

    def __init__(
        self, stored: Callable[[Tensor], str | None], is_constant: Callable[[Tensor], bool]
    ) -> None:
        self._stored, self._is_constant = stored, is_constant
        self._names = WeakTensorKeyDictionary()

    def of(self, tensor: Tensor) -> frozenset[str]:
        """Return the names of the parameters and buffers that a tensor is made of."""
        if tensor in self._names:
            names: frozenset[str] = self._names[tensor]
            return names
        name = self._stored(tensor)
        return frozenset() if name is None else frozenset({name})

    def note(self, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
        """Note what an op's outputs are made of."""
        names: frozenset[str] = frozenset()
        for tensor in inputs:
            own = self.of(tensor)
            if not own and not self._is_constant(tensor):
                names = frozenset()
                break
            names |= own
        for tensor in outputs:
            if names:
                self._names[tensor] = names
            else:
                self._names.pop(tensor, None)  # what was written into, in place


def recurrent_weights(model: nn.Module) -> set[str]:
    """Return the names of the parameters of torch's recurrent layers and cells."""
    return {
        name
        for path, module in model.named_modules()
        if isinstance(module, nn.RNNBase | nn.RNNCellBase)
        for name, _ in module.named_parameters(path, recurse=False)
    }
