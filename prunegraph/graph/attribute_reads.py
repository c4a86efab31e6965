"""Which attributes of a network's modules its forward reads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Read = tuple[int, str]
"""``id`` of a module, name of an attribute."""


def is_own(kind: type) -> bool:
    """Return whether a class is the user's own, not one of ``torch.nn``."""
    return not kind.__module__.startswith("torch.nn.")


@contextmanager
def attribute_reads(model: nn.Module) -> Iterator[set[Read]]:
    """Note what modules of the user's own classes are asked for while the context is open."""
    found: set[Read] = set()
    kinds = {type(module) for module in model.modules() if is_own(type(module))}
    before = {kind: vars(kind).get("__getattribute__") for kind in kinds}
    try:
        for kind in kinds:
            kind.__getattribute__ = _noting(kind.__getattribute__, found)  # type: ignore[method-assign]
        yield found
    finally:
        for kind, own in before.items():
            if own is not None:
                kind.__getattribute__ = own  # type: ignore[method-assign]
            elif "__getattribute__" in vars(kind):
                del kind.__getattribute__


def _noting(read: Callable[[Any, str], Any], found: set[Read]) -> Callable[[Any, str], Any]:
    def noting(module: Any, name: str) -> Any:
        found.add((id(module), name))
        return read(module, name)

    return noting
