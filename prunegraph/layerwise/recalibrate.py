"""Batch-norm recalibration: a pruned network's running statistics are measured anew."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunegraph.core.errors import DataError
from prunegraph.core.precision import autocasting
from prunegraph.core.splits import Batch, ReadyBatches, TrainSplit
from prunegraph.core.task import Task
from prunegraph.graph.copying import put_modes
from prunegraph.tasks.batches import check_finite, is_finite, num_samples
from prunegraph.tasks.classification import BATCH_SIZE

FEW = 32
"""Samples below which statistics are far off: a ResNet on digits loses a point with 32 of them."""

STILL = 1e-12
"""Variance of a channel that does not vary, but for rounding."""


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether there is anything to recalibrate."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def forget_statistics(model: nn.Module) -> None:
    """Let batch norm normalise by each batch's own statistics, in eval mode too; in place."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean = module.running_var = None
            module.track_running_stats = False


@contextmanager
def measuring_batch_norm(model: nn.Module, *, keep: bool = True) -> Iterator[None]:
    """Within the context, forwards average batch statistics into the batch-norm buffers.

    The buffers start at zero batches and take the cumulative average over the forwards; all else
    (dropout, other norms) is in eval mode. Afterwards every training flag and momentum is as it
    was; if the context is left by an exception, or without any forward, the buffers are too.
    Networks without batch norm are left alone.

    Args:
        model: the network; nothing but its batch-norm buffers changes.
        keep: whether the buffers keep what was measured.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    buffers = [[buffer.clone() for buffer in norm.buffers(recurse=False)] for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's way to say: cumulative average
        norm.training = True
    completed = False
    try:
        yield
        completed = True
    finally:
        put_modes(modes)
        for norm, momentum, old in zip(norms, momenta, buffers, strict=True):
            norm.momentum = momentum
            if not (keep and completed) or norm.num_batches_tracked == 0:
                _restore(norm, old)


def _variances(model: nn.Module) -> dict[str, Tensor]:
    """Return ``[C]`` the running variances of batch norms, which forwards change, by name."""
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    return {name: m.running_var for name, m in norms.items() if m.running_var is not None}


def _restore(norm: _BatchNorm, old: list[Tensor]) -> None:
    with torch.no_grad():
        for buffer, value in zip(norm.buffers(recurse=False), old, strict=True):
            buffer.copy_(value)


def recalibrate_bn(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    forward: Callable[[nn.Module, Batch], Any] | None = None,
    autocast: bool = False,
) -> None:
    """Set the batch-norm buffers to the average statistics of batches.

    Args:
        model: the network; nothing but its batch-norm buffers changes.
        batches: images ``[b, c, h, w]``, or such with labels, or what ``forward`` takes. Take
            *shuffled* training samples in batches of equal size: each batch counts alike, and a
            batch of one unit misleads.
        forward: runs a network on a batch, as ``Task.forward``; default: on the batch, or on its
            first tensor.
        autocast: run in bfloat16 where that is safe and the device computes it.

    Raises:
        DataError: there are no batches, or they hold NaN or infinite values; a batch of one
            sample, for norms that then see one value a channel.

    Warns:
        UserWarning: fewer than ``FEW`` samples, or half of a norm's channels no longer vary.
    """
    variances = _variances(model)
    if not variances:
        return
    before = {name: variance.clone() for name, variance in variances.items()}
    count, broken = 0, None
    with measuring_batch_norm(model), torch.no_grad():
        device = next(t.device for t in (*model.parameters(), *model.buffers()))
        for batch in batches:
            count += num_samples(batch) or FEW  # samples that cannot be told are not few
            broken = broken if is_finite(batch) else batch
            try:
                with autocasting(device, wanted=autocast):
                    (forward or _run_first)(model, batch)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                msg = "a batch of 1 is too few to calibrate this network's norms: give more"
                raise DataError(msg) from error
        if count == 0:
            msg = f"there are no batches to calibrate batch norm on: give {FEW} samples or more"
            raise DataError(msg)
        if not all(bool(variance.isfinite().all()) for variance in variances.values()):
            check_finite(broken, "the calibration data")
    if count < FEW:
        msg = (
            f"batch norm is calibrated on fewer than {FEW} samples ({count}), which can ruin the "
            "network: give more"
        )
        warnings.warn(msg, stacklevel=2)
    for name, variance in variances.items():
        _warn_if_still(name, before[name], variance)


def _warn_if_still(name: str, before: Tensor, variance: Tensor) -> None:
    """Warn if half of a norm's channels do not vary that did before."""
    still = (variance <= STILL) & (before > STILL)
    if 2 * int(still.sum()) >= len(still):
        msg = (
            f"{int(still.sum())} of {len(still)} channels of {name or 'the norm'} do not vary on "
            "the calibration data, which can ruin the network: give data as varied as in training"
        )
        warnings.warn(msg, stacklevel=3)


def recalibrate_on(model: nn.Module, task: Task, samples: TrainSplit) -> None:
    """Set the batch-norm buffers to the average statistics of samples of a task, if it has any.

    Args:
        model: the network; nothing but its batch-norm buffers changes.
        task: runs it on batches.
        samples: in any order, which may be that of the classes: they are shuffled, but for ready
            batches.
    """
    if has_batch_norm(model):
        seed = None if isinstance(samples.source, ReadyBatches) else 0
        batches = whole_batches(task.batches(samples, BATCH_SIZE, seed=seed))
        recalibrate_bn(model, batches, forward=task.forward, autocast=task.autocast)


def whole_batches(batches: Iterable[Batch]) -> list[Batch]:
    """Return batches without a last one that is smaller than the first: each counts alike."""
    held = list(batches)
    return held[:-1] if num_samples(held[-1]) < num_samples(held[0]) else held


def _run_first(model: nn.Module, batch: Batch) -> None:
    """Run a network on a batch of tensors, or on the first tensor of it."""
    device = next(t.device for t in (*model.parameters(), *model.buffers()))
    model((batch if isinstance(batch, Tensor) else batch[0]).to(device))
