"""The masks that methods chose, kept on disk so that an interrupted run need not choose again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from prunegraph.artefacts.masked import StoredMask
from prunegraph.artefacts.pruned import StoredChannels
from prunegraph.core.errors import ArtefactError, MaskError
from prunegraph.core.files import write_json
from prunegraph.core.masks import ChannelMask, pack_bits, unpack_bits
from prunegraph.core.reading import checked, read_json
from prunegraph.graph import StructureGraph
from prunegraph.runs.context import Mask
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.report.verdict import Chosen, best_baseline, is_agent

CANDIDATE = {**get_type_hints(Chosen), "mask": Any}
"""What is kept of a candidate."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidate(Chosen):
    """A mask that a method chose.

    Attributes:
        mask: the mask; one of single weights lies on disk with its network.
    """

    mask: Mask

    @property
    def channels(self) -> ChannelMask:
        """The mask of a method that chooses channels."""
        assert isinstance(self.mask, ChannelMask)
        return self.mask


class CandidateStore:
    """Candidates by (name, seed), written to a file as they come.

    Args:
        path: the file; read if it is there.
        graph: the structure that the masks are of; None for masks of single weights.
    """

    def __init__(self, path: Path, graph: StructureGraph | None) -> None:
        self._path = path
        self._graph = graph
        self._candidates: dict[tuple[str, int], Candidate] = {}
        if path.is_file():
            for record in checked(read_json(path), list[dict[str, Any]], str(path)):
                candidate = self._read(record)
                self._candidates[candidate.name, candidate.seed] = candidate

    def __iter__(self) -> Iterator[Candidate]:
        """Return the candidates by name and seed: the order in which they came may be chance."""
        return iter([self._candidates[key] for key in sorted(self._candidates)])

    def get(self, name: str, seed: int) -> Candidate | None:
        """Return a method's candidate, or None if there is none yet."""
        return self._candidates.get((name, seed))

    def add(self, candidate: Candidate) -> None:
        """Keep a candidate."""
        self._candidates[candidate.name, candidate.seed] = candidate
        write_json(self._path, [self._record(item) for item in self])

    def named(self, name: str) -> list[Candidate]:
        """Return a method's candidates by seed."""
        return [item for item in self if item.name == name]

    def _record(self, candidate: Candidate) -> dict[str, Any]:
        return {**vars(candidate), "mask": _to_json(candidate.mask)}

    def _read(self, record: dict[str, Any]) -> Candidate:
        record = checked(record, CANDIDATE, str(self._path))
        mask = _from_json(record["mask"], self._graph, self._path.parents[1], self._path)
        return Candidate(**{name: record[name] for name in CANDIDATE} | {"mask": mask})


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """Return the mask that a run ends with: the agent's with the highest search accuracy.

    Of equal ones the first seed's; where no agent searched, that of the best baseline, where there
    is none, of the best control.
    """
    own = [item for item in candidates if is_agent(item)]
    if not own:
        best = best_baseline(candidates)
        own = [item for item in candidates if best is None or item.name == best]
    return max(own, key=lambda item: (item.search_accuracy, -item.seed))


def write_masks(path: Path, masks: Sequence[Mask]) -> None:
    """Write masks by digest into a file of a run folder."""
    write_json(path, {"masks": {mask.digest(): _to_json(mask) for mask in masks}})


class Masks(dict[str, Mask]):
    """Masks by digest, read from a file that is named where one is missing.

    Args:
        path: the file.
        masks: what it holds.
    """

    def __init__(self, path: Path, masks: Mapping[str, Mask]) -> None:
        super().__init__(masks)
        self._path = path

    def __missing__(self, digest: str) -> Mask:
        """Raise ArtefactError."""
        msg = f"{self._path} lacks the mask {digest}: restore it"
        raise ArtefactError(msg)


def read_masks(path: Path, graph: StructureGraph | None) -> Masks:
    """Read what ``write_masks`` wrote, each mask of units checked against its digest.

    Raises:
        ArtefactError: the file is damaged, or of another network.
    """
    content = checked(read_json(path), {"masks": dict[str, Any]}, str(path))
    masks = {
        digest: _from_json(value, graph, path.parent, path)
        for digest, value in content["masks"].items()
    }
    for digest, mask in masks.items():
        if mask.digest() != digest:
            msg = f"{path}: the mask named {digest} has digest {mask.digest()}: it was changed"
            raise ArtefactError(msg)
    return Masks(path, masks)


STORED = {"name": str, "sparsity": float, "folder": str, "weights": str | None}
"""What a file says of a mask of single weights."""

STORED_CHANNELS = {"keep": str, "folder": str, "weights": str}
"""What a file says of a mask of units whose network lies on disk."""


def _to_json(mask: Mask) -> str | dict[str, Any]:
    """Return units as packed bits; of what lies on disk with its network the folder, too."""
    if not isinstance(mask, StoredMask | StoredChannels):
        return pack_bits(mask.keep)
    record = {"weights": mask.weights, "folder": f"{RunFolder.CHOSEN}/{mask.where.name}"}
    if isinstance(mask, StoredChannels):
        return {**record, "keep": pack_bits(mask.keep)}
    return {**record, "name": mask.name, "sparsity": mask.sparsity}


def _from_json(value: Any, graph: StructureGraph | None, run: Path, path: Path) -> Mask:
    if graph is None:
        record = checked(value, STORED, str(path))
        where = RunFolder(path=run).inside(record["folder"])
        values = {name: record[name] for name in ("name", "sparsity", "weights")}
        return StoredMask(where=where, **values)
    try:
        if not isinstance(value, dict):
            bits: str = checked(value, str, str(path))
            return graph.mask(unpack_bits(bits, graph.num_units))
        record = checked(value, STORED_CHANNELS, str(path))
        keep = graph.mask(unpack_bits(record["keep"], graph.num_units)).keep
        where = RunFolder(path=run).inside(record["folder"])
        return StoredChannels(keep, where, record["weights"])
    except (ValueError, MaskError) as error:
        msg = f"{path} holds no masks of this network ({error}): restore it or run again"
        raise ArtefactError(msg) from error
