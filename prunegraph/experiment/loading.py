"""Loading of modules that bring torch along: seconds in which Ctrl-C is obeyed, too."""

import importlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM)


def load(name: str) -> Any:
    """Return a module; a signal ends the process in the meantime, without a traceback."""
    if threading.current_thread() is not threading.main_thread():
        return importlib.import_module(name)  # signals are the caller's
    before = [signal.signal(number, _leave) for number in ENDING]
    try:
        return importlib.import_module(name)
    finally:
        for number, handler in zip(ENDING, before, strict=True):
            signal.signal(number, handler)


def _leave(_number: int, _frame: FrameType | None) -> None:
    """End the process while its imports are not done."""
    sys.stderr.write("prunegraph: interrupted before anything was done\n")
    sys.stderr.flush()
    os._exit(130)
