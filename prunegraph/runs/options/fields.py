"""Fields of a method's class, set by the options of a command."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import yaml

from prunegraph.core.errors import ConfigError, suggest
from prunegraph.methods.method import Method
from prunegraph.runs.options.values import convert

DECLARED = frozenset({"name", "role", "kind", "searches", "per_seed"})
"""Fields by which a method says what it is: nobody sets them."""


def with_options(method: Method, given: Mapping[str, str]) -> Method:
    """Return a method with some of its fields set.

    Raises:
        ConfigError: it has no such field, or the value has another type.
    """
    if not given:
        return method
    own: Any = method
    hints = typing.get_type_hints(type(own))
    fields = dataclasses.fields(own) if dataclasses.is_dataclass(own) else ()
    valid = [field.name for field in fields if field.name not in DECLARED]
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name not in valid:
            known = f"its options: {', '.join(valid)}" if valid else "it has none"
            msg = f"{method.name} has no option {name!r}{suggest(name, valid)}; {known}"
            raise ConfigError(msg)
        values[name] = convert(hints[name], _read(hints[name], text), f"{method.name}.{name}")
    changed: Method = dataclasses.replace(own, **values)
    return changed


def _read(hint: Any, text: str) -> Any:
    """Return the YAML value of a word; texts stay as they are."""
    if hint is str:
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # the latter of a date that is none
        return text
