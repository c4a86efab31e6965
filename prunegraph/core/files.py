"""Atomic writes: a file is either whole or not there, whatever interrupts the writer. Locks."""

import contextlib
import glob
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock

from prunegraph.core.errors import ArtefactError, ConfigError

POLICY_FILE = "policy.safetensors"
"""Name of the trained policy in a run folder."""

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
"""Names of files that are being written; those of a killed writer stay behind."""


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write ``content`` to ``path`` so that no reader ever sees half of it.

    The bytes go to a temporary file in the same folder, reach the disk, and take the place of
    ``path`` in one step; on any error, Ctrl-C included, the temporary file is removed and an older
    ``path`` stays as it was. Missing parent folders are made.

    Args:
        path: the file to write.
        content: all of its bytes.

    Raises:
        ArtefactError: the disk is full, or the folder cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, content)
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError) -> ArtefactError:
    reason = error.strerror or str(error)
    return ArtefactError(
        f"cannot write {target}: {reason}; free space or choose a folder that can be written"
    )


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock of the operating system on a file, which is gone afterwards.

    The system gives the lock back when its holder ends, however it ends: a file that a killed
    process left behind locks nothing.

    Args:
        path: the lock's file; missing parent folders are made.
        what: what it guards, for the message.

    Raises:
        ConfigError: another process holds it.
        ArtefactError: the folder cannot be written.
    """
    lock = filelock.FileLock(path, blocking=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        msg = f"another run is at work on {what}: wait until it has ended, or give another --out"
        raise ConfigError(msg) from error
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not remove an open file
            path.unlink()
        lock.release()


def temporaries_of(path: Path) -> list[Path]:
    """Return the files beside ``path`` that a killed writer of it may have left."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))


def remove_temporaries(found: Iterable[Path]) -> None:
    """Remove those of the files that a killed writer left; none may be at work on them."""
    for path in found:
        if TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8, atomically; see ``write_bytes``."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any, *, indent: int | None = 1) -> None:
    """Write ``value`` as standard JSON with a final newline, atomically; see ``write_bytes``.

    Args:
        path: the file to write.
        value: what to write; NaN and infinity are refused, since JSON has neither.
        indent: spaces a level, None = one line.

    Raises:
        ArtefactError: the file cannot be written.
        ValueError: ``value`` holds NaN or infinity.
        TypeError: ``value`` holds what JSON cannot.
    """
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _replace(target: Path, content: bytes) -> None:
    """Write a temporary sibling of ``target``, sync it, and rename it over ``target``."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable where the system allows it."""
    with contextlib.suppress(OSError):  # Windows and some network folders cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
