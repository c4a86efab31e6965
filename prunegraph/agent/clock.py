"""How long a search has taken, interruptions left out."""

import time
from collections.abc import Sequence
from pathlib import Path

from prunegraph.core.files import write_json
from prunegraph.core.reading import checked, read_json
from prunegraph.evaluation.pool import SearchEvaluator


class SearchClock:
    """Wall and evaluation time of a search, those before an interruption included.

    Args:
        path: where the times are kept; None: they are not.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._started = time.monotonic()
        self._before = (0.0, 0.0)
        if path is not None and path.is_file():
            shape = {"seconds": float, "evaluation_seconds": float}
            record = checked(read_json(path), shape, str(path))
            self._before = (record["seconds"], record["evaluation_seconds"])

    def read(self, evaluators: Sequence[SearchEvaluator]) -> tuple[float, float]:
        """Return seconds, and seconds inside evaluations."""
        seconds = time.monotonic() - self._started
        inside = sum(evaluator.seconds for evaluator in evaluators)
        return self._before[0] + seconds, self._before[1] + inside

    def write(self, evaluators: Sequence[SearchEvaluator]) -> None:
        """Keep the times."""
        if self._path is None:
            return
        seconds, inside = self.read(evaluators)
        write_json(self._path, {"seconds": seconds, "evaluation_seconds": inside})
