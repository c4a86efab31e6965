"""The tensors of a network without the weights that a mask removes, end to end."""

from collections.abc import Mapping

import torch
from torch import Tensor

from prunegraph.core.weight_mask import WeightMask


def pack_kept(tensors: Mapping[str, Tensor], mask: WeightMask) -> dict[str, Tensor]:
    """Return one tensor for each type, of all that stays, by name; without names or shapes.

    Args:
        tensors: of a network; of those that the mask names only what stays is taken.
        mask: what stays.
    """
    return {
        dtype: torch.cat([_kept(tensors[name], mask.keep.get(name)) for name in names])
        for dtype, names in _by_dtype(tensors).items()
    }


def unpack_kept(
    content: Mapping[str, Tensor], like: Mapping[str, Tensor], mask: WeightMask
) -> dict[str, Tensor]:
    """Return the tensors of ``pack_kept``, with zeros where the mask keeps nothing.

    Args:
        content: what was packed.
        like: tensors of the same names, shapes and types.
        mask: with which it was packed.

    Raises:
        ValueError: they are others.
    """
    found: dict[str, Tensor] = {}
    for dtype, names in _by_dtype(like).items():
        sizes = [int(mask.keep[n].sum()) if n in mask.keep else like[n].numel() for n in names]
        if dtype not in content or content[dtype].shape != (sum(sizes),):
            msg = f"it holds other tensors of type {dtype}"
            raise ValueError(msg)
        for name, values in zip(names, content[dtype].split(sizes), strict=True):
            if name in mask.keep:
                found[name] = torch.zeros(like[name].shape, dtype=values.dtype)
                found[name][mask.keep[name]] = values
            else:
                found[name] = values.reshape(like[name].shape)
    return found


def _by_dtype(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the names by type, sorted."""
    found: dict[str, list[str]] = {}
    for name in sorted(tensors):
        found.setdefault(str(tensors[name].dtype).removeprefix("torch."), []).append(name)
    return found


def _kept(tensor: Tensor, keep: Tensor | None) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.flatten() if keep is None else tensor[keep]
