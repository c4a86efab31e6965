"""Checks of options: a value out of range gives one line that names it."""

from pathlib import Path

from prunegraph.core.errors import ConfigError
from prunegraph.core.reading import MAX_INTEGER
from prunegraph.core.user_code import is_factory


def check_usable(name: str, value: object) -> None:
    """Raise ConfigError for NaN, infinity, and numbers that fit no tensor."""
    if isinstance(value, int | float) and not -MAX_INTEGER < value < MAX_INTEGER:
        msg = f"{name} is no number that can be used, or too large: {str(value)[:30]}"
        raise ConfigError(msg)


def check_trusted(
    name: str, given: str | None, path: Path, option: str = "arch", others: str = ""
) -> None:
    """Refuse to run code because a file, which anybody may have made, names it.

    Args:
        name: of a network or a pruner in the file.
        given: the name that the user gave, if any.
        path: the file.
        option: by which it is given.
        others: options that the file asks for besides.

    Raises:
        ConfigError: the name is of code, and the user did not give it.
    """
    if is_factory(name) and name != given:
        msg = (
            f"{path} names {name}, which is code that would be run: trust it with --{option} "
            f"{name}{others}"
        )
        raise ConfigError(msg)
