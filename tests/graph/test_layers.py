"""Kinds of layers, one small network each: prunable or frozen with a reason, never wrong."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.budget import Budget
from prunegraph.graph import StructureGraph, analyse
from prunegraph.testing import assert_masked_equals_pruned


class RMSNorm(nn.Module):
    """Written out, as in Llama."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Swap(nn.Module):
    """A norm over the channels of ``[B, C, H, W]``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


class GatedMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.glu(self.up(x), -1))
        return out


class ChannelMean(nn.Module):
    """A spatial gate from the mean over channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean(1, keepdim=True).sigmoid()


class TwoMeans(nn.Module):
    """Two means over different channels in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.one(x), self.two(x)
        a, b = a / a.square().mean(-1, keepdim=True), b / b.square().mean(-1, keepdim=True)
        out: Tensor = self.out(a) + self.out(b.flip(-1))
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.out = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.lstm(x)[0])
        return out


def image(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


def sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), *layers, nn.Linear(8, 3))


IMAGES: dict[str, Callable[[], nn.Module]] = {
    "group_norm": lambda: image(nn.GroupNorm(4, 8), nn.ReLU()),
    "group_norm_of_one": lambda: image(nn.GroupNorm(1, 8), nn.ReLU()),
    "instance_norm": lambda: image(nn.InstanceNorm2d(8, affine=True), nn.ReLU()),
    "tracked_instance_norm": lambda: image(nn.InstanceNorm2d(8, True, track_running_stats=True)),
    "layer_norm": lambda: image(Swap(nn.LayerNorm(8))),
    "rms_norm": lambda: image(Swap(nn.RMSNorm(8))),
    "written_rms_norm": lambda: image(Swap(RMSNorm(8))),
    "channel_mean": lambda: image(ChannelMean()),
    "transposed": lambda: image(nn.ConvTranspose2d(8, 12, 2, 2), nn.ReLU(), nn.Conv2d(12, 8, 3)),
    "grouped_transposed": lambda: image(
        nn.ConvTranspose2d(8, 12, 2, 2, groups=4), nn.ReLU(), nn.Conv2d(12, 8, 3)
    ),
    "depthwise_transposed": lambda: image(nn.ConvTranspose2d(8, 8, 2, 2, groups=8)),
    "prelu": lambda: image(nn.PReLU(8)),
    "glu": lambda: image(nn.Conv2d(8, 16, 1), nn.GLU(1)),
}
SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "gated_mlp": lambda: sequence(GatedMlp()),
    "written_rms_norm_1d": lambda: sequence(RMSNorm(8)),
    "recurrent": lambda: sequence(Recurrent(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 8)),
    "two_means": lambda: sequence(TwoMeans()),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = (IMAGES | SEQUENCES)[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 3, 9, 9) if name in IMAGES else torch.randn(2, 6, 5)
    model(x)  # moves the running statistics
    return model.eval(), x


def check_masks(model: nn.Module, graph: StructureGraph, x: Tensor | tuple[Tensor, ...]) -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=graph.num_units).astype(np.float32)
        mask = graph.project(scores, Budget(keep_params=float(rng.uniform(0.72, 0.95))))
        assert_masked_equals_pruned(model, graph, mask, x)


def free_sizes(graph: StructureGraph) -> list[int]:
    return sorted(len(group.units) for group in graph.groups if group.frozen is None)


@pytest.mark.parametrize("name", [*IMAGES, *SEQUENCES])
def test_masked_equals_pruned(name: str) -> None:
    model, x = network(name)
    check_masks(model, analyse(model, x), x)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("group_norm", [4]),  # whole groups leave
        ("group_norm_of_one", [8]),
        ("instance_norm", [8]),
        ("written_rms_norm", [8]),
        ("channel_mean", [8]),
        ("transposed", [8, 8, 12]),
        ("grouped_transposed", [2, 3, 8]),  # one channel of each group
        ("glu", [8, 8]),
        ("gated_mlp", [8, 8, 12]),
        ("recurrent", [6, 7, 8, 8, 8]),
        ("written_rms_norm_1d", [8]),
    ],
)
def test_what_is_prunable(name: str, sizes: list[int]) -> None:
    assert free_sizes(analyse(*network(name))) == sizes


def test_means_that_cannot_be_told_apart_are_frozen() -> None:
    graph = analyse(*network("two_means"))
    assert 6 not in free_sizes(graph)
    assert any("several kinds of as many channels" in item.reason for item in graph.frozen_ops)


class Tokens(nn.Module):
    """Embeddings of words and positions; integers are moved about like data."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 16), nn.Embedding(9, 16)
        self.hidden, self.out = nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1]).expand(ids.shape).flip(1)
        x = self.words(ids.roll(1, 1)) + self.places(places)
        out: Tensor = self.out(self.hidden(x).relu())
        return out


def test_embeddings_are_pruned_by_columns() -> None:
    torch.manual_seed(0)
    model, ids = Tokens().eval(), torch.randint(0, 11, (2, 7))
    graph = analyse(model, ids)
    assert free_sizes(graph) == [12, 16]
    check_masks(model, graph, ids)


class Spare(nn.Module):
    """A layer that the forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.spare = image(nn.ReLU()), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


def test_a_layer_that_is_not_used_is_reported() -> None:
    graph = analyse(Spare().eval(), torch.randn(2, 3, 9, 9))
    assert ("spare", "not used by this forward: left whole") in {
        (item.module, item.reason) for item in graph.frozen_ops
    }


class SelectiveKernel(nn.Module):
    """Two paths stacked, weighted by a softmax over the paths, and summed (Li et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1) for _ in range(2)])
        self.gate, self.out = nn.Linear(8, 16), nn.Linear(8, 3)
        self.shape = (2, 8)

    def forward(self, x: Tensor) -> Tensor:
        stacked = torch.stack([path(x) for path in self.paths], 1)
        gate = self.gate(stacked.sum(1).mean((2, 3))).view(-1, *self.shape).softmax(1)
        out: Tensor = self.out((stacked * gate[..., None, None]).sum(1).mean((2, 3)))
        return out


def test_stacked_paths_lose_the_same_channels() -> None:
    torch.manual_seed(0)
    model, x = SelectiveKernel().eval(), torch.randn(2, 3, 9, 9)
    graph = analyse(model, x)
    assert free_sizes(graph) == [8]
    check_masks(model, graph, x)
