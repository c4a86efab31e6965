"""Code of the user's own, named ``package.module:function``: found, and free to fail in any way."""

import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunegraph.core.errors import ConfigError, ModelError, PruneGraphError, one_line

TORCHVISION_PREFIX, TIMM_PREFIX, HF_PREFIX = LIBRARIES = ("torchvision:", "timm:", "hf:")
"""What stands before the names of networks of libraries."""


def is_factory(spec: str) -> bool:
    """Tell whether a name is of the user's own code, which is run."""
    return ":" in spec and not spec.startswith(LIBRARIES)


def find_factory(spec: str) -> Callable[..., Any]:
    """Import the module, from the current folder too, and return the callable it names.

    Raises:
        ModelError: the module cannot be imported, or has no such callable.
    """
    module_name, _, attribute = spec.partition(":")
    folder = str(Path.cwd())
    if "" not in sys.path and folder not in sys.path:
        sys.path.insert(0, folder)  # `python -m` does the same; a console script does not
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way
        msg = f"cannot import {module_name!r} of {spec!r} from {folder}: {one_line(error)}"
        if module_name.endswith(".py"):
            msg += f"; name it {module_name.removesuffix('.py').replace('/', '.')}:{attribute}"
        raise ModelError(msg) from error
    factory: Any = module
    for part in attribute.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        callables = [key for key, value in vars(module).items() if _is_own(module_name, value)]
        msg = f"{module_name} has no callable {attribute!r}; it has: {', '.join(callables) or '-'}"
        raise ModelError(msg)
    return factory  # type: ignore[no-any-return]  # callable() narrows Any to a bare callable


@contextmanager
def as_one_line(name: str, kind: type[PruneGraphError] = ConfigError) -> Iterator[None]:
    """Turn whatever fails in the user's code into an error of one line that says where.

    Args:
        name: ``package.module:function``.
        kind: the error's class.
    """
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [item for item in frames if not _is_library(Path(item.filename))]
        place = (theirs or frames)[-1]
        msg = f"{name} failed: {one_line(error)} ({place.filename}:{place.lineno})"
        if isinstance(error, PruneGraphError):
            msg = " ".join(str(error).split())
            msg = msg if msg.startswith(f"{name}: ") else f"{name}: {msg}"
        raise kind(msg) from error


def _is_library(path: Path) -> bool:
    """Return whether a file is of this package or of an installed one."""
    return Path(__file__).parents[1] in path.parents or "site-packages" in path.parts


def _is_own(module_name: str, value: object) -> bool:
    """Tell whether ``value`` is a callable defined in that module."""
    return callable(value) and getattr(value, "__module__", None) == module_name
