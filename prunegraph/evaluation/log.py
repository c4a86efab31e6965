"""What a search has measured, kept on disk: an interrupted one runs no network twice."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prunegraph.core.errors import ArtefactError
from prunegraph.core.files import write_json
from prunegraph.core.outcome import Outcome
from prunegraph.core.reading import checked, read_json

WRITE_EVERY = 16
"""Networks between two writes, at most."""

WRITE_SECONDS = 10.0
"""Networks that took so long together are written at once."""

CONTENT = {"search": dict[str, Any], "outcomes": dict[str, Outcome]}


class OutcomeLog:
    """Outcomes by mask and samples, of one search of one network.

    A search that draws what it draws from its seed asks for the same networks when it is started
    again, and finds them here.

    Args:
        path: where they are kept; read if it is there.
        identity: JSON values that name the search: network, budget, seed, ... The log of another
            search is refused.

    Raises:
        ArtefactError: the file is damaged, or of another search.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any] | None = None) -> None:
        self._path = path
        self._identity: dict[str, Any] = json.loads(json.dumps(dict(identity or {})))
        self._found: dict[str, Outcome] = {}
        self._unwritten: list[float] = []
        if path.is_file():
            content = checked(read_json(path), CONTENT, str(path))
            for name, value in self._identity.items():
                theirs = content["search"].get(name)
                if theirs != value:
                    msg = f"{path} is of a search with {name} {theirs}, not {value}: give another"
                    raise ArtefactError(msg)
            self._found = content["outcomes"]

    def get(self, digest: str, subset: str) -> Outcome | None:
        """Return the outcome of a mask on samples, both by their digests, if it is known."""
        return self._found.get(f"{digest} {subset}")

    def add(self, outcome: Outcome, subset: str) -> None:
        """Keep an outcome; all are written at times."""
        self._found[f"{outcome.digest} {subset}"] = outcome
        self._unwritten.append(outcome.seconds)
        if len(self._unwritten) == WRITE_EVERY or sum(self._unwritten) > WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write all outcomes."""
        outcomes = {key: asdict(found) for key, found in self._found.items()}
        write_json(self._path, {"search": self._identity, "outcomes": outcomes})
        self._unwritten = []
