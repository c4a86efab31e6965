"""Options from the command line and from YAML, and back, with every key and value checked."""

import contextlib
import dataclasses
import io
import re
import shlex
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from prunegraph.core.errors import ArtefactError, ConfigError, suggest
from prunegraph.core.files import write_text
from prunegraph.core.reading import read_text
from prunegraph.core.user_code import HF_PREFIX
from prunegraph.policies import is_shipped
from prunegraph.runs.options.checks import check_trusted
from prunegraph.runs.options.config import CommonConfig
from prunegraph.runs.options.help import help_text, options_of
from prunegraph.runs.options.methods import method_of, split_words
from prunegraph.runs.options.tasks import DATASETS
from prunegraph.runs.options.values import arguments_of, option_names, show

RUNTIME_KEYS = frozenset({"config", "json", "threads", "workers", "ray", "device", "out"})
"""Options that do not change what a run computes: a run resumes whatever they are."""

MAX_YAML_BYTES = 64 * 1024
"""The largest file of options; reading one takes a second at most."""

Config = TypeVar("Config", bound=CommonConfig)


def to_dict(config: CommonConfig) -> dict[str, Any]:
    """Return the options as plain YAML / JSON values, paths made absolute, ``command`` first."""
    return {"command": config.command, **_values(config)}


def _values(options: Any) -> dict[str, Any]:
    return {
        field.name: _plain(getattr(options, field.name)) for field in dataclasses.fields(options)
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _values(value)
    if isinstance(value, Path):
        named = is_shipped(value) or str(value).startswith((DATASETS, HF_PREFIX))
        return str(value if named else value.expanduser().absolute())
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
    given = dict(values)
    command = given.pop("command", kind.command)
    if command != kind.command:
        given_name = command if isinstance(command, str) else show(command)
        msg = f"{where} holds options of `prunegraph {given_name}`, not of `{kind.command}`"
        raise ConfigError(msg)
    return arguments_of(kind, given, where)


class _PlainLoader(yaml.SafeLoader):
    """Reads values and nothing else: no tags, and no aliases, which make lines millions."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            kind = "an alias" if isinstance(event, yaml.AliasEvent) else f"the tag {event.tag}"
            msg = f"options take no aliases and no tags, here is {kind}"
            raise yaml.constructor.ConstructorError(None, None, msg, event.start_mark)
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of options.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds something else than options.
    """
    try:
        values = yaml.load(read_text(path, MAX_YAML_BYTES), Loader=_PlainLoader)
    except ArtefactError as error:
        msg = f"cannot read options from {path}: {error}"
        raise ConfigError(msg) from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        msg = f"{path} is not YAML: {' '.join(str(error).split())}"
        raise ConfigError(msg) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        msg = f"{path} must hold `option: value` lines, not a {type(values).__name__}"
        raise ConfigError(msg)
    if not all(isinstance(key, str) for key in values):
        msg = f"{path} must hold `option: value` lines, each option a name"
        raise ConfigError(msg)
    return values


def load_config(kind: type[Config], path: Path) -> Config:
    """Return the options that a run folder's ``config.yaml`` holds."""
    arguments = from_dict(kind, read_yaml(path), where=str(path))
    for field in dataclasses.fields(kind):
        if _default(field) is tyro.MISSING and field.name not in arguments:
            msg = f"{path} lacks the option {field.name!r}: the file is damaged"
            raise ConfigError(msg)
    return kind(**arguments)


REGISTRY = ConstructorRegistry()
"""How tyro reads and shows the types of options, beside its own ways."""


@REGISTRY.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Show ``X | None`` as ``X``: None is what an option is that is not given."""
    members = [kind for kind in typing.get_args(info.type) if kind is not types.NoneType]
    if info.type_origin not in (types.UnionType, typing.Union) or len(members) != 1:
        return None
    spec = ConstructorRegistry.get_primitive_spec(
        PrimitiveTypeInfo.make(members[0], parent_markers=info.markers)
    )
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return dataclasses.replace(
        spec,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda v: ["None"] if v is None else spec.str_from_instance(v),
    )


def parse(kind: type[Config], words: list[str]) -> Config | None:
    """Return the options that the words of a command line give; None if help was printed.

    Raises:
        ConfigError: an option is unknown, lacks a value, or has a bad one.
    """
    asked = {"-h", "--help", "--help-all"}.intersection(words)
    if asked:
        method = method_of(words) if "method" in option_names(kind) else None
        whole = "--help-all" in asked
        sys.stdout.write(help_text(kind, kind.command, whole=whole, method=method))
        return None
    defaults = _defaults(kind, words)
    of_methods: tuple[str, ...] = ()
    if "method_options" in option_names(kind):
        words, of_methods = split_words(words, [each.name for each in dataclasses.fields(kind)])
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            config, unknown = tyro.cli(
                kind,
                prog=f"prunegraph {kind.command}",
                args=words,
                return_unknown_args=True,
                # beside a file of options each switch can be put either way
                config=() if defaults else (tyro.conf.FlagCreatePairsOff,),
                registry=REGISTRY,
                **defaults,
            )
    except SystemExit:
        message = _one_line(printed.getvalue())
        if message.startswith("Missing from"):
            needed = next(option for option in options_of(kind) if option.needed)
            text = needed.text.removesuffix(" (needed)")
            message = f"`prunegraph {kind.command}` needs {needed.name}: {text}"
        msg = f"{message}; see `prunegraph {kind.command} --help`"
        raise ConfigError(msg) from None
    if unknown:
        word = unknown[0].split("=")[0]
        names = [f"--{name.replace('_', '-')}" for name in option_names(kind)]
        near = suggest(word, [name for name in names if name != word])  # hidden ones are unknown
        if not word.startswith("-") and {"--arch", "--run"} <= {*names}:
            near = f" (a network? give --arch {word}; a run? --run {word})"
        msg = (
            f"unknown option {unknown[0]!r} of `prunegraph {kind.command}`{near}; "
            f"see `prunegraph {kind.command} --help`"
        )
        raise ConfigError(msg)
    parsed = cast(Config, config)
    if of_methods:
        parsed = dataclasses.replace(cast(Any, parsed), method_options=of_methods)
    if parsed.config is not None:
        _check_typed(parsed, parsed.config, words)
    return parsed


def _check_typed(config: CommonConfig, path: Path, words: list[str]) -> None:
    """Refuse code or a cluster that a file of options names, which anybody may have made.

    Raises:
        ConfigError: the command line does not name it.
    """
    typed = {word.rpartition("=")[2] for word in words}
    for option in ("arch", "dataset", "methods"):
        named = getattr(config, option, None) or ()
        for name in (named,) if isinstance(named, str) else named:
            check_trusted(name, name if name in typed else None, path, option)
    ray = getattr(config, "ray", None)
    if ray not in (None, "auto", "local") and ray not in typed:
        msg = f"{path} names a Ray cluster, which runs what it likes: trust it with --ray {ray}"
        raise ConfigError(msg)


def _defaults(kind: type[Config], words: list[str]) -> dict[str, Any]:
    """Return tyro's ``default`` argument with what ``--config FILE`` holds, if it is given."""
    path = None
    for position, word in enumerate(words):
        if word == "--config" and position + 1 < len(words):
            path = words[position + 1]
        elif word.startswith("--config="):
            path = word.partition("=")[2]
    if path is None:
        return {}
    given = from_dict(kind, read_yaml(Path(path)), where=path)
    default = object.__new__(kind)  # checked with the command line's options, not without them
    for field in dataclasses.fields(kind):
        object.__setattr__(default, field.name, given.get(field.name, _default(field)))
    return {"default": default}


def _default(field: "dataclasses.Field[Any]", missing: Any = tyro.MISSING) -> Any:
    """Return what an option is that nobody gives; ``missing`` if it has to be given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return missing if field.default is dataclasses.MISSING else field.default


def _one_line(box: str) -> str:
    """Return the first sentences of tyro's boxed message, drawn in ASCII or not, as one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    rules = [re.sub(r"^[─+-]{4,}$", "", line.strip("│|╭╮╰╯ ")) for line in text.splitlines()]
    lines = [line.strip("─ ") for line in rules]
    body: list[str] = []
    for line in lines[1:]:
        if not line and body:
            break
        body.append(line)
    message = " ".join(" ".join(body).split()).rstrip(".")
    message = re.sub(r"could not convert string to float: (.*)", r"\1 is no number", message)
    return re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is no integer", message)


def save_config(config: CommonConfig, path: Path) -> None:
    """Write the options as YAML, atomically."""
    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))


def differences(config: CommonConfig, written: Mapping[str, Any]) -> list[str]:
    """Return in which options ``config`` differs from a written one, each with both values.

    Options that do not change what is computed (threads, device, output) are not compared. One that
    is not written is as by its default.
    """
    values, there = _flat(to_dict(config)), _flat(written)
    fields = dataclasses.fields(config)
    defaults = _flat({field.name: _plain(_default(field, None)) for field in fields})
    keys = (values.keys() | there.keys()) - RUNTIME_KEYS
    pairs = {key: (there.get(key, defaults.get(key)), values.get(key)) for key in sorted(keys)}
    return [
        f"{key} {show(there)} there, {show(here)} here"
        for key, (there, here) in pairs.items()
        if _followed(there) != _followed(here)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return options with those of a class within as ``agent.swaps``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def _followed(value: Any) -> Any:
    """Return what absolute paths lead to: two that lead to one file are the same."""
    if isinstance(value, list):
        return [_followed(item) for item in value]
    absolute = isinstance(value, str) and Path(value).is_absolute()
    return str(Path(value).resolve()) if absolute else value


def command_line(config: CommonConfig) -> str:
    """Return the command that runs with these options, an option a line, as a shell takes it.

    What is as by default is left out; so is where results and the options themselves lie.
    """
    parts = [["prunegraph", config.command], *_words(config)]
    return " \\\n  ".join(map(shlex.join, parts))


def _words(options: Any, prefix: str = "") -> Iterator[list[str]]:
    """Yield the words that give the options which are not as by default."""
    for field in dataclasses.fields(options):
        value, name = getattr(options, field.name), f"{prefix}{field.name.replace('_', '-')}"
        if value == _default(field) or field.name in ("config", "json", "out"):
            continue
        if field.name == "method_options":
            for option in value:
                target, _, given = option.partition("=")
                yield [f"--{target.replace('_', '-')}", given]
            continue
        if dataclasses.is_dataclass(value):
            yield from _words(value, f"{name}.")
        elif isinstance(value, bool):
            yield [f"--{name}" if value else f"--no-{name}"]
        else:
            values = value if isinstance(value, tuple) else [value]
            yield [f"--{name}", *map(str, values)]
