"""What a search has measured, kept on disk: an interrupted one runs no network twice."""

from dataclasses import asdict
from pathlib import Path

from prunegraph.core.files import write_json
from prunegraph.core.outcome import Outcome
from prunegraph.core.reading import checked, read_json

WRITE_EVERY = 16
"""Networks between two writes."""


class OutcomeLog:
    """Outcomes by mask and images, of one search of one network.

    A search that draws what it draws from its seed asks for the same networks when it is started
    again, and finds them here.

    Args:
        path: where they are kept; read if it is there.

    Raises:
        ArtefactError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Outcome] = {}
        if path.is_file():
            self._found = checked(read_json(path), dict[str, Outcome], str(path))

    def get(self, digest: str, subset: str) -> Outcome | None:
        """Return the outcome of a mask on images, both by their digests, if it is known."""
        return self._found.get(f"{digest} {subset}")

    def add(self, outcome: Outcome, subset: str) -> None:
        """Keep an outcome; every ``WRITE_EVERY``-th time all are written."""
        self._found[f"{outcome.digest} {subset}"] = outcome
        if len(self._found) % WRITE_EVERY == 0:
            write_json(self._path, {key: asdict(found) for key, found in self._found.items()})
