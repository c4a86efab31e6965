"""The entry of ``prunegraph`` and ``python -m prunegraph``."""

import io
import os
import sys
from collections.abc import Sequence

from prunegraph.cli import main as cli

SPINS = "10000"
"""How often an idle thread of OpenMP asks for work before it sleeps (libgomp: 300,000).

Where another job holds a core, a thread that goes on asking takes it from the one that has work.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: words after ``prunegraph``; default: those of the process.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is loaded
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
