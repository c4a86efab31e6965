"""Convolutions that CPUs train slowly or wrongly in bfloat16, computed in float32."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from prunegraph.graph.trace.calls import CallMode

CONVOLUTIONS: tuple[Callable[..., Any], ...] = (F.conv1d, F.conv2d, F.conv3d)

LARGEST = 3
"""Kernels of depthwise convolutions whose gradients are fast in bfloat16, without a stride."""


class Convolution(NamedTuple):
    """The arguments of a convolution."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: int | Sequence[int] = 1
    padding: int | str | Sequence[int] = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1

    @property
    def strided(self) -> bool:
        """Whether it leaves positions out."""
        return self.stride > 1 if isinstance(self.stride, int) else max(self.stride) > 1

    @property
    def slow(self) -> bool:
        """Whether its gradients are slow in bfloat16."""
        depthwise = self.groups > 1 and self.weight.shape[1] == 1
        return depthwise and (self.strided or max(self.weight.shape[2:]) > LARGEST)

    @property
    def wrong(self) -> bool:
        """Whether parts of its weight may get no gradient in bfloat16, but whatever was there."""
        kernel = self.weight.shape[2:]
        sizes = zip(self.input.shape[-len(kernel) :], kernel, strict=True)
        return self.strided and any(size < wide for size, wide in sizes)

    def in_float32(self) -> "Convolution":
        """Return the same with other tensors."""
        bias = None if self.bias is None else self.bias.float()
        return self._replace(input=self.input.float(), weight=self.weight.float(), bias=bias)


class SoundConvolutions(CallMode):
    """Trains some convolutions in float32 under an autocast on a CPU.

    Strided ones of inputs that are smaller than the kernel: oneDNN does not write the gradient of
    what lies beyond the padding, so that it may be NaN (torch 2.13, inputs of 1 x 1).

    Strided and large depthwise ones: oneDNN has no fast kernels for their gradients in bfloat16.
    Those of the inputs of strided ones take 30 to 50 times as long as in float32, those of large
    weights up to four times. A training step of a MobileNet or an EfficientNet takes half to two
    thirds of its time with this
    (docs/lab/trials.md). What they return is of the autocast's type.
    """

    def call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the function."""
        if function in CONVOLUTIONS and torch.is_grad_enabled():
            given = Convolution(*args, **kwargs)
            on_cpu = given.input.device.type == "cpu"
            if on_cpu and torch.is_autocast_enabled("cpu") and (given.slow or given.wrong):
                with torch.autocast("cpu", enabled=False):
                    return function(*given.in_float32()).to(torch.get_autocast_dtype("cpu"))
        return function(*args, **kwargs)
