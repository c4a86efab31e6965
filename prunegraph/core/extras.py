"""Modules that are loaded when they are first needed; those of an extra may not be there."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prunegraph.core.errors import ConfigError


class Late:
    """A module that is loaded when something of it is used: what every command waits for is small.

    Args:
        name: of the module.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, member: str) -> Any:
        """Return what the module has by that name."""
        return getattr(importlib.import_module(self._name), member)


@contextmanager
def needed(what: str, library: str, extra: str, otherwise: str = "") -> Iterator[None]:
    """Import a library within the block.

    Args:
        what: that asks for it, with its verb, as ``"recordings need"``.
        library: its name.
        extra: of this package, that brings it.
        otherwise: what else to do, as ``", or ..."``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        yield
    except ImportError as error:
        msg = f"{what} the library {library}: pip install 'prunegraph[{extra}]'{otherwise}"
        raise ConfigError(msg) from error
