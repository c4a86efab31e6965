"""Convolutions that CPUs train slowly in bfloat16, computed in float32."""

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
    def slow(self) -> bool:
        """Whether its gradients are slow in bfloat16."""
        strided = self.stride > 1 if isinstance(self.stride, int) else max(self.stride) > 1
        depthwise = self.groups > 1 and self.weight.shape[1] == 1
        return depthwise and (strided or max(self.weight.shape[2:]) > LARGEST)

    def in_float32(self) -> "Convolution":
        """Return the same with other tensors."""
        bias = None if self.bias is None else self.bias.float()
        return self._replace(input=self.input.float(), weight=self.weight.float(), bias=bias)


class QuickDepthwise(CallMode):
    """Trains strided and large depthwise convolutions in float32 under an autocast on a CPU.

    oneDNN has no fast kernels for their gradients in bfloat16: those of the inputs of strided ones
    take 30 to 50 times as long as in float32, those of large weights up to four times. A training
    step of a MobileNet or an EfficientNet takes half to two thirds of its time with this
    (docs/lab/trials.md). What they return is of the autocast's type.
    """

    def call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the function."""
        if function in CONVOLUTIONS and torch.is_grad_enabled():
            given = Convolution(*args, **kwargs)
            on_cpu = given.input.device.type == "cpu"
            if on_cpu and torch.is_autocast_enabled("cpu") and given.slow:
                with torch.autocast("cpu", enabled=False):
                    return function(*given.in_float32()).to(torch.get_autocast_dtype("cpu"))
        return function(*args, **kwargs)
