"""The torch functions that are called while a network runs, and the tensors that they get."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in nested containers and records, and those that other objects hold."""
    found: list[Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):  # of a class that torch does not know
            found += tensors_in([*leaf.values()])
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, field.name, None) for field in fields(leaf)])
        elif not isinstance(leaf, nn.Module | type):
            held = getattr(leaf, "__dict__", {})
            found += [value for value in held.values() if isinstance(value, Tensor)]
    return found


class WatchedCalls(TorchFunctionMode):
    """Shows each call of a torch function, once it has returned.

    Args:
        visit: is given the function, the leaves of its arguments and those of its result.
    """

    def __init__(self, visit: Callable[[Callable[..., Any], list[Any], list[Any]], None]) -> None:
        super().__init__()
        self._visit = visit

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function."""
        del types
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        self._visit(function, tree_leaves((args, kwargs)), tree_leaves(result))
        return result
