"""Small networks of the benchmark ``structure.py`` with what model zoos lack.

Each is a plain ``nn.Module``, written as a user would write it; images are 32 x 32 or what the
entry in ``NETS`` says.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    """Return convolution, batch norm, SiLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
    )


class CrossStage(nn.Module):
    """YOLOv8's C2f: half of the channels go through bottlenecks, every stage is concatenated."""

    def __init__(self, inputs: int, outputs: int, depth: int = 2) -> None:
        super().__init__()
        self.hidden = outputs // 2
        self.first = conv(inputs, 2 * self.hidden, 1)
        self.last = conv((2 + depth) * self.hidden, outputs, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(self.hidden, self.hidden), conv(self.hidden, self.hidden))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, outputs, H, W]``."""
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """A detector: cross-stage blocks, pyramid pooling, upsampling with concat, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs = CLASSES + 4
        self.stem = nn.Sequential(conv(3, 16, 3, 2), conv(16, 32, 3, 2))
        self.stage1 = CrossStage(32, 32)
        self.stage2 = nn.Sequential(conv(32, 64, 3, 2), CrossStage(64, 64))
        self.before_pool, self.after_pool = conv(64, 32, 1), conv(128, 64, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.merge = CrossStage(96, 32)
        self.heads = nn.ModuleList(
            nn.Sequential(conv(width, 32), nn.Conv2d(32, self.outputs, 1)) for width in (32, 64)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return ``[B, classes + 4, positions of both scales]``."""
        fine = self.stage1(self.stem(images))
        pooled = [self.before_pool(self.stage2(fine))]
        for _ in range(3):
            pooled.append(self.pool(pooled[-1]))
        coarse = self.after_pool(torch.cat(pooled, 1))
        fine = self.merge(torch.cat([self.up(coarse), fine], 1))
        outputs = [head(x) for head, x in zip(self.heads, (fine, coarse), strict=True)]
        return torch.cat([x.view(x.shape[0], self.outputs, -1) for x in outputs], 2)


class UNet(nn.Module):
    """A segmentation network: transposed convolutions, one of them depthwise; skips by concat."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = conv(3, 16), conv(16, 32, 3, 2)
        self.middle = conv(32, 64, 3, 2)
        self.up2 = nn.ConvTranspose2d(64, 32, 2, 2)
        self.after2 = conv(64, 32)
        self.up1 = nn.Sequential(nn.ConvTranspose2d(32, 32, 2, 2, groups=32), conv(32, 16, 1))
        self.after1 = conv(32, 16)
        self.out = nn.Conv2d(16, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return ``[B, classes, H, W]``."""
        first = self.down1(images)
        second = self.down2(first)
        x = self.after2(torch.cat([self.up2(self.middle(second)), second], 1))
        return self.out(self.after1(torch.cat([self.up1(x), first], 1)))


class Signal(nn.Module):
    """A network of 1-d convolutions, one grouped, that end in a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(2, 32, 7, 2, 3),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Conv1d(32, 64, 5, 2, 2, groups=4),
            nn.BatchNorm1d(64),
            nn.PReLU(64),
            nn.MaxPool1d(2),
            nn.Conv1d(64, 64, 3, 1, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(4),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.ReLU(),
            nn.Linear(64, CLASSES),
        )

    def forward(self, signal: Tensor) -> Tensor:
        """Return logits."""
        return self.body(signal)


class Volume(nn.Module):
    """A residual network of 3-d convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm3d(16)
        self.conv1, self.conv2 = nn.Conv3d(16, 24, 3, padding=1), nn.Conv3d(24, 16, 3, padding=1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, volume: Tensor) -> Tensor:
        """Return logits."""
        x = F.relu(self.norm(self.stem(volume)))
        x = F.max_pool3d(x + self.conv2(F.relu(self.conv1(x))), 2)
        return self.fc(F.adaptive_avg_pool3d(x, 1).flatten(1))


class UsedTwice(nn.Module):
    """One layer called on its own output, and a head called on two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.wide = conv(3, 32), conv(32, 32), conv(32, 64, 3, 2)
        self.narrow = nn.Conv2d(64, 32, 1)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        x = self.block(self.block(self.stem(images)))
        y = self.narrow(self.wide(x))
        return self.fc(x.mean((2, 3))) + self.fc(y.mean((2, 3)))


class SharedWeights(nn.Module):
    """Two layers hold one parameter, and a decoder applies the encoder's weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 48)
        self.left, self.right = nn.Linear(48, 48), nn.Linear(48, 48)
        self.right.weight = self.left.weight
        self.encoder = nn.Linear(48, 24)
        self.fc = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = F.relu(self.stem(x))
        x = F.relu(self.right(F.relu(self.left(x))))
        x = F.linear(F.relu(self.encoder(x)), self.encoder.weight.t())
        return self.fc(F.relu(x))


class GroupNormNet(nn.Module):
    """A residual network with group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(8, 32)
        self.conv1, self.norm1 = nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(8, 64)
        self.conv2, self.norm2 = nn.Conv2d(64, 32, 3, padding=1), nn.GroupNorm(8, 32)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        x = F.relu(self.norm0(self.stem(images)))
        x = F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


class Transformer(nn.Module):
    """torch's own encoder layers on patches, with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.fc(self.encoder(x)[:, 0])


class OneHead(nn.Module):
    """Attention of one head, its scale computed from the width, initialised as transformers are.

    Attention is nearly even at first, so a wrong scale changes little: an oracle must be sharp.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 32, 3, 4)
        self.query, self.key, self.value = nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(32, 32)
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=0.02)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        x = self.stem(images).flatten(2).transpose(1, 2)
        query, key = self.query(x), self.key(x)
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        return self.fc((x + scores.softmax(-1) @ self.value(x)).mean(1))


class Selective(nn.Module):
    """A selective kernel: a softmax weighs two stacked paths, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.small, self.large = conv(3, 32), conv(32, 32), conv(32, 32, 5)
        self.reduce, self.weigh = conv(32, 16, 1), nn.Conv2d(16, 64, 1)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        x = self.stem(images)
        paths = torch.stack([self.small(x), self.large(x)], 1)
        weights = self.weigh(self.reduce(paths.sum(1).mean((2, 3), keepdim=True)))
        weights = weights.view(x.shape[0], 2, -1, 1, 1).softmax(1)
        return self.fc((paths * weights).sum(1).mean((2, 3)))


class ListedSizes(nn.Module):
    """Channels split by a list of sizes, each part through a convolution of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 48)
        self.sizes = [8, 16, 24]
        self.parts = nn.ModuleList(
            nn.Conv2d(size, size, kernel, padding=kernel // 2, groups=size)
            for size, kernel in zip(self.sizes, (3, 5, 7), strict=True)
        )
        self.merge, self.fc = conv(48, 32, 1), nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        split = self.stem(images).split(self.sizes, 1)
        parts = [part(x) for part, x in zip(self.parts, split, strict=True)]
        return self.fc(self.merge(torch.cat(parts, 1)).mean((2, 3)))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "yolo": (Yolo, (1, 3, 64, 64)),
    "unet": (UNet, (1, 3, 32, 32)),
    "conv1d": (Signal, (1, 2, 128)),
    "conv3d": (Volume, (1, 1, 8, 16, 16)),
    "used_twice": (UsedTwice, (1, 3, 32, 32)),
    "shared_weights": (SharedWeights, (1, 64)),
    "group_norm": (GroupNormNet, (1, 3, 32, 32)),
    "transformer": (Transformer, (1, 3, 32, 32)),
    "one_head": (OneHead, (1, 3, 32, 32)),
    "selective": (Selective, (1, 3, 32, 32)),
    "listed_sizes": (ListedSizes, (1, 3, 32, 32)),
}
"""Name -> (network, shape of its example)."""
