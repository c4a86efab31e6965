"""Modules that do something of their own when training begins or ends."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.surgery import apply_mask, zero_mask
from prunegraph.testing.structure_check import check_structure, random_mask

WIDTH = 16
EXAMPLE = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))


def around(block: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, WIDTH), block, nn.ReLU(), nn.Linear(WIDTH, 3)).eval()


def free_sizes(graph: StructureGraph) -> list[int]:
    return sorted(len(group.units) for group in graph.groups if group.frozen is None)


class Adapted(nn.Linear):
    """As loralib's: the product of two small weights is part of the weight while evaluating."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.down, self.up = nn.Parameter(torch.randn(2, width)), nn.Parameter(torch.ones(width, 2))
        self.merged = False

    def train(self, mode: bool = True) -> "Adapted":
        if self.merged == mode:
            sign = -1.0 if mode else 1.0
            self.weight.data.add_(self.up.data @ self.down.data, alpha=sign)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        return out if self.merged else out + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("training", [True, False])
def test_weights_that_change_with_the_mode_stay_as_they_were(*, training: bool) -> None:
    net = around(Adapted(WIDTH)).train(training)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    merged, output = net[1].merged, net(EXAMPLE)
    assert WIDTH in free_sizes(analyse(net, EXAMPLE))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net[1].merged is merged
    assert net.training is training
    assert torch.equal(net(EXAMPLE), output)


class Fused(nn.Module):
    """For deployment alone."""

    def train(self, mode: bool = True) -> "Fused":
        if mode:
            msg = "fused: it cannot be trained"
            raise RuntimeError(msg)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


def test_a_module_that_cannot_be_trained_is_pruned() -> None:
    net = around(Fused())
    graph = analyse(net, EXAMPLE)
    assert free_sizes(graph) == [WIDTH]
    mask, _ = random_mask(graph, np.random.default_rng(0))
    assert not any(module.training for module in apply_mask(net, graph, mask).modules())


class Table(nn.Module):
    """Makes a table when training ends, and drops it when training begins."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.table = nn.Parameter(torch.randn(9, 9)), None

    def train(self, mode: bool = True) -> "Table":
        self.table: Any = None if mode else self.weight.detach().softmax(-1)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.weight.softmax(-1) if self.training else self.table) @ x
        return out


def test_a_module_that_evaluates_in_a_network_that_trains_has_its_table() -> None:
    net = around(Table()).train()
    net[1].eval()
    before = net(EXAMPLE)
    graph = analyse(net, EXAMPLE)
    assert net.training
    assert not net[1].training
    assert torch.equal(net(EXAMPLE), before)
    mask, _ = random_mask(graph, np.random.default_rng(0))
    for cut in (apply_mask, zero_mask):
        pruned = cut(net, graph, mask)
        assert pruned(EXAMPLE).shape == before.shape
        assert pruned.training
        assert not pruned[1].training


class Blur(nn.Module):
    """A constant kernel, repeated for evaluation as often as an attribute says."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.kept = WIDTH, None
        self.register_buffer("kernel", torch.ones(1, 1, 3) / 3)

    def repeated(self) -> Tensor:
        return self.get_buffer("kernel").repeat(self.channels, 1, 1)

    def train(self, mode: bool = True) -> "Blur":
        self.kept: Any = None if mode else self.repeated()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.repeated() if self.kept is None else self.kept
        return F.conv1d(x.mT, kernel, padding=1, groups=self.channels).mT


def test_what_is_kept_has_the_size_that_surgery_sets() -> None:
    net = around(Blur())
    assert free_sizes(analyse(net, EXAMPLE)) == [WIDTH]
    found = check_structure(net, EXAMPLE, seed=0)
    assert found.failures == []
    assert found.num_compared >= 2
