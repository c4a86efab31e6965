"""Options of single methods, ``--METHOD.FIELD VALUE``: fields of the method's class."""

import re
from collections.abc import Iterable, Sequence

from prunegraph.core.errors import ConfigError, suggest

WORD = re.compile(r"--([A-Za-z][\w-]*)\.([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)


def split_words(words: Sequence[str], own: Iterable[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return the words of a command line without options of methods, and those.

    Args:
        words: of the command line.
        own: options of the command that hold others, as ``agent``.

    Returns:
        The other words, and the options as ``METHOD.FIELD=VALUE``.
    """
    left, found, waiting = [], [], list(words)
    while waiting:
        word = waiting.pop(0)
        match = WORD.fullmatch(word)
        if match is None or match[1].replace("-", "_") in own:
            left.append(word)
            continue
        value = match[3]
        if value is None:
            alone = not waiting or waiting[0].startswith("--")
            value = "true" if alone else waiting.pop(0)
        found.append(f"{match[1].replace('-', '_')}.{match[2].replace('-', '_')}={value}")
    return left, tuple(found)


def options_of(given: Sequence[str], name: str) -> dict[str, str]:
    """Return the options of one method, by field.

    Args:
        given: ``METHOD.FIELD=VALUE`` of any methods.
        name: of the method.

    Raises:
        ConfigError: one has no such form.
    """
    found = {}
    for option in given:
        target, _, value = option.partition("=")
        method, _, field = target.rpartition(".")
        if not (method and field and value):
            msg = f"method_options holds {option!r}, which is not METHOD.FIELD=VALUE"
            raise ConfigError(msg)
        if method == name:
            found[field] = value
    return found


def check_named(given: Sequence[str], names: Sequence[str]) -> None:
    """Raise ConfigError for an option of a method that a command does not run."""
    for option in given:
        method = option.partition("=")[0].rpartition(".")[0]
        if method not in names:
            near = suggest(method, names)
            msg = f"--{option.partition('=')[0]} is of a method that is not run here{near}"
            raise ConfigError(msg)
