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
    assert training
    output, mean, var, count = _BatchNorm.apply(x, weight, bias, eps)
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            unbiased = var * (count / (count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    result: Tensor = output
    return result


class _BatchNorm(torch.autograd.Function):
    """Batch norm over the images of all ranks (Ioffe and Szegedy 2015, algorithm 1)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the output, and mean ``[C]``, biased variance ``[C]``, number of values ``[]``."""
        var, mean = torch.var_mean(x.float(), _axes(x), correction=0)
        own = torch.cat([mean, var, mean.new_full((1,), x.numel() // len(mean))])  # [2 C + 1]
        gathered = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, own)
        means, variances, counts = torch.stack(gathered).split([len(mean), len(mean), 1], dim=1)
        count = counts.sum()
        mean = (counts * means).sum(dim=0) / count
        var = (counts * (variances + (means - mean) ** 2)).sum(dim=0) / count
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps), count)
        ctx.mark_non_differentiable(mean, var, count)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, var, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight and bias; the last two of this rank's images."""
        x, weight, mean, scale, count = ctx.saved_tensors
        gradient, axes, shape = gradients[0].float(), _axes(x), [1, -1] + [1] * (x.dim() - 2)
        normalised = (x.float() - mean.view(shape)) * scale.view(shape)
        own = torch.cat([gradient.sum(axes), (gradient * normalised).sum(axes)])  # [2 C]
        total = own.clone()
        distributed.all_reduce(total)
        shift, slope = (total / count).view(2, *shape)
        factor = scale if weight is None else scale * weight
        inner = (gradient - shift - slope * normalised) * factor.view(shape)
        of_bias, of_weight = own.view(2, -1)
        if weight is None:
            return inner.to(x.dtype), None, None, None
        return inner.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype), None


def _axes(x: Tensor) -> list[int]:
    """Return all axes but that of the channels."""
    return [axis for axis in range(x.dim()) if axis != 1]
