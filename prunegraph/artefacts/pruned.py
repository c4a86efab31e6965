"""Pruned networks on disk: ``mask.json`` says what was cut, ``pruned.safetensors`` what is left.

They lie in a folder under these names, or as any ``NAME.safetensors`` with ``NAME.recipe.json``
beside it.
"""

import hashlib
import json
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from prunegraph.core.errors import ArtefactError, ConfigError, MaskError, one_line
from prunegraph.core.files import file_digest, write_bytes, write_json
from prunegraph.core.masks import ChannelMask, pack_bits, unpack_bits
from prunegraph.core.reading import check_schema, checked, read_json
from prunegraph.core.seeding import seeded
from prunegraph.core.tensors import load_state, read_safetensors, state_tensors, to_safetensors
from prunegraph.graph import AttentionUnit, ExampleInputs, StructureGraph, analyse, unwrap
from prunegraph.graph.apply import apply_mask
from prunegraph.graph.depth import with_depth
from prunegraph.models import load_pretrained, save_pretrained_layout

SCHEMA = 1
MASK_FILE = "mask.json"
WEIGHTS_FILE = "pruned.safetensors"
PRETRAINED_FILE = "model.safetensors"
"""Weights of a folder that ``from_pretrained`` of transformers reads."""

WEIGHTS_SUFFIX, RECIPE_SUFFIX = ".safetensors", ".recipe.json"
MAX_CLASSES, MAX_INPUTS = 100_000, 2**24
"""Outputs, and numbers of an example input, that a recipe may ask to be built and run."""


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Per-channel ``mean`` and ``std`` in a recipe."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


COMMON = {
    "schema": int,
    "checksum": str,
    "arch": str,
    "num_classes": int,
    "example_shape": tuple[int, ...],
    "normalisation": Normalisation | None,
    "extra": dict[str, Any],
    "weights": {"sha256": str},
}
"""What every recipe must hold."""

RECIPE = {**COMMON, "mask": {"keep": str, "size": int, "digest": str}, "graph": str}
"""What the recipe of a network must hold whose channels were cut out."""


@dataclass(frozen=True, kw_only=True)
class PrunedInfo:
    """How the dense network of a pruned one is made, and what it expects.

    Attributes:
        arch: the dense network's name for ``build_model``, or any name of the user's.
        num_classes: size of a classifier's output.
        example_shape: shape of the example input that was analysed, the batch included.
        mean: per-channel mean subtracted from its inputs, or None.
        std: per-channel standard deviation, or None.
        extra: any further JSON values.
    """

    arch: str
    num_classes: int = 1
    example_shape: tuple[int, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class PrunedNetwork:
    """A pruned network read from disk.

    Attributes:
        model: the pruned network with its weights, in eval mode.
        graph: the structure of the dense one.
        mask: what was kept.
        info: how the dense network is made.
    """

    model: nn.Module
    graph: StructureGraph
    mask: ChannelMask
    info: PrunedInfo


@dataclass(frozen=True, eq=False, repr=False)
class StoredChannels(ChannelMask):
    """The mask of a saved network whose weights its method has changed.

    Attributes:
        where: what ``save_pruned`` was given.
        weights: digest of the network's parameters.
    """

    where: Path
    weights: str

    @property
    def name(self) -> str:
        """16 hex digits that name the mask."""
        return super().digest()

    def digest(self) -> str:
        """Return 16 hex digits that name the network."""
        return hashlib.sha256(f"{self.name};{self.weights}".encode()).hexdigest()[:16]


def artefact_paths(where: Path | str) -> tuple[Path, Path]:
    """Return the files of a saved pruned network: the recipe (mask, how to build), the weights.

    Args:
        where: a folder, or a ``.safetensors`` file.
    """
    where = Path(where)
    if where.suffix == WEIGHTS_SUFFIX:
        return where.with_suffix(RECIPE_SUFFIX), where
    pretrained = where / PRETRAINED_FILE
    return where / MASK_FILE, pretrained if pretrained.is_file() else where / WEIGHTS_FILE


def save_pruned(
    where: Path | str,
    *,
    model: nn.Module,
    mask: ChannelMask,
    graph: StructureGraph,
    info: PrunedInfo,
    pretrained: Any = None,
) -> None:
    """Write a pruned network as a recipe and its weights, each atomically.

    Args:
        where: a folder (``mask.json``, ``pruned.safetensors``) or a ``.safetensors`` file, which
            gets its recipe beside it; folders are made if missing.
        model: the pruned network.
        mask: the mask that made it.
        graph: the structure of the dense network.
        info: how the dense network is made.
        pretrained: of a network of transformers, whose config can hold it, the folder that holds
            its tokenizer, or itself: ``where`` becomes a ``from_pretrained`` folder.

    Raises:
        ArtefactError: a file cannot be written, the network is not what the mask leaves, the
            example inputs are too large to read back, ``info`` holds what is no JSON value, or the
            network's state what is no tensor.
        MaskError: the mask is of single weights.
    """
    given: object = mask
    if not isinstance(given, ChannelMask):
        msg = f"the mask is a {type(given).__name__}, not of channels: save_masked writes it"
        raise MaskError(msg)
    found, left = sum(p.numel() for p in model.parameters()), graph.cost(mask).params
    if found != left:
        msg = (
            f"{type(unwrap(model)).__name__} has {found:,} parameters, and the mask leaves "
            f"{left:,}: give the network that apply_mask returned"
        )
        raise ArtefactError(msg)
    own = {
        "mask": {
            "keep": pack_bits(mask.keep),
            "size": int(mask.keep.size),
            "kept": mask.num_kept,
            "digest": ChannelMask(mask.keep).digest(),
        },
        "graph": graph.fingerprint(),
        "attention": graph.attention,
        **({} if graph.min_keep.all() else {"depth": True}),
    }
    write_network(where, unwrap(model), info, own, pretrained)


def write_network(
    where: Path | str, model: nn.Module, info: PrunedInfo, own: Mapping[str, Any], pretrained: Any
) -> None:
    """Write a network's weights, then its recipe.

    Args:
        where: see ``save_pruned``.
        model: the network.
        info: how the dense network is made.
        own: what its kind of mask adds to the recipe.
        pretrained: see ``save_pruned``.

    Raises:
        ArtefactError: a file cannot be written, the example inputs are too large to read back, or
            ``info`` or the network's state holds what a file cannot.
    """
    recipe_path, weights_path = artefact_paths(where)
    if pretrained is None:
        content = to_safetensors(state_tensors(model))
        digest = hashlib.sha256(content).hexdigest()
    else:
        weights_path = Path(where) / PRETRAINED_FILE
        save_pretrained_layout(model, pretrained, where)
        digest = file_digest(weights_path)
    written = {**own, "weights": {"file": weights_path.name, "sha256": digest}}
    record = _record(recipe_path, info, written)
    if pretrained is None:
        write_bytes(weights_path, content)
    write_json(recipe_path, record)


def _record(path: Path, info: PrunedInfo, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe holds, its checksum too."""
    if math.prod(info.example_shape) > MAX_INPUTS:
        msg = (
            f"example inputs of shape {tuple(info.example_shape)} hold more than {MAX_INPUTS:,} "
            "numbers, and reading the network runs it on such: analyse it on one image"
        )
        raise ArtefactError(msg)
    normalisation = None
    if info.mean is not None and info.std is not None:
        normalisation = {"mean": list(info.mean), "std": list(info.std)}
    record = {
        "schema": SCHEMA,
        "arch": info.arch,
        "num_classes": info.num_classes,
        "example_shape": list(info.example_shape),
        "normalisation": normalisation,
        "extra": dict(info.extra),
        **own,
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
    }
    try:
        return {**record, "checksum": checksum(record)}
    except TypeError as error:
        msg = f"{path} cannot hold what info names: {one_line(error)}; give plain numbers"
        raise ArtefactError(msg) from error


def read_info(where: Path | str) -> PrunedInfo:
    """Return how the dense network of a saved one is made.

    Raises:
        ArtefactError: the recipe is missing or damaged.
    """
    path, _ = artefact_paths(where)
    return info_of(read_record(path, COMMON))


def check_builder(build_model: object) -> None:
    """Raise ConfigError for a network in place of the function that makes one."""
    if isinstance(build_model, nn.Module):
        msg = f"build_model is a {type(build_model).__name__}: give a function that makes one"
        raise ConfigError(msg)


def load_pruned(
    where: Path | str,
    build_model: Callable[[], nn.Module],
    example_inputs: ExampleInputs | None = None,
    *,
    graph: StructureGraph | None = None,
) -> PrunedNetwork:
    """Read a pruned network: build the dense one, apply the mask, load the weights.

    Args:
        where: what ``save_pruned`` was given.
        build_model: makes the dense network; its weights do not matter. See ``read_info``.
        example_inputs: what its forward takes, in the shapes of the analysis; default: a float32
            tensor of the shape that was saved. Networks of tokens or of several inputs need it.
        graph: structure of the dense network where it has been analysed already, as a comparison
            has that reads many; default: it is analysed here.

    Returns:
        The network, its graph and mask.

    Raises:
        ConfigError: ``build_model`` is a network.
        ArtefactError: a file is missing, damaged, or of another network; the message names it.
    """
    check_builder(build_model)
    path, weights_path = artefact_paths(where)
    record = read_record(path, RECIPE, "channels")
    info = info_of(record)
    tensors = read_weights(weights_path, record)
    with seeded(0):
        dense = unwrap(build_model())
        attention = record.get("attention", "head")
        if attention not in get_args(AttentionUnit):
            msg = f"{path}: attention {attention!r} is none of {', '.join(get_args(AttentionUnit))}"
            raise ArtefactError(msg)
        if graph is None:
            if example_inputs is None:
                example_inputs = torch.randn(info.example_shape)
            graph = analyse(dense, example_inputs, attention=attention)
            if record.get("depth") is True:
                graph = with_depth(dense, graph, example_inputs)
    if graph.fingerprint() != record["graph"]:
        msg = (
            f"{path} describes a network of another structure than the {info.arch} that was built "
            f"(fingerprint {record['graph']}, built {graph.fingerprint()}): build the same one, or "
            "give the example_inputs that it was analysed on"
        )
        raise ArtefactError(msg)
    mask = _mask(path, record, graph)
    model = apply_mask(dense, graph, mask)
    put_weights(model, tensors, weights_path)
    return PrunedNetwork(model=model.eval(), graph=graph, mask=mask, info=info)


def checksum(record: Mapping[str, Any]) -> str:
    """Return a hash of everything in a record but the checksum itself."""
    content = {key: value for key, value in record.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_weights(path: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that belong to a recipe.

    Raises:
        ArtefactError: the file is missing, damaged, or not the one that the recipe names.
    """
    tensors, _ = read_safetensors(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != record["weights"]["sha256"]:
        msg = (
            f"{path} is not the file that its recipe was written with: its bytes were changed; "
            "copy both files again"
        )
        raise ArtefactError(msg)
    return tensors


def put_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy the tensors of a file into a network.

    A folder that ``from_pretrained`` reads may hold them by other names: then transformers reads
    it.

    Raises:
        PruneGraphError: they do not fit the network.
    """
    if path.name == PRETRAINED_FILE and not tensors.keys() <= state_tensors(model).keys():
        tensors = state_tensors(load_pretrained(path.parent, kind=type(model).__name__))
    load_state(model, tensors, path)


def read_record(
    path: Path, shape: Mapping[str, Any], kind: Literal["channels", "weights"] | None = None
) -> dict[str, Any]:
    """Return the content of a recipe once its checksum has been found right.

    Args:
        path: the recipe.
        shape: what it must hold.
        kind: what its mask must be of; None: either.

    Raises:
        ArtefactError: it is missing, damaged, or of another kind of mask.
    """
    record: dict[str, Any] = checked(read_json(path), {"checksum": str, "schema": int}, str(path))
    if record["checksum"] != checksum(record):
        msg = f"{path} is damaged: its content does not fit its checksum; copy it again"
        raise ArtefactError(msg)
    check_schema(record["schema"], SCHEMA, path)
    found = record.get("kind", "channels")
    if kind is not None and found != kind:
        reader = "load_masked" if found == "weights" else "load_pruned"
        msg = f"{path} is of a network with a mask of {ascii(found)[:40]}: read it with {reader}"
        raise ArtefactError(msg)
    record = checked(record, shape, str(path))
    sizes = (record["num_classes"], *record["example_shape"])
    if min(sizes) < 1 or sizes[0] > MAX_CLASSES or math.prod(sizes[1:]) > MAX_INPUTS:
        msg = f"{path}: no network has {sizes[0]} classes and inputs of shape {sizes[1:]}"
        raise ArtefactError(msg)
    return record


def info_of(record: Mapping[str, Any]) -> PrunedInfo:
    """Return how the dense network is made, from a recipe."""
    normalisation: Normalisation | None = record["normalisation"]
    return PrunedInfo(
        arch=record["arch"],
        num_classes=record["num_classes"],
        example_shape=record["example_shape"],
        mean=None if normalisation is None else normalisation.mean,
        std=None if normalisation is None else normalisation.std,
        extra=record["extra"],
    )


def _mask(path: Path, record: Mapping[str, Any], graph: StructureGraph) -> ChannelMask:
    """Return the mask of a record, checked against its own digest and the graph."""
    try:
        size, digest = record["mask"]["size"], record["mask"]["digest"]
        mask = graph.mask(unpack_bits(record["mask"]["keep"], size))
    except (ValueError, MaskError) as error:
        msg = f"{path} holds no legal mask of this network ({error}): save the network again"
        raise ArtefactError(msg) from error
    if mask.digest() != digest:
        msg = f"{path}: the keep bits give digest {mask.digest()}, the file says {digest}"
        raise ArtefactError(msg)
    return mask
