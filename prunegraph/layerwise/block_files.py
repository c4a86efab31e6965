"""Finished blocks of a walk on disk, so that an interrupted one goes on at the next."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from prunegraph.core.errors import ArtefactError
from prunegraph.core.files import write_bytes, write_json
from prunegraph.core.reading import read_json
from prunegraph.core.tensors import read_safetensors, to_safetensors

IDENTITY_FILE = "walk.json"


@dataclass(frozen=True, kw_only=True)
class BlockFiles:
    """A folder with a file for each finished block.

    Attributes:
        folder: where they lie; None: nothing is kept.
        identity: what names the walk, as JSON values.
    """

    folder: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)

    def open(self) -> None:
        """Make the folder.

        Raises:
            ArtefactError: it is of another walk.
        """
        if self.folder is None:
            return
        path = self.folder / IDENTITY_FILE
        if path.is_file() and read_json(path) != self.identity:
            msg = f"{path} is of another network, method, budget or data: give another folder"
            raise ArtefactError(msg)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, self.identity)

    def path(self, number: int) -> Path:
        """Return the file of a block."""
        assert self.folder is not None
        return self.folder / f"block-{number:04d}.safetensors"

    def has(self, number: int) -> bool:
        """Return whether a block is on disk."""
        return self.folder is not None and self.path(number).is_file()

    def save(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep what a block holds."""
        if self.folder is not None:
            write_bytes(self.path(number), to_safetensors(tensors))

    def load(self, number: int) -> dict[str, Tensor]:
        """Return what was kept of a block.

        Raises:
            ArtefactError: the file is damaged.
        """
        return read_safetensors(self.path(number))[0]

    def misfit(self, number: int, name: str) -> ArtefactError:
        """Return the error for a file that does not hold a weight as the network has it."""
        msg = f"{self.path(number)} does not hold {name} as this network has it: remove the file"
        return ArtefactError(msg)
