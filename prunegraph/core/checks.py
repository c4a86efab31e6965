"""Checks of options: a value that cannot be gives one line that names it."""

from collections.abc import Mapping
from numbers import Real
from typing import TypeGuard, TypeVar

from prunegraph.core.errors import ConfigError

Value = TypeVar("Value")


def _check_number(name: str, value: object) -> None:
    """Raise ConfigError for a value that cannot be compared with numbers."""
    if not isinstance(value, Real):
        msg = f"{name}={value!r} must be a number, not of type {type(value).__name__}"
        raise ConfigError(msg)


def _is_given(value: float | None, name: str) -> TypeGuard[float]:
    """Return whether there is a value; raise ConfigError if it is no number."""
    if value is None:
        return False
    _check_number(name, value)
    return True


def check_at_least(name: str, value: float | None, least: float) -> None:
    """Raise ConfigError if ``value`` is given and below ``least``, infinite, or NaN."""
    if _is_given(value, name) and not least <= value < float("inf"):
        msg = f"{name}={value} must be at least {least}"
        raise ConfigError(msg)


def check_at_most(name: str, value: float | None, most: float) -> None:
    """Raise ConfigError if ``value`` is given and above ``most``."""
    if _is_given(value, name) and not value <= most:
        msg = f"{name}={value} must be at most {most}"
        raise ConfigError(msg)


def check_positive(name: str, value: float | None) -> None:
    """Raise ConfigError if ``value`` is given and not above 0, infinite, or NaN."""
    if _is_given(value, name) and not 0.0 < value < float("inf"):
        msg = f"{name}={value} must be positive"
        raise ConfigError(msg)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError for a value outside of [low, high], or NaN."""
    _check_number(name, value)
    if not low <= value <= high:
        msg = f"{name}={value} must lie in [{low:g}, {high:g}]"
        raise ConfigError(msg)


def check_choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    """Raise ConfigError for a value that is none of ``valid``."""
    if value not in valid:
        msg = f"{name}={value!r} is none of {', '.join(valid)}"
        raise ConfigError(msg)


def check_fields(options: object, **least: float) -> None:
    """Raise ConfigError if a field of a dataclass of options is below its least value.

    One whose default is a whole number must be one.
    """
    for name, low in least.items():
        value = getattr(options, name)
        check_at_least(name, value, low)
        whole = isinstance(getattr(type(options), name, None), int)
        if whole and value is not None and value % 1:
            msg = f"{name}={value} must be a whole number"
            raise ConfigError(msg)


def find_named(name: str, known: Mapping[str, Value], what: str) -> Value:
    """Return what has a name; raise ConfigError, with the names that there are, if nothing has."""
    if name not in known:
        msg = f"unknown {what} {name!r}; there are {', '.join(known)}"
        raise ConfigError(msg)
    return known[name]
