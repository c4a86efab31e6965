"""Code of the user's own that a command runs: what fails in it ends in one line that says where."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prunegraph.errors import ConfigError, PruneGraphError


@contextmanager
def as_one_line(name: str) -> Iterator[None]:
    """Turn whatever fails in the user's code into a ConfigError.

    Args:
        name: ``package.module:function``.
    """
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [item for item in frames if not _is_library(Path(item.filename))]
        place = (theirs or frames)[-1]
        what = " ".join(str(error).split())
        msg = f"{name} failed: {type(error).__name__}: {what} ({place.filename}:{place.lineno})"
        if isinstance(error, PruneGraphError):
            msg = f"{name}: {what}"
        raise ConfigError(msg) from error


def _is_library(path: Path) -> bool:
    """Return whether a file is of this package or of an installed one."""
    return Path(__file__).parents[1] in path.parents or "site-packages" in path.parts
