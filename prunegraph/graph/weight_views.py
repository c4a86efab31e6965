"""Views of stored weights: what ops that move axes make of a parameter or buffer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class WeightView:
    """A stored parameter or buffer, perhaps with its axes permuted and narrowed.

    Attributes:
        name: of the parameter or buffer.
        shape: of the parameter or buffer.
        axes: axis of the parameter at each axis of the view; None where one was added. Those that
            are left out are of size 1.
        starts: first position along each axis of the view.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[int | None, ...]
    starts: tuple[int, ...]

    def permuted(self, permutation: Sequence[int]) -> "WeightView":
        """Return the view with its axes in another order."""
        return replace(
            self,
            axes=tuple(self.axes[axis] for axis in permutation),
            starts=tuple(self.starts[axis] for axis in permutation),
        )

    def narrowed(self, axis: int, start: int) -> "WeightView":
        """Return the view that begins ``start`` positions later along one axis."""
        starts = list(self.starts)
        starts[axis] += start
        return replace(self, starts=tuple(starts))

    def reshaped(self, before: Sequence[int], after: Sequence[int]) -> "WeightView | None":
        """Return the view in a shape that differs by axes of size 1; None if it differs by more."""
        wide = [axis for axis, size in enumerate(before) if size > 1]
        if [before[axis] for axis in wide] != [size for size in after if size > 1]:
            return None
        left_out = [axis for size, axis in zip(before, self.axes, strict=True) if size == 1]
        if any(axis is not None and self.shape[axis] > 1 for axis in left_out):
            return None
        left = iter(wide)
        order = [next(left) if size > 1 else None for size in after]
        return replace(
            self,
            axes=tuple(None if axis is None else self.axes[axis] for axis in order),
            starts=tuple(0 if axis is None else self.starts[axis] for axis in order),
        )


def recurrent_weights(model: nn.Module) -> set[str]:
    """Return the names of the parameters of torch's recurrent layers and cells."""
    return {
        name
        for path, module in model.named_modules()
        if isinstance(module, nn.RNNBase | nn.RNNCellBase)
        for name, _ in module.named_parameters(path, recurse=False)
    }


def moved(
    view: WeightView,
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    out: Sequence[Tensor],
) -> list[WeightView] | None:
    """Return the views of the same weight that an op's outputs are; None if they are none.

    Args:
        view: which view the op's first argument is.
        name: of the op.
        args: its arguments.
        kwargs: its keyword arguments.
        out: its outputs.
    """
    source: Tensor = args[0]
    permutation = _permutation(name, args)
    if permutation is not None:
        return [view.permuted(permutation)]
    match name:
        case "split" | "split_with_sizes":
            axis, start = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % source.ndim, 0
            parts = []
            for part in out:
                parts.append(view.narrowed(axis, start))
                start += part.shape[axis]
            return parts
        case "slice":
            axis = (args[1] if len(args) > 1 else 0) % source.ndim
            first = args[2] if len(args) > 2 else None
            if len(args) > 4 and args[4] != 1:
                return None
            size = source.shape[axis]
            start = max(first + size, 0) if first is not None and first < 0 else first or 0
            return [view.narrowed(axis, start)]
        case "unsqueeze" | "squeeze" | "view" | "_unsafe_view" | "reshape":
            reshaped = view.reshaped(source.shape, out[0].shape)
            return None if reshaped is None else [reshaped]
        case _:
            return None


def _permutation(name: str, args: Sequence[Any]) -> tuple[int, ...] | None:
    """Return the permutation of axes that an op is, or None."""
    ndim = args[0].ndim
    axes = list(range(ndim))
    match name:
        case "t" | "numpy_T":
            return tuple(reversed(axes))
        case "transpose":
            first, second = args[1] % ndim, args[2] % ndim
            axes[first], axes[second] = second, first
            return tuple(axes)
        case "permute":
            return tuple(axis % ndim for axis in args[1])
        case "detach" | "alias" | "lift_fresh":
            return tuple(axes)
        case _:
            return None
