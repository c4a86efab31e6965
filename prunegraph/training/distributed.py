"""One training shared by several processes, as ``torchrun`` starts them.

Each process takes its part of every batch; gradients, losses and the statistics of batch norm are
those of the whole batch, so the result is that of one process up to the order of sums.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from prunegraph.core.errors import DataError
from prunegraph.core.splits import Batch
from prunegraph.graph.trace.calls import CallMode
from prunegraph.tasks.batches import num_samples

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: its number; 0 alone writes and speaks.
        size: how many there are.
    """

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """True in the process that writes and speaks."""
        return self.rank == 0

    def agree(self, value: Value) -> Value:
        """Return rank 0's value (anything that can be pickled), in every process."""
        values = [value]
        distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def share(self, batch: Batch) -> tuple[Batch, float]:
        """Return this rank's part of a batch, and its weight in the batch's mean.

        A batch of fewer samples than ranks is computed by every rank.

        Raises:
            DataError: the batch's tensors are of several lengths.
        """
        count = num_samples(batch)
        if count == 0:
            msg = "the tensors of a batch are of several lengths: train it in one process"
            raise DataError(msg)
        if count < self.size:
            return batch, 1.0 / self.size
        own = tree_map_only(Tensor, lambda part: part.tensor_split(self.size)[self.rank], batch)
        return own, num_samples(own) / count

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the network with rank 0's weights, its gradients averaged over the ranks."""
        return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)

    def mean(self, loss: Tensor, weight: float) -> Tensor:
        """Return the whole batch's loss: the sum of the ranks' weighted ones, no gradient."""
        total = weight * loss.detach()
        distributed.all_reduce(total)
        return total

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients that ``wrap`` knows nothing of over the ranks."""
        for parameter in parameters:
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= self.size


def current_ranks() -> Ranks | None:
    """Return this process's place, or None if it works alone."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return Ranks(rank=distributed.get_rank(), size=distributed.get_world_size())


class SharedBatchNorm(CallMode):
    """While it is active, batch norm in training takes its statistics from all ranks' images.

    torch's ``SyncBatchNorm`` is another module, and for GPUs only. This stands in for the function
    that every batch norm calls, so it needs to know no module.
    """

    def call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the function, or batch norm over all ranks in its place."""
        if function is F.batch_norm and kwargs.get("training"):
            return _shared_batch_norm(*args, **kwargs)
        return function(*args, **kwargs)


def _shared_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Return batch norm over the images of all ranks (Ioffe and Szegedy 2015, algorithm 1)."""
    assert training
    axes, shape = [axis for axis in range(x.dim()) if axis != 1], [1, -1] + [1] * (x.dim() - 2)
    values = x.float()
    sums = values.sum(axes)  # [C]
    count = sums.new_full((1,), values.numel() // len(sums))
    total, count = _summed(torch.cat([sums, count])).split([len(sums), 1])
    mean = total / count
    centred = values - mean.view(shape)
    var = _summed(centred.square().sum(axes)) / count  # biased
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            unbiased = var * (count / (count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    output = centred * torch.rsqrt(var + eps).view(shape)
    if weight is not None:
        output = output * weight.view(shape)
    if bias is not None:
        output = output + bias.view(shape)
    result: Tensor = output.to(x.dtype)
    return result


class _Sum(torch.autograd.Function):
    """The sum over all ranks; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Return the sum."""
        del ctx
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the sum of the gradients."""
        return _Sum.forward(ctx, gradients[0])


def _summed(values: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(values)
    return total
