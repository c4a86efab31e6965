"""Modules that are loaded when they are first needed; those of an extra may not be there."""

import importlib
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


def library(what: str, name: str, extra: str, otherwise: str = "") -> Any:
    """Return a library of an extra, which is loaded when it is first needed.

    Args:
        what: that asks for it, with its verb, as ``"recordings need"``.
        name: of the library.
        extra: of this package, that brings it.
        otherwise: what else to do, as ``", or ..."``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name.replace("-", "_"))
    except ImportError as error:
        msg = f"{what} the library {name}: pip install 'prunegraph[{extra}]'{otherwise}"
        raise ConfigError(msg) from error
