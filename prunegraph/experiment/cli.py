"""The command line: ``prunegraph COMMAND [options]``.

Exits with 0 on success, 2 with one line on standard error on bad input, 130 on Ctrl-C and
SIGTERM.
"""

import contextlib
import errno
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, cast

import tyro

from prunegraph.errors import ConfigError, PruneGraphError, first_line, suggest
from prunegraph.experiment.checks import check_trusted
from prunegraph.experiment.compare_config import ComparisonsConfig
from prunegraph.experiment.config import (
    ApplyConfig,
    CommonConfig,
    PretrainConfig,
    TrainConfig,
)
from prunegraph.experiment.loading import load
from prunegraph.experiment.machine import (
    is_out_of_memory,
    num_ranks,
    speaks,
)
from prunegraph.experiment.options import REGISTRY, from_dict, read_yaml
from prunegraph.experiment.overview import answer
from prunegraph.experiment.tools_config import ExportConfig, InspectConfig, VerifyConfig

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
MAX_LINE = 2000
NO_DEVICE = ("CUDA error", "cuDNN error", "CUBLAS_STATUS")
"""How torch and its libraries say that a device or its driver has failed."""

OUT_OF_MEMORY = (
    "out of memory: what was finished is kept, the same command goes on from there; give "
    "--workers 1, a smaller --batch-size or --device cpu, or free memory"
)


UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Why a file cannot be written: no space, or no right to."""

DEVICE_LOST = (
    "the device failed ({}): what was finished is kept, the same command goes on from there; see "
    "`nvidia-smi`, or give --device cpu"
)


COMMANDS: dict[str, type[CommonConfig]] = {
    "pretrain": PretrainConfig,
    "train": TrainConfig,
    "apply": ApplyConfig,
    "compare": ComparisonsConfig,
    "inspect": InspectConfig,
    "export": ExportConfig,
    "verify": VerifyConfig,
}
"""The options of each command of ``overview.SUMMARIES``; ``work.JOBS`` is what it does."""

TRAINING = ("pretrain", "train", "apply", "compare")
"""Commands that the ranks of ``torchrun`` can share."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: words after ``prunegraph``; default: those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with warnings.catch_warnings(), _signals_interrupt():
            warnings.simplefilter("ignore")  # standard error is for the one line of an error
            _dispatch(words)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command resumes where it stopped", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has left: `prunegraph inspect | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except PruneGraphError as error:
        return _fail(str(error), EXIT_BAD_INPUT)
    except OSError as error:
        return _fail(_describe_os_error(error), EXIT_BAD_INPUT)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            return _fail(OUT_OF_MEMORY, EXIT_BAD_INPUT)
        if any(words in str(error) for words in NO_DEVICE):
            return _fail(DEVICE_LOST.format(first_line(error)), EXIT_BAD_INPUT)
        raise
    return 0


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C and on SIGTERM, by which batch systems stop a job."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the caller's
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int) -> int:
    if not speaks():
        return code
    sys.stdout.flush()
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(message.split()))
    sys.stderr.write(f"prunegraph: {line[:MAX_LINE]}\n")
    return code


def _describe_os_error(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    advice = "; free space or choose another --out, then run it again"
    return f"{error.strerror or error}{where}{advice * (error.errno in UNWRITABLE)}"


def _dispatch(words: list[str]) -> None:
    text = answer(words)
    if text is not None:
        sys.stdout.write(text)
        return
    name = words[0]
    if name not in COMMANDS:
        msg = (
            f"unknown command {name!r}{suggest(name, list(COMMANDS))}; valid: {', '.join(COMMANDS)}"
        )
        raise ConfigError(msg)
    config = parse(COMMANDS[name], words[1:])
    if config is None:
        return
    if num_ranks() > 1 and name not in TRAINING:
        msg = f"`prunegraph {name}` trains nothing that ranks could share: leave torchrun away"
        raise ConfigError(msg)
    load("prunegraph.experiment.work").work(config)


def parse(kind: type[CommonConfig], words: list[str]) -> CommonConfig | None:
    """Return the options that the words of a command line give; None if help was printed.

    Raises:
        ConfigError: an option is unknown, lacks a value, or has a bad one.
    """
    defaults = _defaults(kind, words)
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
    except SystemExit as stop:
        if not stop.code:
            return None
        msg = f"{_one_line(printed.getvalue())}; see `prunegraph {kind.command} --help`"
        raise ConfigError(msg) from None
    if unknown:
        word = unknown[0].split("=")[0]
        names = [f"--{field.name.replace('_', '-')}" for field in fields(kind)]
        near = suggest(word, [name for name in names if name != word])  # hidden ones are unknown
        msg = (
            f"unknown option {unknown[0]!r} of `prunegraph {kind.command}`{near}; "
            f"see `prunegraph {kind.command} --help`"
        )
        raise ConfigError(msg)
    parsed = cast(CommonConfig, config)
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


def _defaults(kind: type[CommonConfig], words: list[str]) -> dict[str, Any]:
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
    for field in fields(kind):
        missing = tyro.MISSING if field.default is MISSING else field.default
        object.__setattr__(default, field.name, given.get(field.name, missing))
    return {"default": default}


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
