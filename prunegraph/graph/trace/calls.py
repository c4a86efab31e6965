"""The torch functions that are called while a network runs, and the tensors that they get."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

PLAIN = (str, bytes, int, float, complex, type(None))

DEEPEST = 4
"""How many objects inside each other are looked into."""


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in nested containers, records and other objects.

    Modules are none of those, nor caches of transformers, which only the network reads again.
    """
    found: list[Tensor] = []
    _collect(tree, 0, set(), found)
    return found


def _collect(item: Any, depth: int, seen: set[int], found: list[Tensor]) -> None:
    """Append the tensors in an object that lies in ``depth`` others."""
    kind = type(item)
    if isinstance(item, Tensor):
        found.append(item)
    elif kind is tuple or kind is list:
        for each in item:
            _collect(each, depth, seen, found)
    elif kind is dict:
        for each in item.values():
            _collect(each, depth, seen, found)
    elif not isinstance(item, PLAIN):
        leaves = tree_leaves(item)
        if len(leaves) != 1 or leaves[0] is not item:  # another container that torch knows
            _collect(leaves, depth, seen, found)
        elif id(item) not in seen and depth < DEEPEST:
            seen.add(id(item))
            _collect(_held_by(item), depth + 1, seen, found)


def _held_by(item: Any) -> list[Any]:
    """Return what a mapping or another object holds."""
    if isinstance(item, Mapping):  # of a unit that torch does not know
        return [*item.values()]
    kind = type(item)
    cached = kind.__name__.endswith("Cache") and kind.__module__.startswith("transformers.")
    if isinstance(item, nn.Module | type) or cached:
        return []
    slots = [vars(kind).get("__slots__", ()) for kind in kind.__mro__]
    names = [name for own in slots for name in ((own,) if isinstance(own, str) else own)]
    return [*(getattr(item, name, None) for name in names), *getattr(item, "__dict__", {}).values()]


def written_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that a call of an ATen op writes into."""
    return [
        tensor
        for number, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tensors_in(args[number] if number < len(args) else kwargs.get(argument.name))
    ]


class CallMode(TorchFunctionMode):
    """Stands between a network and the torch functions that it calls: override ``call``."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call what stands in a function's place."""
        del types
        return self.call(function, args, kwargs or {})

    def call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the function."""
        return function(*args, **kwargs)


class WatchedCalls(CallMode):
    """Shows each call of a torch function, once it has returned.

    Args:
        visit: is given the function, the leaves of its arguments and those of its result.
    """

    def __init__(self, visit: Callable[[Callable[..., Any], list[Any], list[Any]], None]) -> None:
        super().__init__()
        self._visit = visit

    def call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the function, then show it."""
        result = super().call(function, args, kwargs)
        self._visit(function, tree_leaves((args, kwargs)), tree_leaves(result))
        return result
