"""What this process runs on: cores, device, memory."""

import ctypes
import os

import joblib
import torch

from prunegraph.core.errors import ConfigError, first_line
from prunegraph.runs.parallel.ranks import num_ranks

NO_MEMORY = ("allocate memory", "not enough memory", "bad_alloc", "create a primitive")
"""How torch and its libraries say that the CPU's memory has run out; the last is oneDNN's way."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def default_threads() -> int:
    """Return the number of CPU threads: one a core, shared with the ranks of this machine.

    At most ``OMP_NUM_THREADS``, unless torchrun, which sets it for all that it starts, is at work.
    """
    if num_ranks() > 1:
        return max(1, num_cores() // int(os.environ["LOCAL_WORLD_SIZE"]))
    cores, wanted = num_cores(), os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(wanted) or cores) if wanted.isdecimal() else cores


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free for the next ones, where it is the C library.

    By default it may hand every large block back to the kernel, and each new tensor is paged in
    anew: elementwise operations on CPU tensors were seven times slower in every other process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def num_cores() -> int:
    """Return the number of cores that this process may use, by affinity and container quota."""
    return int(joblib.cpu_count())


def resolve_device(name: str) -> torch.device:
    """Return the device that ``--device`` names.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        msg = f"device {name!r} cannot be used here ({first_line(error)}); try --device cpu"
        raise ConfigError(msg) from error
    return device


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory has run out; torch says so of the CPU's in words only."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(words in str(error) for words in NO_MEMORY)
