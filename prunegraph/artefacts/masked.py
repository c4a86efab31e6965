"""Networks with zeros in place on disk: the recipe, the weights in their dense shapes, the mask.

They lie in a folder as ``mask.json``, ``pruned.safetensors`` and ``mask.safetensors``, or as any
``NAME.safetensors`` with ``NAME.recipe.json`` and ``NAME.mask.safetensors`` beside it.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from prunegraph.artefacts.pruned import (
    COMMON,
    WEIGHTS_SUFFIX,
    PrunedInfo,
    artefact_paths,
    check_builder,
    info_of,
    make_record,
    read_record,
    read_weights,
)
from prunegraph.core.errors import ArtefactError, MaskError
from prunegraph.core.files import write_bytes, write_json
from prunegraph.core.seeding import seeded
from prunegraph.core.tensors import load_state, state_tensors, to_safetensors
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import unwrap

BITS_FILE, BITS_SUFFIX = "mask.safetensors", ".mask.safetensors"

RECIPE = {**COMMON, "mask": {"digest": str}}
"""What the recipe of a network with zeros in place must hold."""


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskedNetwork:
    """A network with zeros in place, read from disk.

    Attributes:
        model: the network with its weights, in eval mode.
        mask: where its zeros lie.
        info: how the dense network is made.
    """

    model: nn.Module
    mask: WeightMask
    info: PrunedInfo


def bits_path(where: Path | str) -> Path:
    """Return the file that holds the mask of a saved network.

    Args:
        where: a folder, or a ``.safetensors`` file.
    """
    where = Path(where)
    if where.suffix == WEIGHTS_SUFFIX:
        return where.with_suffix(BITS_SUFFIX)
    return where / BITS_FILE


def save_masked(where: Path | str, *, model: nn.Module, mask: WeightMask, info: PrunedInfo) -> None:
    """Write a network with zeros in place, each file atomically.

    Args:
        where: a folder, or a ``.safetensors`` file, which gets the others beside it; folders are
            made if missing.
        model: the network.
        mask: where its zeros lie.
        info: how the dense network is made.

    Raises:
        ArtefactError: a file cannot be written, a weight is not zero that the mask removes, or
            ``info`` or the network's state holds what a file cannot.
    """
    recipe_path, weights_path = artefact_paths(where)
    model = unwrap(model)
    try:
        mask.check_zeros(model)
    except MaskError as error:
        msg = f"{weights_path} cannot hold this network and mask: {error}; apply the mask first"
        raise ArtefactError(msg) from error
    weights = to_safetensors(state_tensors(model))
    own = {
        "kind": "weights",
        "mask": {
            "pattern": str(mask.pattern),
            "size": mask.size,
            "kept": mask.num_kept,
            "digest": mask.digest(),
        },
        "weights": {"file": weights_path.name, "sha256": hashlib.sha256(weights).hexdigest()},
    }
    record = make_record(recipe_path, info, own)
    write_bytes(weights_path, weights)
    mask.save(bits_path(where))
    write_json(recipe_path, record)


def load_masked(where: Path | str, build_model: Callable[[], nn.Module]) -> MaskedNetwork:
    """Read a network with zeros in place: build the dense one, load the weights, check the zeros.

    Args:
        where: what ``save_masked`` was given.
        build_model: makes the dense network; its weights do not matter. See ``read_info``.

    Raises:
        ConfigError: ``build_model`` is a network.
        ArtefactError: a file is missing, damaged, or of another network; the message names it.
    """
    check_builder(build_model)
    path, weights_path = artefact_paths(where)
    record = read_record(path, RECIPE, "weights")
    tensors = read_weights(weights_path, record)
    mask = WeightMask.load(bits_path(where))
    if mask.digest() != record["mask"]["digest"]:
        msg = (
            f"{bits_path(where)} holds the mask {mask.digest()}, {path.name} names "
            f"{record['mask']['digest']}: copy the files of one network"
        )
        raise ArtefactError(msg)
    with seeded(0):
        model = unwrap(build_model())
    load_state(model, tensors, weights_path)
    try:
        mask.check_zeros(model)
    except MaskError as error:
        msg = f"{weights_path} does not fit its mask: {error}; copy the files again"
        raise ArtefactError(msg) from error
    return MaskedNetwork(model=model.eval(), mask=mask, info=info_of(record))
