"""The command line: ``prunegraph COMMAND [options]``.

Exits with 0 on success, 2 with one line on standard error on bad input, 130 on Ctrl-C and
SIGTERM. Each module is loaded when it is needed: help and mistakes wait for the options alone, not
for torch.
"""

import contextlib
import errno
import gc
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import Any, NamedTuple

from prunegraph.core.errors import ConfigError, PruneGraphError, first_line, suggest

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
ENDING = (signal.SIGINT, signal.SIGTERM)
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


class Command(NamedTuple):
    """What a command is, by names of this package that are loaded when it is given.

    Attributes:
        summary: a line about it.
        options: module and class of its options.
        job: module and function that does it.
    """

    summary: str
    options: str
    job: str


COMMANDS = {
    "pretrain": Command(
        "train a network, from scratch or further",
        "runs.options.config:PretrainConfig",
        "runs.pretrain:run_pretrain",
    ),
    "train": Command(
        "train the agent, prune, fine-tune, compare",
        "runs.options.config:TrainConfig",
        "runs.runner:run_plan",
    ),
    "prune": Command(
        "prune with one method, fine-tune",
        "runs.options.config:PruneConfig",
        "runs.runner:run_plan",
    ),
    "apply": Command(
        "prune a network with a trained policy",
        "runs.options.config:ApplyConfig",
        "runs.runner:run_plan",
    ),
    "compare": Command(
        "compare with every baseline, fine-tuned",
        "runs.options.compare:CompareConfig",
        "runs.runner:run_plan",
    ),
    "inspect": Command(
        "print groups, costs, and what is frozen",
        "runs.options.tools:InspectConfig",
        "runs.inspect:run_inspect",
    ),
    "export": Command(
        "write the pruned network as ONNX, torch.export, safetensors",
        "runs.options.tools:ExportConfig",
        "runs.export:run_export",
    ),
    "verify": Command(
        "check every figure of a run from its files",
        "runs.options.tools:VerifyConfig",
        "runs.verify.run:verify_run",
    ),
}

TRAINING = ("pretrain", "train", "prune", "apply", "compare")
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
            sys.stdout.flush()
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
        if load("runs.parallel.machine").is_out_of_memory(error):
            return _fail(OUT_OF_MEMORY, EXIT_BAD_INPUT)
        if any(words in str(error) for words in NO_DEVICE):
            return _fail(DEVICE_LOST.format(first_line(error)), EXIT_BAD_INPUT)
        raise
    return 0


def load(name: str) -> Any:
    """Return a module of this package, or what is named in it: ``runs.train:run_train``.

    Loading torch takes seconds: a signal ends the process in the meantime, without a traceback.
    """
    module, _, member = name.partition(":")
    module = f"prunegraph.{module}"
    ours = threading.current_thread() is threading.main_thread()  # else signals are the caller's
    before = [signal.signal(number, _leave) for number in ENDING if ours]
    collects = gc.isenabled()
    gc.disable()  # what is loaded is no garbage: looking for it takes a sixth of the time
    try:
        loaded = importlib.import_module(module)
    finally:
        if collects:
            gc.enable()
        for number, handler in zip(ENDING, before, strict=False):
            signal.signal(number, handler)
    return getattr(loaded, member) if member else loaded


def _leave(_number: int, _frame: FrameType | None) -> None:
    """End the process while its imports are not done."""
    sys.stderr.write("prunegraph: interrupted before anything was done\n")
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)


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
    if not load("runs.parallel.ranks").speaks():
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
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        sys.stdout.write(_overview())
        return
    if name == "--version":
        sys.stdout.write(f"prunegraph {_version()}\n")
        return
    if name not in COMMANDS:
        msg = (
            f"unknown command {name!r}{suggest(name, list(COMMANDS))}; valid: {', '.join(COMMANDS)}"
        )
        raise ConfigError(msg)
    config = load("runs.options.yaml_file").parse(load(COMMANDS[name].options), words[1:])
    if config is None:
        return
    if load("runs.parallel.ranks").num_ranks() > 1 and name not in TRAINING:
        msg = f"`prunegraph {name}` trains nothing that ranks could share: leave torchrun away"
        raise ConfigError(msg)
    load("runs.parallel.torchrun").run_job(load(COMMANDS[name].job), config)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    commands = "\n".join(lines)
    return (
        f"usage: prunegraph COMMAND [options]\n\n{commands}\n\n"
        "`prunegraph COMMAND --help` lists the options of a command.\n"
    )


def _version() -> str:
    try:
        return version("prunegraph")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"
