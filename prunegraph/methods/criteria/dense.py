"""A dense network under measurement: samples go through it, and each read of a layer is seen."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from prunegraph.core.errors import ModelError
from prunegraph.core.splits import Batch, TrainSplit
from prunegraph.core.task import Task
from prunegraph.graph import StructureGraph
from prunegraph.layerwise.capture import Read, readable_copy, reads
from prunegraph.tasks.batches import num_samples


@dataclass(frozen=True, eq=False, kw_only=True)
class Dense:
    """A dense network to measure, for criteria that send samples through it.

    Attributes:
        task: the network, its data and its loss.
        graph: its structure.
        train: samples, taken without augmentation.
        seed: fixes what is drawn.
        device: where the network runs.
    """

    task: Task
    graph: StructureGraph
    train: TrainSplit
    seed: int = 0
    device: str | torch.device = "cpu"

    @cached_property
    def model(self) -> nn.Module:
        """A copy in eval mode, on the device, without gradients of weights."""
        return readable_copy(self.task.model, self.device, None)

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield the samples in batches; those of a user's own keep their sizes."""
        return self.task.batches(self.train, size)

    @cached_property
    def num_samples(self) -> int:
        """Samples, counted where their batches say how many they hold."""
        return sum(max(num_samples(batch), 1) for batch in self.batches(64))

    def show_reads(self, visit: Callable[[Read], None], batch_size: int) -> None:
        """Send all samples forward, without gradients, and show each read to ``visit``."""
        with torch.no_grad(), reads(self.model, self.graph, visit):
            for batch in self.batches(batch_size):
                self.task.forward(self.model, batch)

    def show_gradients(
        self, visit: Callable[[Read], None], batch_size: int, *, attentions: bool = False
    ) -> None:
        """Send gradients of each sample's own loss through the network (no weight keeps one).

        Args:
            visit: sees each read; its activation has a gradient.
            batch_size: samples a forward.
            attentions: see ``reads``.
        """
        with reads(self.model, self.graph, visit, attentions=attentions):
            for batch in self.batches(batch_size):
                self.loss(batch).backward()
        self.model.zero_grad(set_to_none=True)

    @torch.enable_grad()
    def loss(self, batch: Batch) -> Tensor:
        """Return the sum of the samples' losses, which gradients flow from.

        Raises:
            ModelError: no gradient flows from it, or it is not finite.
        """
        self.model.requires_grad_()  # what the first layer reads need not have a gradient
        mean = self.task.loss(self.model, batch)
        if not mean.requires_grad:
            msg = "no gradient flows from the loss: leave detach() and no_grad() away"
            raise ModelError(msg)
        if not bool(mean.isfinite()):
            msg = f"the loss is {float(mean)} on train data: check it, and the data"
            raise ModelError(msg)
        return mean * max(num_samples(batch), 1)
