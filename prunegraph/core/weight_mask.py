"""Which single weights stay; the others become zero in place."""

import copy
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunegraph.core.errors import ArtefactError, BudgetError, MaskError, ModelError, first_line
from prunegraph.core.files import write_bytes
from prunegraph.core.masks import from_bytes, to_bytes
from prunegraph.core.pattern import UNSTRUCTURED, Pattern
from prunegraph.core.reading import check_schema, checked, parse_json
from prunegraph.core.states import part_of
from prunegraph.core.tensors import read_safetensors, to_safetensors

SCHEMA = 1

RECORD = {"schema": int, "pattern": str, "digest": str, "shapes": dict[str, tuple[int, ...]]}
"""What the header of a mask's file says in JSON, under ``weight_mask``, of the packed bits."""

GROUP_MASKS = "_group_masks"
"""Attribute of a network whose batches use the weights of their group."""

MOST_AXES = 8
"""Of a weight; torch's own convolutions have 5."""

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, eq=False, repr=False)
class WeightMask:
    """Which single weights of a network stay.

    Attributes:
        keep: parameter name -> booleans of its shape, True = keep, ordered by name; not to be
            written into. Parameters that it does not name stay whole.
        pattern: where the zeros lie. A layer whose outlier rows stay dense has no n:m pattern.
    """

    keep: Mapping[str, Tensor]
    pattern: Pattern = UNSTRUCTURED

    def __post_init__(self) -> None:
        if not self.keep:
            msg = "a weight mask must name at least one weight"
            raise MaskError(msg)
        for name, bits in self.keep.items():
            if not isinstance(bits, Tensor) or bits.dtype != torch.bool or bits.numel() == 0:
                what = f"{tuple(bits.shape)} {bits.dtype}" if isinstance(bits, Tensor) else "none"
                msg = f"the mask of {name} must be a tensor of booleans, not {what}"
                raise MaskError(msg)
        ordered = {name: self.keep[name].cpu().contiguous() for name in sorted(self.keep)}
        object.__setattr__(self, "keep", ordered)

    @property
    def size(self) -> int:
        """Number of weights that the mask decides on."""
        return sum(bits.numel() for bits in self.keep.values())

    @functools.cached_property
    def num_kept(self) -> int:
        """Number of weights that stay."""
        return sum(int(bits.count_nonzero()) for bits in self.keep.values())

    @property
    def density(self) -> float:
        """Share of the weights that stay."""
        return self.num_kept / self.size

    @property
    def sparsity(self) -> float:
        """Share of the weights that become zero, counted."""
        return (self.size - self.num_kept) / self.size

    @property
    def groups(self) -> Mapping[str, "WeightMask"]:
        """The mask of each group of batches; here one, of all."""
        return {"": self}

    @property
    def densities(self) -> dict[str, float]:
        """Share of the weights that stay, by parameter."""
        return {name: int(bits.count_nonzero()) / bits.numel() for name, bits in self.keep.items()}

    def digest(self) -> str:
        """Return 16 hex digits that name the mask: its bits, names, shapes and pattern."""
        content = hashlib.sha256(f"{self.pattern};".encode())
        for name, bits in self.keep.items():
            content.update(json.dumps([name, list(bits.shape)]).encode())
            content.update(to_bytes(bits.flatten().numpy()).tobytes())
        return content.hexdigest()[:16]

    def nested(self, other: "WeightMask") -> bool:
        """Return whether every weight that stays here stays in the other mask too."""
        return self._shared_with(other) == self.num_kept

    def overlap(self, other: "WeightMask") -> float:
        """Return the share of weights that both keep, of what the smaller one keeps; in [0, 1].

        It is 1 if one mask is nested in the other.
        """
        smaller = min(self.num_kept, other.num_kept)
        return self._shared_with(other) / smaller if smaller else 1.0

    def _shared_with(self, other: "WeightMask") -> int:
        self.check_shapes(other.keep)
        return sum(
            int((bits & other.keep[name]).count_nonzero()) for name, bits in self.keep.items()
        )

    def check_shapes(self, others: Mapping[str, Tensor]) -> None:
        """Raise MaskError unless tensors have the names and shapes of the weights."""
        shapes = {name: bits.shape for name, bits in self.keep.items()}
        if shapes != {name: other.shape for name, other in others.items()}:
            msg = "masks or scores belong to different networks: their names or shapes differ"
            raise MaskError(msg)

    def apply(self, model: Network) -> Network:
        """Return a copy of a network with zeros in place; the network stays as it is.

        Raises:
            MaskError: a parameter is missing or has another shape.
            ModelError: something that a module holds cannot be copied.
        """
        self.parameters_of(model)
        try:
            with torch.no_grad():
                copied = copy.deepcopy(model)
        except (TypeError, RuntimeError) as error:  # such as tensors that hang on gradients
            msg = f"{type(model).__name__} cannot be copied ({first_line(error)})"
            raise ModelError(msg) from error
        self.put_zeros(copied)
        return copied

    @torch.no_grad()
    def put_zeros(self, model: nn.Module) -> None:
        """Write zeros into a network where the mask keeps nothing.

        Raises:
            MaskError: a parameter is missing or has another shape; nothing is written then.
        """
        for name, parameter in self.parameters_of(model).items():
            parameter.masked_fill_(~self.keep[name].to(parameter.device), 0.0)

    def check_zeros(self, model: nn.Module) -> None:
        """Raise MaskError unless a network is zero wherever the mask keeps nothing."""
        for name, parameter in self.parameters_of(model).items():
            left = int((parameter[~self.keep[name].to(parameter.device)] != 0.0).sum())
            if left:
                msg = f"{name} holds {left} weights that are not zero where the mask removes them"
                raise MaskError(msg)

    def parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters that the mask names.

        Raises:
            MaskError: one is missing or has another shape.
        """
        own = dict(model.named_parameters(remove_duplicate=False))
        for name, bits in self.keep.items():
            if name not in own:
                msg = (
                    f"{type(model).__name__} has no parameter {name}, which the mask names: use "
                    "the mask of this network"
                )
                raise MaskError(msg)
            if own[name].shape != bits.shape:
                msg = (
                    f"{name} has shape {tuple(own[name].shape)}, its mask {tuple(bits.shape)}: use "
                    "the mask of this network"
                )
                raise MaskError(msg)
        return {name: own[name] for name in self.keep}

    def packed(self) -> dict[str, Tensor]:
        """Return the bits of each parameter, eight a byte: ``[bytes]`` uint8."""
        return {
            name: torch.from_numpy(to_bytes(bits.flatten().numpy()))
            for name, bits in self.keep.items()
        }

    def unpacked(self, packed: Mapping[str, Tensor]) -> "WeightMask":
        """Return the mask of the same weights whose ``packed`` bits are given.

        Raises:
            ValueError: they are not those of as many weights.
        """
        shapes = {name: tuple(bits.shape) for name, bits in self.keep.items()}
        return WeightMask(_unpacked(packed, shapes), self.pattern)

    def save(self, path: Path | str) -> None:
        """Write the mask as a safetensors file, one bit a weight, atomically.

        Raises:
            ArtefactError: the file cannot be written.
        """
        write_bytes(path, self.to_file())

    def to_file(self) -> bytes:
        """Return the bytes of the file that ``save`` writes."""
        record = {
            "schema": SCHEMA,
            "pattern": str(self.pattern),
            "digest": self.digest(),
            "shapes": {name: list(bits.shape) for name, bits in self.keep.items()},
        }
        record |= self._more()
        return to_safetensors(self.packed(), {"weight_mask": json.dumps(record)})

    def _more(self) -> dict[str, Any]:
        """Return what the file's record says besides."""
        return {}

    @classmethod
    def load(cls, path: Path | str) -> "WeightMask":
        """Read what ``save`` wrote; masks of several groups come as a ``GroupedMask``.

        Raises:
            ArtefactError: the file is missing, damaged, or holds no weight mask.
        """
        path = Path(path)
        packed, metadata = read_safetensors(path)
        found = checked(metadata, {"weight_mask": str}, str(path))
        value = parse_json(found["weight_mask"], path)
        record = checked(value, {"schema": int}, str(path))
        check_schema(record["schema"], SCHEMA, path)
        names = checked(record.pop("groups", []), list[str], str(path))
        record = checked(record, RECORD, str(path))
        try:
            mask: WeightMask
            if names:
                own = {name: part_of(packed, str(number)) for number, name in enumerate(names)}
                masks = {n: WeightMask(_unpacked(p, record["shapes"])) for n, p in own.items()}
                mask = GroupedMask.of(masks)
            else:
                pattern = Pattern.parse(record["pattern"])
                mask = cls(_unpacked(packed, record["shapes"]), pattern)
        except (ValueError, BudgetError, MaskError) as error:
            msg = f"{path} holds no weight mask ({first_line(error)}): save the mask again"
            raise ArtefactError(msg) from error
        if mask.digest() != record["digest"]:
            msg = (
                f"{path}: its bits give digest {mask.digest()}, the file says "
                f"{record['digest']}: it was changed; copy it again"
            )
            raise ArtefactError(msg)
        return mask

    def __repr__(self) -> str:
        return (
            f"WeightMask({self.num_kept} of {self.size} weights in {len(self.keep)} parameters, "
            f"{self.pattern}, {self.digest()})"
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, WeightMask)
            and self.pattern == other.pattern
            and self.keep.keys() == other.keep.keys()
            and all(torch.equal(bits, other.keep[name]) for name, bits in self.keep.items())
        )

    def __hash__(self) -> int:
        return hash(self.digest())


@dataclass(frozen=True, eq=False, repr=False)
class GroupedMask(WeightMask):
    """Masks of several groups of batches (languages) on one set of weights; made by ``of``.

    Attributes:
        keep: the weights that any group keeps: what is stored.
        masks: of each group: what its batches run with.
    """

    masks: Mapping[str, WeightMask] = field(default_factory=dict)

    @classmethod
    def of(cls, masks: Mapping[str, WeightMask]) -> WeightMask:
        """Return the masks of groups as one; of equal ones a plain mask.

        Raises:
            MaskError: they are of other weights.
        """
        first = next(iter(masks.values()))
        if all(mask == first for mask in masks.values()):
            return first
        for mask in masks.values():
            mask.overlap(first)  # which checks names and shapes
        names = first.keep
        keep = {n: torch.stack([m.keep[n] for m in masks.values()]).any(0) for n in names}
        return cls(keep, masks=dict(masks))

    @property
    def groups(self) -> Mapping[str, WeightMask]:
        """The mask of each group."""
        return self.masks

    @property
    def sparsity(self) -> float:
        """Share of the weights that are zero for a group; the mean over groups."""
        return sum(mask.sparsity for mask in self.masks.values()) / len(self.masks)

    def digest(self) -> str:
        """Return 16 hex digits that name the masks, with their groups."""
        words = json.dumps({name: mask.digest() for name, mask in self.masks.items()})
        return hashlib.sha256(words.encode()).hexdigest()[:16]

    def apply(self, model: Network) -> Network:
        """Return a copy that holds the weights of all groups, and uses those of a batch's group."""
        return self.attach(super().apply(model))

    def attach(self, model: Network) -> Network:
        """Let a network use for each batch the weights of its group (``weights_for``)."""
        setattr(model, GROUP_MASKS, self)
        return model

    def packed(self) -> dict[str, Tensor]:
        """Return the bits of each group's parameters, ``"NUMBER.NAME"``: ``[bytes]`` uint8."""
        masks = enumerate(self.masks.values())
        return {f"{k}.{n}": bits for k, mask in masks for n, bits in mask.packed().items()}

    def _more(self) -> dict[str, Any]:
        return {"groups": list(self.masks)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GroupedMask) and self.masks == other.masks

    def __hash__(self) -> int:
        return hash(self.digest())


def weights_for(model: nn.Module, group: str) -> dict[str, Tensor]:
    """Return the parameters that a group's batches use in place of a network's own; often none.

    Give them to ``torch.func.functional_call``. Gradients flow to the weights of the group alone.

    Raises:
        MaskError: the network has masks of groups, and none of this one.
    """
    masks: GroupedMask | None = getattr(model, GROUP_MASKS, None)
    if masks is None:
        return {}
    if group not in masks.masks:
        msg = f"the network has no mask for {group!r}; it has: {', '.join(masks.masks)}"
        raise MaskError(msg)
    keep = masks.masks[group].keep
    own = masks.parameters_of(model)
    return {name: own[name] * keep[name].to(own[name].device) for name in keep}


def _unpacked(
    packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Return booleans from packed bits; ValueError if the bytes are not those of the shapes."""
    if packed.keys() != shapes.keys():
        msg = f"{min(packed.keys() ^ shapes.keys())!a} lacks its shape or its bits"
        raise ValueError(msg)
    keep = {}
    for name, shape in shapes.items():
        if len(shape) > MOST_AXES or min(shape, default=1) < 1 or packed[name].dtype != torch.uint8:
            msg = f"{name} has shape {shape} and bits of type {packed[name].dtype}"
            raise ValueError(msg)
        keep[name] = torch.from_numpy(from_bytes(packed[name].numpy(), math.prod(shape))).reshape(
            shape
        )
    return keep
