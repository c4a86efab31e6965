"""Accuracies of a run's rows, kept on disk: an interrupted run measures no mask twice."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunegraph.experiment.bench import Bench
from prunegraph.experiment.report import machine
from prunegraph.experiment.verdict import DENSE
from prunegraph.files import write_json
from prunegraph.reading import checked, read_json
from prunegraph.types import KeepMask


@dataclass(frozen=True, kw_only=True)
class Accuracies:
    """What a network gets right.

    Attributes:
        search: share of the search split.
        test: share of the test split.
    """

    search: float
    test: float


CONTENT = {"machine": dict[str, Any], "accuracies": dict[str, Accuracies]}
"""What the file holds."""


class Measured:
    """What masks measure without a fine-tune on search and test images; each is measured once.

    Figures of another machine, or of another number of threads, do not count: all rows of a report
    are measured alike. Ask when every choice is made.

    Args:
        bench: the network.
        path: where they are kept; read if it is there.

    Raises:
        ArtefactError: the file is damaged.
    """

    def __init__(self, bench: Bench, path: Path) -> None:
        self.bench = bench
        self._path = path
        self._found = read_accuracies(path) if path.is_file() else {}

    def accuracies(self, mask: KeepMask | None) -> Accuracies:
        """Return what a mask's recalibrated network gets right; None = the dense one as it is."""
        key = DENSE if mask is None else mask.digest()
        if key not in self._found:
            self._found[key] = self._measure(mask)
            found = {name: asdict(accuracies) for name, accuracies in self._found.items()}
            write_json(self._path, {"machine": machine(), "accuracies": found})
        return self._found[key]

    def _measure(self, mask: KeepMask | None) -> Accuracies:
        bench = self.bench
        if mask is None:
            model = bench.target.model
            search, test = bench.search_accuracy(model), bench.test_accuracy(model)
        else:
            search = bench.final_evaluator.evaluate(mask).accuracy
            test = bench.recalibrated_test_accuracy(mask)
        return Accuracies(search=search, test=test)


def read_accuracies(path: Path) -> dict[str, Accuracies]:
    """Return what was measured, if it was on this machine with as many threads, else nothing.

    Raises:
        ArtefactError: the file is damaged.
    """
    content = checked(read_json(path), CONTENT, str(path))
    found: dict[str, Accuracies] = content["accuracies"]
    return found if content["machine"] == machine() else {}
