"""CIFAR ResNets with parameter-free shortcuts (He et al. 2016, arXiv 1512.03385, section 4.2).

State-dict names: ``conv1, bn1, layer{1,2,3}.{i}.conv1, bn1, conv2, bn2, fc``. The public
checkpoints (Y. Idelbayev's pytorch_resnet_cifar10) differ in one, ``linear`` for ``fc``; both load.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.graph.channel_gather import ZERO_CHANNEL, ChannelGather

BLOCKS_PER_DEPTH = 6  # three stages of two-layer blocks; two more layers are the stem and the head


def option_a_index(in_channels: int, out_channels: int) -> Tensor:
    """Return the option-A shortcut's mapping: the inputs in the middle, zeros on both sides.

    Returns:
        ``[out_channels]`` int64, see ``ChannelGather``.
    """
    index = torch.full((out_channels,), ZERO_CHANNEL, dtype=torch.int64)
    first = (out_channels - in_channels) // 2
    index[first : first + in_channels] = torch.arange(in_channels)
    return index


Norm = Literal["batch", "group"]
"""How channels are normalised: over the batch, or each sample's in groups of four."""


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """Return the normalisation of so many channels."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(channels // math.gcd(channels, 4), channels)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A).

    Args:
        in_channels: channels of the incoming residual stream.
        out_channels: channels of the outgoing one.
        stride: spatial stride of the first convolution and of the shortcut.
        norm: how channels are normalised.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = make_norm(norm, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = make_norm(norm, out_channels)
        self.stride = stride
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = ChannelGather(option_a_index(in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output ``[B, out_channels, h / stride, w / stride]``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """A ResNet of depth 6n + 2 with three stages of n blocks and widths w, 2w, 4w.

    Args:
        depth: number of weighted layers, 6n + 2.
        width: channels of the first stage.
        in_channels: channels of the images.
        num_classes: size of the output.
        norm: how channels are normalised.

    Shapes:
        - input: ``[B, in_channels, h, w]``
        - output: ``[B, num_classes]``
    """

    OTHER_NAMES: ClassVar = {"linear.": "fc."}
    """What public checkpoints call a layer -> what it is called here."""

    def __init__(
        self,
        depth: int,
        *,
        width: int = 16,
        in_channels: int = 3,
        num_classes: int = 10,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        num_blocks = (depth - 2) // BLOCKS_PER_DEPTH
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = make_norm(norm, width)
        self.layer1 = make_stage(width, width, num_blocks, stride=1, norm=norm)
        self.layer2 = make_stage(width, 2 * width, num_blocks, stride=2, norm=norm)
        self.layer3 = make_stage(2 * width, 4 * width, num_blocks, stride=2, norm=norm)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[B, num_classes]``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.fc(out.mean(dim=(2, 3)))
        return logits


def make_stage(
    in_channels: int, out_channels: int, num_blocks: int, stride: int, norm: Norm = "batch"
) -> nn.Sequential:
    """Return the blocks of one stage; the first one changes width and resolution."""
    first = BasicBlock(in_channels, out_channels, stride, norm)
    rest = [BasicBlock(out_channels, out_channels, 1, norm) for _ in range(num_blocks - 1)]
    return nn.Sequential(first, *rest)
