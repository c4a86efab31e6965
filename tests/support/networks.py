"""Small networks with every kind of layer that surgery changes, and random legal masks."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.masks import ChannelMask
from prunegraph.core.splits import Dataset
from prunegraph.data.load import load_dataset
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.channel_gather import ChannelGather
from prunegraph.models import build_model


class Mixed(nn.Module):
    """Plain, depthwise, grouped and transposed convolutions, a gather, norms, tied layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False)
        self.act = nn.PReLU(16)
        self.mix = nn.Conv2d(16, 8, 1)
        self.tied = self.mix  # one layer known by two names
        self.shortcut = ChannelGather(torch.tensor([-1, -1, *range(8), -1, -1]))
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.up = nn.ConvTranspose2d(12, 10, 2, stride=2)
        self.norm = nn.LayerNorm(10)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.tied(self.act(self.depthwise(x))))
        x = F.relu(self.grouped(self.shortcut(x)))
        x = self.up(x).mean((2, 3))
        logits: Tensor = self.head(self.drop(F.gelu(self.norm(x))))
        return logits


def random_mask(graph: StructureGraph, seed: int, share: float = 0.6) -> ChannelMask:
    """Return a legal mask that keeps about ``share`` of every group, at least its minimum."""
    rng = np.random.default_rng(seed)
    keep = graph.frozen.copy()
    for group in graph.groups:
        free = group.units[~graph.frozen[group.units]]
        least = max(group.min_keep - (len(group.units) - len(free)), 0)
        count = max(least, int(rng.binomial(len(free), share)))
        keep[rng.permutation(free)[:count]] = True
    return graph.mask(keep)


@pytest.fixture
def make_mask() -> Callable[..., ChannelMask]:
    return random_mask


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and buffer that is not an index values that no test can miss."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.data.copy_(noise.abs() + 0.5 if "running_var" in name else 0.5 * noise)
    return model


@pytest.fixture
def mixed() -> nn.Module:
    return randomise(Mixed())


@pytest.fixture
def example() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mixed_graph(mixed: nn.Module, example: Tensor) -> StructureGraph:
    return analyse(mixed, example)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset("digits")


@pytest.fixture
def digits_net(digits: Dataset) -> nn.Module:
    torch.manual_seed(0)
    return build_model("digits_resnet", num_classes=10, image_shape=digits.image_shape)


@pytest.fixture
def digits_graph(digits_net: nn.Module, digits: Dataset) -> StructureGraph:
    return analyse(digits_net, torch.zeros(1, *digits.image_shape))
