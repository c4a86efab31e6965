"""MobileNetV2 for small images (Sandler et al. 2018, arXiv 1801.04381).

The usual CIFAR form: the first two strides are 1, and a stride-1 block that changes width has a
1x1 convolution as its shortcut; state-dict names of K. Liu's pytorch-cifar.
"""

from torch import Tensor, nn
from torch.nn import functional as F

# (expansion, output channels, blocks, stride of the first block)
CONFIGURATION = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


class InvertedResidual(nn.Module):
    """Expand by a 1x1, filter by a depthwise 3x3, project by a linear 1x1 convolution.

    Args:
        in_channels: channels of the incoming stream.
        out_channels: channels of the outgoing stream.
        expansion: width of the depthwise convolution over ``in_channels``.
        stride: stride of the depthwise convolution; a block with stride 2 has no shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        width = expansion * in_channels
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.has_shortcut = stride == 1
        self.shortcut = nn.Sequential()
        if stride == 1 and in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output ``[B, out_channels, h / stride, w / stride]``."""
        hidden = F.relu(self.bn1(self.conv1(x)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        out: Tensor = self.bn3(self.conv3(hidden))
        if self.has_shortcut:
            out = out + self.shortcut(x)
        return out


class MobileNetV2(nn.Module):
    """MobileNetV2 for images of 32 x 32.

    Args:
        in_channels: channels of the images.
        num_classes: size of the output.

    Shapes:
        - input: ``[B, in_channels, h, w]``
        - output: ``[B, num_classes]``
    """

    def __init__(self, *, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, STEM_CHANNELS, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        blocks = []
        channels = STEM_CHANNELS
        for expansion, width, num_blocks, first_stride in CONFIGURATION:
            for stride in (first_stride, *[1] * (num_blocks - 1)):
                blocks.append(InvertedResidual(channels, width, expansion, stride))
                channels = width
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(channels, HEAD_CHANNELS, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(HEAD_CHANNELS)
        self.linear = nn.Linear(HEAD_CHANNELS, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[B, num_classes]``."""
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        out = F.relu(self.bn2(self.conv2(out)))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits
