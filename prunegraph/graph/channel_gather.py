"""A channel permutation, selection and zero padding that stays right when channels are removed."""

import torch
from torch import Tensor, nn

ZERO_CHANNEL = -1


class ChannelGather(nn.Module):
    """Give each output channel one input channel, or zeros.

    A shortcut that pads with a literal number of channels breaks once channels are removed. This
    module holds the same mapping as a buffer, which the structure engine knows: output channels
    are units of their own (axis 0 of ``index``), and its *values* name input positions. Surgery
    drops the entries of removed outputs, renumbers the values, and points an output whose input
    was removed at the zero channel.

    The buffer is not part of the state dict, so that checkpoints of networks that pad literally
    load unchanged; a pruned network's buffer is rebuilt from its mask.

    Args:
        index: ``[out_channels]`` integers: the input channel, or ``ZERO_CHANNEL`` (-1) for zeros.

    Shapes:
        - input: ``[B, in_channels, ...]``
        - output: ``[B, out_channels, ...]``
    """

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index.to(torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Gather the channels; -1 reads the zero channel appended behind the last one."""
        padded = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)  # [B, in_channels + 1, ...]
        return padded[:, self.index]

    def extra_repr(self) -> str:
        """Return the sizes for ``print(model)``."""
        num_zero = int((self.index == ZERO_CHANNEL).sum())
        return f"out_channels={self.index.numel()}, zero_channels={num_zero}"
