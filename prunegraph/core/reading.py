"""Files that anybody may have made: read within limits, checked, never run.

JSON is all that is read here, and safetensors in ``tensors.py``; both hold values only. Whatever is
wrong with a file ends in one ArtefactError that names it.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunegraph.core.errors import ArtefactError, PruneGraphError

MAX_JSON_BYTES = 16 * 1024**2
"""The largest that we write is a hundredth of it; what it can hold takes 400 MB at most."""

MAX_IMAGE_SIZE = 2048
"""Side of an image that a file or an option may ask for: a batch of 128 takes 6 GB then."""

MAX_INTEGER = 2**63
"""Larger counts and seeds fit no tensor, and overflow when they are divided."""

MAX_DEPTH = 50
"""Lists and objects inside one another; Python's own limit depends on who calls."""

SCALARS = (int, float, bool, str)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; NaN and infinity are refused.

    Raises:
        ArtefactError: it is missing, no regular file, too large, or not JSON.
    """
    return parse_json(read_text(path), path)


def read_text(path: Path, limit: int = MAX_JSON_BYTES) -> str:
    """Return the text of a file of at most ``limit`` bytes.

    Raises:
        ArtefactError: it is missing, no regular file, too large, or not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        msg = f"{path} is damaged: it is no text ({error}); copy it again"
        raise ArtefactError(msg) from error


def read_bytes(path: Path, limit: int, kind: type[PruneGraphError] = ArtefactError) -> bytes:
    """Return what a file of at most ``limit`` bytes holds.

    Raises:
        ArtefactError: or an error of ``kind``; it is missing, no regular file, or too large.
    """
    check_file(path, kind)
    try:
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror or error}"
        raise kind(msg) from error
    if len(content) > limit:
        msg = f"{path} is larger than {limit:,} bytes, which no file of its kind is: replace it"
        raise kind(msg)
    return content


def check_file(path: Path, kind: type[PruneGraphError] = ArtefactError) -> None:
    """Raise an error for what is no regular file: a pipe or a device would never end."""
    if not path.is_file():
        msg = f"there is no file {path}: check the path"
        if path.is_dir():
            msg = f"{path} is a folder: name a file in it"
        elif path.exists():
            msg = f"{path} is a pipe or a device: give a file"
        raise kind(msg)


def parse_json(text: str, path: Path) -> Any:
    """Return the value of a JSON text; NaN and infinity are refused.

    Args:
        text: the text.
        path: the file that it comes from, for messages.

    Raises:
        ArtefactError: it is not JSON, nested too deeply, or holds a number that is too large.
    """
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_finite, parse_constant=_refuse)
        _check_depth(value)
        return value
    except (ValueError, RecursionError) as error:
        msg = f"{path} is damaged: it is no JSON ({error}); copy it again"
        raise ArtefactError(msg) from error


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for outer in level
            if isinstance(outer, list | dict)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        msg = f"it is nested more than {MAX_DEPTH} deep"
        raise ValueError(msg)


def _integer(digits: str) -> int:
    value = int(digits) if len(digits) < 30 else MAX_INTEGER
    if not -MAX_INTEGER < value < MAX_INTEGER:
        msg = f"the number {digits[:30]} is too large"
        raise ValueError(msg)
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if value - value != 0.0:
        msg = f"the number {digits[:30]} is too large"
        raise ValueError(msg)
    return value


def _refuse(name: str) -> float:
    msg = f"{name} is no number"
    raise ValueError(msg)


def checked(value: Any, shape: Any, where: str) -> Any:
    """Return a JSON value that has a given shape, dataclasses built from theirs.

    Args:
        value: what ``read_json`` returned, or a part of it.
        shape: ``int``, ``float`` (takes integers), ``bool``, ``str`` (printable), ``Any``; one of
            them ``| None``; ``list[X]``, ``tuple[X, ...]``, ``dict[str, X]``; ``{key: shape}`` with
            keys that must be there, among others; a dataclass, whose fields are all the keys.
        where: what to call the value in messages.

    Raises:
        ArtefactError: it has another shape; names the place.
    """
    origin, arguments = typing.get_origin(shape), typing.get_args(shape)
    if shape is Any or (value is None and types.NoneType in arguments):
        return value
    if origin in (types.UnionType, typing.Union):
        return checked(value, next(arm for arm in arguments if arm is not types.NoneType), where)
    if origin is typing.Literal and value in arguments:
        return value
    if isinstance(value, list | dict):
        return _checked_container(value, shape, where)
    if shape is float and type(value) in (int, float):
        return float(value)
    if shape in SCALARS and type(value) is shape and _printable(value):
        return value
    return _misfit(value, shape, where)


def _checked_container(value: Any, shape: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(shape), typing.get_args(shape)
    if isinstance(value, list):
        if origin not in (list, tuple):
            return _misfit(value, shape, where)
        items = (checked(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
        return origin(items)
    if not all(map(_printable, value)):
        return _misfit(value, shape, where)
    if origin is dict:
        return {key: checked(item, arguments[1], _at(where, key)) for key, item in value.items()}
    if isinstance(shape, Mapping):
        return value | {key: _entry(value, key, item, where) for key, item in shape.items()}
    return (
        _build(value, shape, where)
        if dataclasses.is_dataclass(shape)
        else _misfit(value, shape, where)
    )


def _printable(value: Any) -> bool:
    """Tell whether a value may be shown; half a surrogate pair and escape sequences may not."""
    return not isinstance(value, str) or value.isprintable()


def check_schema(found: int, known: int, path: Path) -> None:
    """Raise ArtefactError for a file of another schema than the one that is known."""
    if found != known:
        msg = f"{path} has schema {found}, this version reads {known}: update, or make it anew"
        raise ArtefactError(msg)


def _at(where: str, key: str) -> str:
    return f"{where}: {key}" if where.endswith((".json", ".safetensors")) else f"{where}.{key}"


def _entry(value: dict[str, Any], key: str, shape: Any, where: str) -> Any:
    if key not in value:
        msg = f"{_at(where, key)} is missing: the file is damaged or of another version"
        raise ArtefactError(msg)
    return checked(value[key], shape, _at(where, key))


def _build(value: dict[str, Any], kind: Any, where: str) -> Any:
    """Return a dataclass from its fields; those with a default may be left out."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(value.keys() - hints.keys())
    if unknown:
        msg = f"{_at(where, unknown[0])} is unknown: the file is damaged or of another version"
        raise ArtefactError(msg)
    needed = [
        field.name
        for field in dataclasses.fields(kind)
        if field.name in value
        or (field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING)
    ]
    return kind(**{name: _entry(value, name, hints[name], where) for name in needed})


def _misfit(value: Any, shape: Any, where: str) -> Any:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a printable text"}
    is_list = typing.get_origin(shape) in (list, tuple)
    wanted = names[shape] if shape in SCALARS else "a list" if is_list else "an object"
    if typing.get_origin(shape) is typing.Literal:
        wanted = f"one of {', '.join(typing.get_args(shape))}"
    if isinstance(value, list | dict):
        found = "a list" if isinstance(value, list) else "an object"
    else:
        found = ascii(value)[:40]
    msg = f"{where} is {found}, where {wanted} belongs: the file is damaged or of another version"
    raise ArtefactError(msg)
