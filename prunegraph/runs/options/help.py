"""``prunegraph COMMAND --help``: options by section, each with its type and what it does.

The text is that of the classes' docstrings. Rare options show with ``--help-all`` alone.
"""

import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

SECTIONS = ("what", "data", "budget", "search", "fine-tune", "train", "machine", "agent")
"""In this order the sections of a help stand."""

WIDTH, INDENT = 92, 26
"""Columns of a help, and of its left half."""

NAMES = {int: "N", float: "X", str: "NAME", Path: "PATH"}
"""What stands for a value of a type."""

EXAMPLES = {
    "pretrain": (
        "--arch digits_resnet14_w12 --out large",
        "--arch resnet20 --dataset cifar10 --data-dir DATA --out resnet20",
        "--weights resnet20.safetensors --slimmable 0.2 --out slim",
    ),
    "train": (
        "--keep-macs 0.25 --out RUN",
        "--weights resnet20.safetensors --dataset cifar10 --policy resnet-cifar",
        "--weights resnet20.safetensors --max-latency 2.5 --round-to 8",
    ),
    "prune": (
        "taylor/uniform --weights resnet20.safetensors --keep-macs 0.5 --out RUN",
        "cem --weights resnet20.safetensors --networks 200 --exclude 'layer1.*'",
        "thanos --task causal_lm --weights FOLDER --sparsity 0.5",
    ),
    "apply": (
        "--policy resnet-cifar --weights resnet56.safetensors --keep-macs 0.5",
        "--policy RUN --weights other.safetensors --keep-params 0.3 --round-to 8",
        "--policy resnet-cifar --weights resnet56.safetensors --max-latency 5",
    ),
    "compare": (
        "--weights resnet20.safetensors --keep-macs 0.5",
        "--no-agent --methods heuristics cem --weights vgg.safetensors --keep-macs 0.3",
        "--methods l1/uniform cem --weights vgg.safetensors --max-memory 200000 --seeds 5",
    ),
    "inspect": (
        "--arch torchvision:resnet50",
        "--weights resnet20.safetensors --all --plot groups.png",
        "--run RUN",
    ),
    "export": (
        "RUN",
        "RUN --format torch-export",
        "RUN --dynamic-axes 2 3 --out small.onnx",
    ),
    "verify": (
        "RUN",
        "RUN --data-dir DATA",
        "RUN --arch shop:patches",
    ),
}
"""Three examples of each command, shown at the end of its help."""

HIDDEN = "hidden"
"""Marks an option that the plain help leaves out: ``Annotated[int, HIDDEN]``."""

ABSENT = (tyro.conf.Suppress, tyro.conf.Fixed)
"""Mark an option that a command inherits and does not take."""


@dataclass(frozen=True)
class Section:
    """Marks an option that stands in another section than its class names.

    Args:
        name: of ``SECTIONS``.
    """

    name: str


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option as a person reads it.

    Attributes:
        name: as it is given: ``--keep-macs``, or ``RUN`` where only its place tells.
        value: what stands for its value: ``X``, ``{a,b}``; empty for a switch.
        text: what it does, its default in words.
        section: of the help.
        hidden: the plain help leaves it out.
        needed: it has no default.
    """

    name: str
    value: str
    text: str
    section: str
    hidden: bool
    needed: bool


def options_of(
    kind: type, prefix: str = "", section: str = "", *, switches: bool = True
) -> Iterator[Option]:
    """Yield the options that a class of options gives a command.

    Args:
        kind: a dataclass.
        prefix: of their names.
        section: where they stand; default: where their classes say. They are hidden if it is given.
        switches: what is true or false takes no value.
    """
    hints, texts = typing.get_type_hints(kind, include_extras=True), _texts(kind)
    for field in dataclasses.fields(kind):
        marks = getattr(hints[field.name], "__metadata__", ())
        hint = typing.get_args(hints[field.name])[0] if marks else hints[field.name]
        if tyro.conf.Suppress in marks:
            continue
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from options_of(hint, f"{prefix}{field.name}.", field.name)
            continue
        named = next((mark.name for mark in marks if isinstance(mark, Section)), None)
        flag = f"{prefix}{field.name}".replace("_", "-")
        flag = f"no-{flag}" if field.default is True and switches else flag
        value = _value(hint) or ("" if switches else "{true,false}")
        placed = tyro.conf.Positional in marks
        yield Option(
            name=field.name.upper() if placed else f"--{flag}",
            value="" if placed else value,
            text=texts[field.name] + ("" if placed else _default(field, switches)),
            section=section or named or _section(kind, field.name),
            hidden=bool(section) or HIDDEN in marks,
            needed=_is_needed(field),
        )


def help_text(kind: type, command: str, *, whole: bool, method: Any = None) -> str:
    """Return the help of a command.

    Args:
        kind: the class of its options.
        command: its name.
        whole: with the hidden options.
        method: class of a method whose options are shown too.
    """
    found = [option for option in options_of(kind) if whole or not option.hidden]
    places = "".join(f" {option.name}" for option in found if not option.name.startswith("--"))
    lines = [f"usage: prunegraph {command}{places} [options]", "", summary_of(kind)]
    for section in SECTIONS:
        inside = [option for option in found if option.section == section]
        lines += ["", f"{section}:"] * bool(inside)
        lines += [line for option in inside for line in _lines(option)]
    if method is not None and _texts(method):
        own = options_of(method, f"{method.name}.", "method", switches=False)
        lines += ["", f"{method.name}:", *(line for option in own for line in _lines(option))]
    lines += ["", "help:", *_entry("--help, -h", "show this and exit")]
    lines += _entry("--help-all", "show all options")
    lines += ["", "examples:"]
    lines += [f"  prunegraph {command} {words}".rstrip() for words in EXAMPLES[command]]
    return "\n".join(lines) + "\n"


def _lines(option: Option) -> list[str]:
    return _entry(f"{option.name} {option.value}".rstrip(), option.text)


def _entry(left: str, text: str) -> list[str]:
    """Return an option's lines: its name, its text beside it, or below where the name is long."""
    body = textwrap.wrap(text, WIDTH - INDENT, break_on_hyphens=False)
    if len(left) + 4 > INDENT:
        return [f"  {left}", *(" " * INDENT + line for line in body)]
    rest = [" " * INDENT + line for line in body[1:]]
    return [f"  {left:{INDENT - 2}}{body[0]}", *rest]


def _value(hint: Any) -> str:
    """Return what stands for a value of a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if origin in (types.UnionType, typing.Union):
        return _value(next(arm for arm in arguments if arm is not types.NoneType))
    if origin is tuple:
        return f"{_value(arguments[0])} ..."
    return "" if hint is bool else NAMES[hint]


def _is_needed(field: "dataclasses.Field[Any]") -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _default(field: "dataclasses.Field[Any]", switches: bool) -> str:
    """Return an option's default in words; nothing where its text tells it."""
    value = field.default
    if _is_needed(field):
        return " (needed)"
    if isinstance(value, bool) and not switches:
        return f" (default: {str(value).lower()})"
    if value in (None, (), "") or isinstance(value, bool):
        return ""
    return f" (default: {' '.join(map(str, value)) if isinstance(value, tuple) else value})"


def _section(kind: type, name: str) -> str:
    """Return the section of the class that brings an option in."""
    owners = [base for base in kind.__mro__ if name in inspect.get_annotations(base)]
    section: str = owners[0].__dict__["section"]
    return section


def _texts(kind: type) -> Mapping[str, str]:
    """Return what the docstrings of a class and its bases say of each option."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        found |= _attributes(base)
    return found


@functools.cache
def _attributes(kind: type) -> Mapping[str, str]:
    """Return the entries of a class's ``Attributes:``, each as one line."""
    document = inspect.cleandoc(kind.__doc__ or "")
    _, _, section = document.partition("\nAttributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(section).splitlines():
        if line.startswith(" "):
            found[name] += f" {line.strip()}"
        elif line:
            name, _, text = line.partition(": ")
            found[name] = text
    return {name: _plain(text) for name, text in found.items()}


def summary_of(kind: type) -> str:
    """Return what a class's docstring says before its attributes."""
    document, _, _ = inspect.cleandoc(kind.__doc__ or "").partition("\nAttributes:\n")
    return document.strip().replace("``", "")


def _plain(text: str) -> str:
    """Return an entry without marks, and without its full stop."""
    return (text if text.endswith("...") else text.removesuffix(".")).replace("``", "")
