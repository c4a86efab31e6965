"""A network with zeros in place in a small file: one bit a weight, compressed, and what stays."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

from prunegraph.core.errors import ArtefactError, BudgetError, MaskError, first_line
from prunegraph.core.files import write_bytes
from prunegraph.core.kept import pack_kept, unpack_kept
from prunegraph.core.masks import from_bytes, to_bytes
from prunegraph.core.pattern import Pattern
from prunegraph.core.reading import checked, parse_json
from prunegraph.core.tensors import load_state, read_safetensors, state_tensors, to_safetensors
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import unwrap

BITS = "bits"
"""Name of the tensor that holds the compressed bits of all masked weights; others are types."""


def save_sparse(path: Path | str, model: nn.Module, mask: WeightMask) -> None:
    """Write a network without the weights that a mask removes, atomically.

    Args:
        path: file to write.
        model: the network.
        mask: what stays; of masks of several groups give one (``WeightMask.groups``).

    Raises:
        ArtefactError: the file cannot be written, or a weight is not zero that the mask removes.
    """
    model = unwrap(model)
    try:
        mask.check_zeros(model)
    except MaskError as error:
        msg = f"{path} cannot hold this network: {error}; apply the mask first"
        raise ArtefactError(msg) from error
    flat = torch.cat([bits.flatten() for bits in mask.keep.values()])
    packed = zlib.compress(to_bytes(flat.numpy()).tobytes(), 9)
    content = pack_kept(state_tensors(model), mask)
    content[BITS] = torch.from_numpy(np.frombuffer(packed, np.uint8).copy())
    record = {
        "weights": list(mask.keep),
        "pattern": str(mask.pattern),
        "digest": mask.digest(),
    }
    write_bytes(path, to_safetensors(content, {"sparse": json.dumps(record)}))


def load_sparse(path: Path | str, model: nn.Module) -> WeightMask:
    """Load the file into a network of the same structure; return its mask.

    Args:
        path: what ``save_sparse`` wrote.
        model: the dense network, built anew; changed in place, or not at all.

    Raises:
        ArtefactError: the file is missing, damaged, or of another network.
    """
    path, model = Path(path), unwrap(model)
    content, metadata = read_safetensors(path)
    text = checked(metadata, {"sparse": str}, str(path))["sparse"]
    wanted = {"weights": list[str], "pattern": str, "digest": str}
    record = checked(parse_json(text, path), wanted, str(path))
    own = state_tensors(model)
    try:
        shapes = {name: own[name].shape for name in record["weights"]}
        size = sum(shape.numel() for shape in shapes.values())
        packed = content.pop(BITS).numpy().tobytes()
        raw = zlib.decompressobj().decompress(packed, size // 8 + 1)
        flat = torch.from_numpy(from_bytes(np.frombuffer(raw, np.uint8), size))
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        keep = {n: piece.reshape(shapes[n]) for n, piece in zip(shapes, pieces, strict=True)}
        mask = WeightMask(keep, Pattern.parse(record["pattern"]))
        tensors = unpack_kept(content, own, mask)
    except (
        LookupError,
        ValueError,
        TypeError,
        RuntimeError,
        zlib.error,
        BudgetError,
        MaskError,
    ) as error:
        msg = f"{path} does not fit {type(model).__name__}: {first_line(error)}"
        raise ArtefactError(msg) from error
    if mask.digest() != record["digest"]:
        msg = f"{path} is damaged: its mask has digest {mask.digest()}; copy it again"
        raise ArtefactError(msg)
    load_state(model, tensors, path)
    return mask
