"""Old names that still work for one version, with a warning."""

import warnings
from typing import Any


class Renamed:
    """An attribute's old name: reads the new one and warns.

    Args:
        new: the attribute's name today.
    """

    def __init__(self, new: str) -> None:
        self._new = new

    def __set_name__(self, owner: type, name: str) -> None:
        """Note which name this is of which class."""
        self._old = f"{owner.__name__}.{name}"

    def __get__(self, owner: object | None, kind: type) -> Any:
        """Return the attribute of today."""
        if owner is None:
            return self
        warn_renamed(self._old, self._new)
        return getattr(owner, self._new)


def warn_renamed(old: str, new: str) -> None:
    """Warn that a public name has changed, at the line that uses it."""
    warnings.warn(f"{old} is now {new}; use that", DeprecationWarning, stacklevel=3)
