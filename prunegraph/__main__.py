"""The entry of ``prunegraph`` and ``python -m prunegraph``: Ctrl-C is obeyed from the first moment.

Loading torch takes seconds; an interruption in that time must not end in a traceback either.
"""

import os
import signal
import sys
import threading
from types import FrameType


def _leave(_number: int, _frame: FrameType | None) -> None:
    """End the process while its imports are not done."""
    sys.stderr.write("prunegraph: interrupted before anything was done\n")
    sys.stderr.flush()
    os._exit(130)


_IN_MAIN_THREAD = threading.current_thread() is threading.main_thread()
if _IN_MAIN_THREAD:
    _before = signal.signal(signal.SIGINT, _leave)

from prunegraph.experiment.cli import main  # noqa: E402 - after the handler, that is the point

if _IN_MAIN_THREAD:
    signal.signal(signal.SIGINT, _before)

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
