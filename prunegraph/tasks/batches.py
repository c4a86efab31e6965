"""Batches of any form: those of a user's loader, several as one."""

import copy
import hashlib
import itertools
from collections import UserDict
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset, IterableDataset

from prunegraph.core.errors import DataError
from prunegraph.core.splits import ReadyBatches, TrainSplit
from prunegraph.graph.trace.calls import PLAIN, tensors_in


class _UnlikeError(Exception):
    """Parts of batches do not join."""


def check_loader(data: object, what: str) -> None:
    """Raise DataError for what yields no batches: a data set yields one sample at a time.

    Args:
        data: what was given.
        what: name of the argument.
    """
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        msg = (
            f"{what} is a data set ({type(data).__name__}), which gives one sample at a time: "
            "give torch.utils.data.DataLoader(it, batch_size=128, shuffle=True)"
        )
        raise DataError(msg)
    if isinstance(data, Tensor):
        msg = f"{what} is one tensor, without labels: give (images, labels) or a loader of batches"
        raise DataError(msg)
    if not isinstance(data, Iterable) or isinstance(data, str | bytes):
        msg = f"{what} is a {type(data).__name__}: give a loader of batches"
        raise DataError(msg)


def ready_split(data: Iterable[Any], what: str, most: int) -> TrainSplit:
    """Return the batches of a list, or the first ``most`` of a loader, which may be endless.

    Raises:
        DataError: there are none.
    """
    check_loader(data, what)
    listed = isinstance(data, list | tuple)
    held = list(data) if listed else list(itertools.islice(data, most))
    if not held:
        msg = f"{what} holds no batches: give a loader of data, or a list of batches"
        raise DataError(msg)
    digest = hashlib.sha256()
    for tensor in tensors_in(held):
        content = tensor.detach().cpu().flatten().contiguous()
        digest.update(content.view(torch.uint8).numpy().data)
    sizes = [max(num_samples(batch), 1) for batch in held]
    source = ReadyBatches(held=held, sizes=sizes, digest=digest.hexdigest()[:16])
    return TrainSplit(source, torch.arange(len(held)))


def num_samples(batch: Any) -> int:
    """Return how many samples a batch has by its tensors; 0 = they do not agree."""
    sizes = {len(tensor) for tensor in tensors_in(batch) if tensor.dim()}
    return sizes.pop() if len(sizes) == 1 else 0


def is_finite(batch: Any) -> bool:
    """Return whether a batch's tensors hold neither NaN nor infinite values."""
    tensors = (tensor for tensor in tensors_in(batch) if tensor.is_floating_point())
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def check_finite(batch: Any, what: str) -> None:
    """Raise DataError for a batch that holds NaN or infinite values.

    Args:
        batch: what a network has made no numbers of.
        what: where it is from, in the plural.
    """
    if not is_finite(batch):
        msg = f"{what} hold NaN or infinite values: repair these samples, or leave them out"
        raise DataError(msg)


def num_tokens(batch: Any) -> int:
    """Return how many tokens a sample of a batch has; 0 = it holds others than whole numbers."""
    tensors = tensors_in(batch)
    if any(tensor.is_floating_point() for tensor in tensors):
        return 0
    return max((tensor.shape[-1] for tensor in tensors if tensor.dim() > 1), default=0)


def singles(batch: Any) -> Iterator[Any]:
    """Yield the samples of a batch as batches of one; the batch itself if they cannot be told."""
    for number in range(num_samples(batch)):
        yield tree_map_only(Tensor, itemgetter(slice(number, number + 1)), batch)
    if not num_samples(batch):
        yield batch


def joined(batches: Sequence[Any]) -> Any:
    """Return batches as one.

    Tensors are joined along their first axis, in nested tuples, lists and dictionaries. Where
    batches cannot be joined (sentences of other lengths, lists of samples, objects), it is the
    first one.

    Args:
        batches: at least one.
    """
    if not all(num_samples(batch) for batch in batches):
        return batches[0]
    try:
        return _join(batches)
    except _UnlikeError:
        return batches[0]


def _join(parts: Sequence[Any]) -> Any:
    """Join what stands at one place of several batches.

    Raises:
        _UnlikeError: it is of several forms, or of one that is not known.
    """
    first = parts[0]
    if len({type(part) for part in parts}) > 1:
        raise _UnlikeError
    if isinstance(first, Tensor) and first.dim():
        if len({(part.shape[1:], part.dtype, part.device) for part in parts}) > 1:
            raise _UnlikeError
        return torch.cat(list(parts))
    if isinstance(first, dict | UserDict):
        return _join_named(parts)
    if isinstance(first, tuple | list) and not _are_samples(parts):
        items = [_join(own) for own in zip(*parts, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    alike = isinstance(first, PLAIN) and all(part == first for part in parts)
    if not alike and len(parts) > 1:
        raise _UnlikeError
    return first


def _are_samples(parts: Sequence[Any]) -> bool:
    """Tell whether lists seem to have an item for each sample, which do not add up item by item."""
    kinds = {getattr(item, "shape", "plain") for item in parts[0]}
    return len({len(part) for part in parts}) > 1 or (len(parts[0]) > 1 and len(kinds) == 1)


def _join_named(parts: Sequence[Any]) -> Any:
    """Join values of the same names."""
    if any(part.keys() != parts[0].keys() for part in parts):
        raise _UnlikeError
    whole = copy.copy(parts[0])  # of a class of the user's, perhaps
    for name in parts[0]:
        whole[name] = _join([part[name] for part in parts])
    return whole
