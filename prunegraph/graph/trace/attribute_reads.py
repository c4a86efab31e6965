"""Which attributes of a network's modules its forward reads."""

import dis
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

Read = tuple[int, str]
"""``id`` of a module, name of an attribute."""


def is_custom(kind: type) -> bool:
    """Return whether a class is the user's own, or ``nn.Unflatten``, which holds their sizes."""
    return kind is nn.Unflatten or not kind.__module__.startswith("torch.nn.")


def custom_functions(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """Return the functions of a class, by name, those of ``torch.nn`` left out."""
    for base in filter(is_custom, kind.__mro__):
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else None  # of a decorator
            if isinstance(function, FunctionType):
                yield name, function


def named_by_forward(kind: type) -> frozenset[str]:
    """Return what a class's forward, and its methods that this names, read of ``self``.

    What is read in training alone, or on inputs of another size, is among it.
    """
    found: set[str] = set()
    waiting = {"forward"}
    while waiting:
        known = found | waiting
        for name in waiting:
            for base in filter(is_custom, kind.__mro__):
                method = getattr(vars(base).get(name), "fget", vars(base).get(name))
                method = inspect.unwrap(method) if callable(method) else None  # of a decorator
                if isinstance(method, FunctionType) and method.__code__.co_argcount:
                    known |= _read_of(method.__code__, method.__code__.co_varnames[0])
        found, waiting = found | waiting, known - found - waiting
    return frozenset(found)


WHOLE = ""
"""Stands for what is read of an object that a method hands on, or writes into."""


@cache
def chains_of(kind: type) -> frozenset[tuple[str, str]]:
    """Return what a class's methods read of attributes of ``self``, as ``self.config.heads``.

    ``(name, WHOLE)`` is among it where they use an attribute otherwise.
    """
    found: set[tuple[str, str]] = set()
    for name, function in custom_functions(kind):
        whole = function.__code__
        for code in _codes(whole) if name != "__init__" and whole.co_argcount else ():
            steps = list(dis.get_instructions(code))
            windows = zip(steps, steps[1:], steps[2:], steps[3:], strict=False)
            for before, loaded, first, second in windows:
                names = loaded.argval if isinstance(loaded.argval, tuple) else (loaded.argval,)
                if names[-1:] == whole.co_varnames[:1] and first.opname == "LOAD_ATTR":
                    by_name = second.opname == "LOAD_CONST" and before.argval == "getattr"
                    is_method = "NULL" in second.argrepr  # since Python 3.12
                    is_chain = by_name or (second.opname == "LOAD_ATTR" and not is_method)
                    found.add((first.argval, second.argval if is_chain else WHOLE))
    return frozenset(found)


def set_after_init(kind: type) -> frozenset[str]:
    """Return what methods of a class set beside ``__init__``: caches, made anew when they must."""
    functions = [function for name, function in custom_functions(kind) if name != "__init__"]
    return frozenset().union(*(_set_by(function.__code__) for function in functions))


@cache
def _set_by(code: CodeType) -> frozenset[str]:
    """Return the attributes, of anything, that a function, and those inside it, set."""
    steps = (each for part in _codes(code) for each in dis.get_instructions(part))
    return frozenset(each.argval for each in steps if each.opname == "STORE_ATTR")


def _read_of(code: CodeType, owner: str) -> set[str]:
    """Return the attributes of a variable that a function, and those inside it, read."""
    found: set[str] = set()
    for part in _codes(code):
        for before, after in itertools.pairwise(dis.get_instructions(part)):
            loaded = before.argval if isinstance(before.argval, tuple) else (before.argval,)
            if after.opname in {"LOAD_ATTR", "LOAD_METHOD"} and loaded[-1:] == (owner,):
                found.add(after.argval)
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function, and of those inside it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


@contextmanager
def attribute_reads(model: nn.Module) -> Iterator[set[Read]]:
    """Note what modules of the user's own classes are asked for while the context is open."""
    found: set[Read] = set()
    kinds = {type(module) for module in model.modules() if is_custom(type(module))}
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
