"""Options of single methods, ``--METHOD.FIELD VALUE``: fields of the method's class."""

import re
from collections.abc import Iterable, Sequence

from prunegraph.core.errors import ConfigError, suggest
from prunegraph.methods.registry import CLASSES, FEDERATED, load

FEDERATION = "federation"
"""Stands for all methods that train a federation: its options are of each of them."""

SHORT = frozenset({"clients", "dirichlet", "participants", "rounds"})
"""Their options that need no name before them."""

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
        name, _, _ = word.partition("=")
        if name.removeprefix("--") in SHORT and name.startswith("--"):
            word = f"--{FEDERATION}.{word.removeprefix('--')}"
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


def method_of(words: Sequence[str]) -> type | None:
    """Return the class of the first method that the words of a command line name, if one does."""
    found: type | None = next((load(CLASSES[word]) for word in words if word in CLASSES), None)
    return found


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
        if method == name or (method == FEDERATION and name in FEDERATED):
            found[field] = value
    return found


def check_named(given: Sequence[str], names: Sequence[str]) -> None:
    """Raise ConfigError for an option of a method that a command does not run."""
    for option in given:
        method, _, field = option.partition("=")[0].rpartition(".")
        shared = method == FEDERATION
        owners = list(FEDERATED) if shared else [method]
        if not {*owners} & {*names}:
            flag = (field if shared else f"{method}.{field}").replace("_", "-")
            near = "" if shared else suggest(method, names)
            msg = f"--{flag} is an option of {' and '.join(owners)}, not run here{near}: drop it"
            raise ConfigError(msg)
