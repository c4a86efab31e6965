"""What server and clients send each other: weights that stay, and the bits of a new mask."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from prunegraph.core.errors import ArtefactError
from prunegraph.core.kept import pack_kept, unpack_kept
from prunegraph.core.masks import from_bytes, to_bytes
from prunegraph.core.reading import checked, parse_json
from prunegraph.core.tensors import to_safetensors
from prunegraph.core.weight_mask import WeightMask

WHERE = Path("a message of the federation")


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a message says beside its weights.

    Attributes:
        version: how often the mask had changed; 0 = everything stays.
        base: version of the mask among whose weights the bits say what stays.
        digest: of the mask.
        samples: samples that a client has trained on; 0 from the server.
        loss: mean loss of a client's training.
    """

    version: int
    base: int
    digest: str
    samples: int = 0
    loss: float = 0.0


def pack(
    header: Header,
    tensors: Mapping[str, Tensor],
    mask: WeightMask,
    bits: Tensor | None = None,
) -> bytes:
    """Return a message.

    Args:
        header: see there.
        tensors: of a network; of those that the mask names only what stays is sent.
        mask: what stays.
        bits: of a new mask (``mask_bits``); None: the receiver has it.
    """
    record = np.frombuffer(json.dumps(vars(header)).encode(), np.uint8)
    content = {"header": torch.from_numpy(record.copy())}
    content |= pack_kept(tensors, mask)
    return to_safetensors(content if bits is None else {**content, "mask": bits})


def open_message(message: bytes) -> tuple[Header, dict[str, Tensor]]:
    """Return the header of a message, and the rest of it for ``weights_of`` and ``with_bits``.

    Raises:
        ArtefactError: it is none.
    """
    try:
        content: dict[str, Tensor] = safetensors.torch.load(message)
        record = parse_json(bytes(content.pop("header").numpy()).decode(), WHERE)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        msg = "a message of the federation is damaged: send it again"
        raise ArtefactError(msg) from error
    header: Header = checked(record, Header, str(WHERE))
    return header, content


def weights_of(
    content: Mapping[str, Tensor], like: Mapping[str, Tensor], mask: WeightMask
) -> dict[str, Tensor]:
    """Return the tensors of a message, with zeros where the mask keeps nothing.

    Args:
        content: of the message.
        like: tensors of the same names, shapes and types.
        mask: with which it was packed.

    Raises:
        ArtefactError: they are others.
    """
    try:
        return unpack_kept(content, like, mask)
    except ValueError as error:
        msg = "a message of the federation is of another network or mask: send it again"
        raise ArtefactError(msg) from error


def mask_bits(new: WeightMask, base: WeightMask) -> Tensor:
    """Return the packed bits of a mask, one for each weight that a mask before it keeps."""
    bits = torch.cat([new.keep[name][keep] for name, keep in base.keep.items()])
    return torch.from_numpy(to_bytes(bits.numpy()))


def with_bits(base: WeightMask, packed: Tensor | None, digest: str) -> WeightMask:
    """Return the mask of ``mask_bits``; without bits the base, if it is the one that is meant.

    Raises:
        ArtefactError: the digest is another one's.
    """
    mask = base
    if packed is not None:
        try:
            bits = torch.from_numpy(from_bytes(packed.numpy(), base.num_kept))
        except ValueError as error:
            msg = "the mask of a message is damaged: send it again"
            raise ArtefactError(msg) from error
        pieces = bits.split([int(keep.sum()) for keep in base.keep.values()])
        keep = {name: own.clone() for name, own in base.keep.items()}
        for name, piece in zip(keep, pieces, strict=True):
            keep[name][base.keep[name]] = piece
        mask = WeightMask(keep)
    if mask.digest() != digest:
        msg = f"a mask of the federation has digest {mask.digest()}, not {digest}: send it again"
        raise ArtefactError(msg)
    return mask
