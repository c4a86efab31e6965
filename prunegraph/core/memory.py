"""The memory of this process."""

import ctypes
import os


def return_freed_memory() -> None:
    """Let glibc hand what is free back to the kernel: after a peak, before another kind of one.

    What small tensors have left does not hold large ones.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
