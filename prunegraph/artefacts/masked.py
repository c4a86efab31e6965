"""Networks with zeros in place on disk: the recipe, the weights in their dense shapes, the mask.

They lie in a folder as ``mask.json``, ``pruned.safetensors`` and ``mask.safetensors``, or as any
``NAME.safetensors`` with ``NAME.recipe.json`` and ``NAME.mask.safetensors`` beside it. A network of
transformers lies in a folder that its own ``from_pretrained`` reads, the other two files beside.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prunegraph.artefacts.pruned import (
    COMMON,
    WEIGHTS_SUFFIX,
    PrunedInfo,
    artefact_paths,
    check_builder,
    info_of,
    put_weights,
    read_record,
    read_weights,
    write_network,
)
from prunegraph.core.errors import ArtefactError, MaskError
from prunegraph.core.seeding import seeded
from prunegraph.core.weight_mask import GroupedMask, WeightMask
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


@dataclass(frozen=True, kw_only=True)
class StoredMask:
    """The mask of a saved network with zeros in place; its file is read when it is asked for.

    Attributes:
        where: what ``save_masked`` was given.
        name: the mask's digest.
        sparsity: share of the prunable weights that are zero.
        weights: digest of the network's parameters, where a method changed those that stay.
    """

    where: Path
    name: str
    sparsity: float
    weights: str | None = None

    def digest(self) -> str:
        """Return 16 hex digits that name the network: the mask's, unless its weights differ."""
        if self.weights is None:
            return self.name
        return hashlib.sha256(f"{self.name};{self.weights}".encode()).hexdigest()[:16]

    def load(self) -> WeightMask:
        """Read the mask.

        Raises:
            ArtefactError: the file is missing, damaged, or holds another mask.
        """
        return load_bits(self.where, self.name)


def load_bits(where: Path | str, digest: str) -> WeightMask:
    """Read the mask of a saved network.

    Args:
        where: what ``save_masked`` was given.
        digest: its name.

    Raises:
        ArtefactError: the file is missing, damaged, or holds another mask.
    """
    mask = WeightMask.load(bits_path(where))
    if mask.digest() != digest:
        msg = (
            f"{bits_path(where)} holds the mask {mask.digest()}, its recipe names {digest}: copy "
            "the files of one network"
        )
        raise ArtefactError(msg)
    return mask


def bits_path(where: Path | str) -> Path:
    """Return the file that holds the mask of a saved network.

    Args:
        where: a folder, or a ``.safetensors`` file.
    """
    where = Path(where)
    if where.suffix == WEIGHTS_SUFFIX:
        return where.with_suffix(BITS_SUFFIX)
    return where / BITS_FILE


def save_masked(
    where: Path | str,
    *,
    model: nn.Module,
    mask: WeightMask,
    info: PrunedInfo,
    pretrained: Any = None,
) -> None:
    """Write a network with zeros in place, each file atomically; the recipe comes last.

    Args:
        where: a folder, or a ``.safetensors`` file, which gets the others beside it; folders are
            made if missing.
        model: the network.
        mask: where its zeros lie.
        info: how the dense network is made.
        pretrained: of a network of transformers, the folder that holds its tokenizer, or itself:
            ``where`` becomes a ``from_pretrained`` folder.

    Raises:
        ArtefactError: a file cannot be written, a weight is not zero that the mask removes, or
            ``info`` or the network's state holds what a file cannot.
    """
    model = unwrap(model)
    try:
        mask.check_zeros(model)
    except MaskError as error:
        msg = f"{where} cannot hold this network and mask: {error}; apply the mask first"
        raise ArtefactError(msg) from error
    own = {
        "kind": "weights",
        "mask": {
            "pattern": str(mask.pattern),
            "size": mask.size,
            "kept": mask.num_kept,
            "digest": mask.digest(),
        },
    }
    mask.save(bits_path(where))
    write_network(where, model, info, own, pretrained)


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
    mask = load_bits(where, record["mask"]["digest"])
    with seeded(0):
        model = unwrap(build_model())
    put_weights(model, tensors, weights_path)
    try:
        mask.check_zeros(model)
    except MaskError as error:
        msg = f"{weights_path} does not fit its mask: {error}; copy the files again"
        raise ArtefactError(msg) from error
    if isinstance(mask, GroupedMask):
        mask.attach(model)
    return MaskedNetwork(model=model.eval(), mask=mask, info=info_of(record))
