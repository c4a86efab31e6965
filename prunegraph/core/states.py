"""How far something long is: one file that its next start, and no other, goes on from."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from prunegraph.core.errors import ArtefactError
from prunegraph.core.files import write_bytes
from prunegraph.core.reading import checked, parse_json
from prunegraph.core.tensors import read_safetensors, to_safetensors


def write_state(
    path: Path,
    what: str,
    identity: Mapping[str, Any],
    done: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write how far something is.

    Args:
        path: of the file.
        what: a noun for it, as ``"training"``.
        identity: JSON values that tell it from others.
        done: JSON values of what is done.
        tensors: by part and name.
    """
    flat = {f"{part}.{name}": t for part, own in tensors.items() for name, t in own.items()}
    record = json.dumps({"identity": identity, "done": done})
    write_bytes(path, to_safetensors(flat, {what: record}))


def read_state(
    path: Path, what: str, identity: Mapping[str, Any], shape: Any
) -> tuple[Any, dict[str, Tensor]]:
    """Return what ``write_state`` was given: what is done, and the tensors by ``"part.name"``.

    Args:
        path: of the file.
        what: as it was written.
        identity: of the one that goes on.
        shape: of what is done, see ``checked``.

    Raises:
        ArtefactError: the file is damaged, or of another one.
    """
    tensors, metadata = read_safetensors(path)
    if what not in metadata:
        msg = f"{path} is no {what} checkpoint of prunegraph: choose another file name"
        raise ArtefactError(msg)
    value = parse_json(metadata[what], path)
    record = checked(value, {"identity": dict[str, Any], "done": shape}, str(path))
    own = json.loads(json.dumps(identity))
    odd = [key for key, value in own.items() if record["identity"].get(key) != value]
    if odd:
        msg = (
            f"{path} is of another {what} (different {', '.join(odd)}): delete it, or choose "
            "another folder"
        )
        raise ArtefactError(msg)
    return record["done"], tensors


def part_of(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Return the tensors of a part by name."""
    prefix = f"{part}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@contextmanager
def told_as_damage(path: Path | str) -> Iterator[None]:
    """Tell of tensors that are missing or do not fit in one line.

    Raises:
        ArtefactError: what is done within fails so.
    """
    try:
        yield
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        msg = f"{path} is damaged: delete it to start over"
        raise ArtefactError(msg) from error
