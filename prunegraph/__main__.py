"""The entry of ``prunegraph`` and ``python -m prunegraph``: Ctrl-C is obeyed from the first moment.

Loading torch takes seconds; an interruption in that time must not end in a traceback either.
"""

import contextlib
import os
import sys
from collections.abc import Sequence

from prunegraph.experiment.loading import load
from prunegraph.experiment.overview import answer

SPINS = "10000"
"""How often an idle thread of OpenMP asks for work before it sleeps (libgomp: 300,000).

Where another job holds a core, a thread that goes on asking takes it from the one that has work.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: words after ``prunegraph``; default: those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    text = answer(words)
    if text is not None:
        with contextlib.suppress(BrokenPipeError):  # `prunegraph | head -1`
            sys.stdout.write(text)
            sys.stdout.flush()
            return 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is loaded
    code: int = load("prunegraph.experiment.cli").main(words)
    return code


if __name__ == "__main__":
    sys.exit(main())
