"""A dense network under measurement: samples go through it, and each read of a layer is seen."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunegraph.core.errors import ModelError
from prunegraph.core.masks import Float64Array, IntArray
from prunegraph.core.memory import return_freed_memory
from prunegraph.core.splits import Batch, TrainSplit
from prunegraph.core.task import Task
from prunegraph.graph import StructureGraph
from prunegraph.layerwise import room
from prunegraph.layerwise.capture import Read, layer_inputs, readable_copy
from prunegraph.tasks.batches import check_finite, num_samples, singles
from prunegraph.tasks.classification import model_device

MEMORY = 7 * 2**27
"""Bytes that one forward leaves for its backward."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Dense:
    """A dense network to measure, for criteria that send samples through it.

    Attributes:
        task: the network, its data and its loss.
        graph: its structure.
        train: samples, taken without augmentation.
        seed: fixes what is drawn.
        device: where the network runs; None = where it is.
    """

    task: Task
    graph: StructureGraph
    train: TrainSplit
    seed: int = 0
    device: str | torch.device | None = None

    @cached_property
    def model(self) -> nn.Module:
        """A copy in eval mode, on the device; in float32 if the task allows it."""
        where = model_device(self.task.model) if self.device is None else self.device
        return readable_copy(self.task.model, where, torch.float32 if self.task.autocast else None)

    @cached_property
    def num_samples(self) -> int:
        """Samples, counted where their batches say how many they hold."""
        return sum(max(num_samples(batch), 1) for batch in self.train.batches(64))

    def show_reads(self, visit: Callable[[Read], None], batch_size: int) -> None:
        """Send all samples forward, without gradients, and show each read to ``visit``."""
        size = room.batch_size(self.task, self.graph, batch_size)
        with torch.no_grad(), layer_inputs(self.model, self.graph, visit):
            for batch in self.train.batches(size):
                self.task.forward(self.model, batch)

    def show_gradients(
        self, visit: Callable[[Read], None], batch_size: int, *, attentions: bool = False
    ) -> None:
        """Send gradients of each sample's own loss through the network.

        They begin at its inputs, if those are no numbers of tokens, and at its weights.

        Args:
            visit: sees each read; its activation has a gradient.
            batch_size: samples a forward, fewer of large ones (``MEMORY``).
            attentions: see ``reads``.
        """
        with self.model.register_forward_pre_hook(_watch_inputs, with_kwargs=True):
            size = min(batch_size, self._most_samples(attentions=attentions))
            with layer_inputs(self.model, self.graph, visit, attentions=attentions):
                for batch in self.train.batches(size):
                    self.loss(batch).backward()
        self.model.requires_grad_(False).zero_grad()
        return_freed_memory()

    def _most_samples(self, *, attentions: bool) -> int:
        """Return of how many samples reads and what a backward needs take ``MEMORY`` bytes."""
        batch = next(iter(self.train.batches(1)))
        sizes: dict[int, int] = {}
        alive: list[Tensor] = []  # so that no two tensors have one place

        def note(held: Tensor) -> Tensor:
            sizes[held.data_ptr()] = held.nbytes
            alive.append(held)
            return held

        def visit(read: Read) -> None:
            note(read.activation)

        shown = layer_inputs(self.model, self.graph, visit, attentions=attentions)
        with shown, torch.autograd.graph.saved_tensors_hooks(note, lambda held: held):
            alive.append(self.loss(batch))
        owned = (*self.model.parameters(), *self.model.buffers())
        weights = {item.data_ptr() for item in owned}
        whole = sum(size for place, size in sizes.items() if place not in weights)
        return max(MEMORY * max(num_samples(batch), 1) // max(whole, 1), 1)

    def singles(self) -> Iterator[Batch]:
        """Yield the samples one by one; whole batches of a user's own that cannot be parted."""
        for batch in self.train.batches(1):
            yield from singles(batch)

    @torch.enable_grad()
    def loss(self, batch: Batch) -> Tensor:
        """Return the sum of the samples' losses, which gradients flow from.

        Raises:
            ModelError: no gradient flows from it, or it is not finite.
            DataError: it is not, nor is the batch.
        """
        mean = self.task.loss(self.model.requires_grad_(), batch)
        if not mean.requires_grad:
            msg = "no gradients flow from the loss: leave detach() and no_grad() away"
            raise ModelError(msg)
        if not bool(mean.isfinite()):
            check_finite(batch, "the train data")
            msg = (
                f"the loss on train data is {float(mean.detach())}: check the network's weights, "
                "the data, and the loss"
            )
            raise ModelError(msg)
        return mean * max(num_samples(batch), 1)


def add_seen(values: Float64Array, units: IntArray, found: Float64Array) -> None:
    """Add values of distinct units to ``values`` ``[N]``, which are NaN where none was seen."""
    values[units] = np.nan_to_num(values[units]) + found


def _watch_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Let gradients flow from inputs; a network may change the copies in place."""
    del module

    def watched(item: Tensor) -> Tensor:
        able = item.is_floating_point() and not item.requires_grad
        return item.detach().requires_grad_().clone() if able else item

    watching: tuple[Any, dict[str, Any]] = tree_map_only(Tensor, watched, (args, kwargs))
    return watching
