"""Libraries that come with an extra of the package, and are loaded when they are first needed."""

from collections.abc import Iterator
from contextlib import contextmanager

from prunegraph.core.errors import ConfigError


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
