"""Options as plain values: from YAML and back, with every key and value checked."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from prunegraph.errors import ConfigError
from prunegraph.experiment.config import CommonConfig
from prunegraph.files import write_text

RUNTIME_KEYS = frozenset({"config", "json", "threads", "workers", "ray", "device", "out"})
"""Options that do not change what a run computes: a run resumes whatever they are."""

Config = TypeVar("Config", bound=CommonConfig)


def to_dict(config: CommonConfig) -> dict[str, Any]:
    """Return the options as plain YAML / JSON values, paths made absolute, ``command`` first."""
    values: dict[str, Any] = {"command": config.command}
    for field in dataclasses.fields(config):
        values[field.name] = _plain(getattr(config, field.name))
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.expanduser().resolve())
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def from_dict(kind: type[Config], values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Check and convert options read from YAML; return them as keyword arguments of ``kind``.

    Args:
        kind: the command's options.
        values: option name (``-`` or ``_``) -> YAML value.
        where: what to call the source in messages.

    Raises:
        ConfigError: an unknown key, a value of another type, or a file of another command.
    """
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    arguments: dict[str, Any] = {}
    for raw_key, value in values.items():
        key = str(raw_key).replace("-", "_")
        if key == "command":
            if value != kind.command:
                msg = f"{where} holds options of `prunegraph {value}`, not of `{kind.command}`"
                raise ConfigError(msg)
            continue
        if key not in names:
            near = suggest(key, names)
            msg = f"{where}: unknown option {raw_key!r}{near}; valid: {', '.join(names)}"
            raise ConfigError(msg)
        if key in arguments:
            msg = f"{where}: option {key!r} is given twice"
            raise ConfigError(msg)
        arguments[key] = _convert(hints[key], value, f"{where}: {key}")
    return arguments


def suggest(name: str, names: Sequence[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the nearest of ``names``, or an empty string."""
    nearest = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Return a YAML value as the option's type, or raise ConfigError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in arguments:
            return value
        msg = f"{where}={value!r} is not one of {', '.join(map(str, arguments))}"
        raise ConfigError(msg)
    if origin in (types.UnionType, typing.Union):  # X | None: the only unions used here
        if value is None:
            return None
        return _convert(next(arm for arm in arguments if arm is not type(None)), value, where)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(arguments[0], item, where) for item in items)
    return _convert_scalar(hint, value, where)


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    msg = f"{where}={value!r} is not a {'path' if hint is Path else hint.__name__}"
    raise ConfigError(msg)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of options.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds something else than options.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"cannot read options from {path}: {error.strerror or error}"
        raise ConfigError(msg) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        msg = f"{path} is not YAML: {' '.join(str(error).split())}"
        raise ConfigError(msg) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        msg = f"{path} must hold `option: value` lines, not a {type(values).__name__}"
        raise ConfigError(msg)
    return values


def load_config(kind: type[Config], path: Path) -> Config:
    """Return the options that a run folder's ``config.yaml`` holds."""
    return kind(**from_dict(kind, read_yaml(path), where=str(path)))


def save_config(config: CommonConfig, path: Path) -> None:
    """Write the options as YAML, atomically."""
    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))


def same_run(config: CommonConfig, written: Mapping[str, Any]) -> list[str]:
    """Return the names of the options in which ``config`` differs from a written one.

    Options that do not change what is computed (threads, device, output) are not compared.
    """
    values = to_dict(config)
    keys = (values.keys() | written.keys()) - RUNTIME_KEYS
    return sorted(key for key in keys if values.get(key) != written.get(key))
