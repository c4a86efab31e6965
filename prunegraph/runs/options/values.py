"""Values read from YAML, checked and converted to the types of options."""

import contextlib
import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from prunegraph.core.errors import ConfigError, suggest
from prunegraph.core.reading import MAX_INTEGER


def arguments_of(kind: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return options read from YAML as keyword arguments of a class."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    arguments: dict[str, Any] = {}
    for raw_key, value in values.items():
        key = raw_key.replace("-", "_")
        if key not in names:
            near = suggest(key, [name.rpartition(".")[2] for name in option_names(kind)])
            msg = f"{where}: unknown option {raw_key!r}{near}; valid: {', '.join(names)}"
            raise ConfigError(msg)
        if key in arguments:
            msg = f"{where}: option {key!r} is given twice"
            raise ConfigError(msg)
        arguments[key] = convert(hints[key], value, f"{where}: {key}")
    return arguments


def option_names(kind: type, prefix: str = "") -> list[str]:
    """Return the names of a class's options, those of a class within it as ``agent.swaps``."""
    hints, names = typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        inner = dataclasses.is_dataclass(hint)
        names += option_names(hint, f"{field.name}.") if inner else [f"{prefix}{field.name}"]
    return names


def convert(hint: Any, value: Any, where: str) -> Any:
    """Return a YAML value as the option's type, or raise ConfigError."""
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return typing.cast(type, hint)(**arguments_of(typing.cast(type, hint), value, where))
        msg = f"{where} must hold `option: value` lines"
        raise ConfigError(msg)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
        msg = f"{where}={show(value)} is not one of {', '.join(map(str, arguments))}"
        raise ConfigError(msg)
    if origin in (types.UnionType, typing.Union):  # X | None: the only unions used here
        if value is None:
            return None
        return convert(next(arm for arm in arguments if arm is not type(None)), value, where)
    if origin is tuple:
        items = [] if value is None else value if isinstance(value, list) else [value]
        return tuple(convert(arguments[0], item, where) for item in items)
    return _convert_scalar(hint, value, where)


def show(value: Any) -> str:
    """Return a value for a message; a number may have more digits than Python prints."""
    try:
        return repr(value)[:100]
    except ValueError:
        return "a number of thousands of digits"


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    if isinstance(value, str) and hint is not Path and not value.isprintable():
        msg = f"{where}={show(value)} holds what cannot be printed"
        raise ConfigError(msg)
    if hint is Path and isinstance(value, str):
        return _path(value, where)
    if hint is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML takes 1e-3 for a text
    large = isinstance(value, int | float) and not -MAX_INTEGER < value < MAX_INTEGER  # NaN too
    if hint is float and type(value) in (int, float) and not large:
        return float(value)
    if hint in (int, str, bool) and type(value) is hint and not large:
        return value
    kind = "path" if hint is Path else f"usable {hint.__name__}" if large else hint.__name__
    msg = f"{where}={show(value)} is not a {kind}"
    raise ConfigError(msg)


def _path(text: str, where: str) -> Path:
    """Return a path, or raise ConfigError for a text that no system takes as one."""
    try:
        usable = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half a surrogate pair
        usable = False
    if not usable:
        msg = f"{where}={show(text)} holds what no path can hold"
        raise ConfigError(msg)
    return Path(text)
