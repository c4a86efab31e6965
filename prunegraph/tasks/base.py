"""What tasks share that do not treat it otherwise: where networks and batches lie, and batches."""

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunegraph.core.errors import DataError, ModelError
from prunegraph.core.splits import Batch, SearchSplit, Split, TestSplit, TrainSplit
from prunegraph.tasks.classification import model_device

Kind = TypeVar("Kind", bound=Split)


class SplitTask:
    """A task whose batches are trees of tensors, which all go where the network is."""

    model: nn.Module

    def __post_init__(self) -> None:
        """Raise ModelError for a network with adapters (peft, loralib): it is not the dense one."""
        for name, module in self.model.named_modules():
            if hasattr(module, "lora_A") or hasattr(module, "base_layer"):
                msg = (
                    f"{name} of the network holds adapters (LoRA), which cannot be pruned: merge "
                    "them into the dense network first, with model.merge_and_unload() of peft"
                )
                raise ModelError(msg)

    def place_model(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Move a network to a device; return it."""
        return model.to(device)

    def place(self, batch: Batch, model: nn.Module) -> Batch:
        """Return a batch on the network's device."""
        device = model_device(model)
        return tree_map_only(Tensor, lambda item: item.to(device), batch)

    def batches(self, split: Split, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Yield the split's batches of ``size`` samples, shuffled by a seed if one is given."""
        shuffle = None if seed is None else torch.Generator().manual_seed(seed)
        return split.batches(size, shuffle=shuffle)


def checked_split(kind: type[Kind], split: object, what: str) -> Kind:
    """Return a split; raise DataError, with the name of the argument, if it is of another kind."""
    if not isinstance(split, kind):
        msg = f"{what} is a {type(split).__name__}, not a {kind.__name__}: see docs/own.md"
        raise DataError(msg)
    return split


def check_splits(train: object, search: object, test: object, why: str) -> None:
    """Raise DataError for a split of another type than its place asks for; the test may be None.

    Args:
        train: a ``TrainSplit``.
        search: a ``SearchSplit``.
        test: a ``TestSplit``, or None.
        why: ends the message.
    """
    pairs: list[tuple[object, type[Split]]]
    pairs = [(train, TrainSplit), (search, SearchSplit)]
    pairs += [] if test is None else [(test, TestSplit)]
    for given, kind in pairs:
        if not isinstance(given, kind):
            msg = f"{type(given).__name__} is no {kind.__name__}: {why}"
            raise DataError(msg)
