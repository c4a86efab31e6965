"""Weights of several layers in one stored stack, and experts to which no sample is sent."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.graph import StructureGraph, analyse
from prunegraph.pruning import apply_mask
from prunegraph.types import Budget

CheckAll = Callable[[nn.Module, Any], StructureGraph]


def free_sizes(graph: StructureGraph) -> list[int]:
    return sorted(len(group.classes) for group in graph.groups if group.frozen is None)


class Stack(nn.Module):
    """Three layers of eight channels, between two linear layers."""

    def __init__(self, use: Callable[["Stack", Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 3)
        self.weights = nn.Parameter(torch.randn(3, 8, 8) * 0.4)
        self.biases = nn.Parameter(torch.randn(3, 8) * 0.1)
        self.kernels = nn.Parameter(torch.randn(3, 8, 8, 3) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.use(self, self.enter(x)))


def as_layers(net: Stack, x: Tensor) -> Tensor:
    for place in range(3):
        x = torch.relu(F.linear(x, net.weights[place], net.biases[place]))
    return x


def as_products(net: Stack, x: Tensor) -> Tensor:
    for place in range(-3, 0):
        x = x + torch.relu(x @ net.weights[place])
    return x


def as_parts(net: Stack, x: Tensor) -> Tensor:
    for weight, bias in zip(net.weights.unbind(), net.biases.unbind(), strict=True):
        x = torch.relu(x @ weight.t() + bias)
    return x


def as_convolutions(net: Stack, x: Tensor) -> Tensor:
    x = x[..., None].expand(-1, -1, 4)
    for place in range(3):
        x = torch.relu(F.conv1d(x, net.kernels[place], padding=1))
    return x.mean(2)


def of_the_samples(net: Stack, x: Tensor) -> Tensor:
    chosen = x.sum(1).abs().long() % 3
    products = torch.bmm(x[:, None], net.weights[chosen])[:, 0]
    return x + torch.relu(products + net.biases[chosen])


def of_the_samples_by_index_select(net: Stack, x: Tensor) -> Tensor:
    chosen = x.sum(1).abs().long() % 3
    return x + torch.bmm(net.weights.index_select(0, chosen), x[:, :, None])[..., 0]


def added(net: Stack, x: Tensor) -> Tensor:
    return (
        x + net.weights[torch.arange(len(x)) % 3, 0] + net.weights[x.abs().sum(1).long() % 3][:, 1]
    )


def with_empty_parts(net: Stack, x: Tensor) -> Tensor:
    mixed = torch.zeros_like(x)
    for place in range(3):
        rows = torch.where(torch.arange(len(x)) == place)[0]
        mixed.index_add_(0, rows, F.linear(x[rows], net.weights[place], net.biases[place]))
    return x + mixed


@pytest.mark.parametrize(
    "use",
    [
        as_layers,
        as_products,
        as_parts,
        as_convolutions,
        of_the_samples,
        of_the_samples_by_index_select,
        added,
        with_empty_parts,
    ],
)
def test_layers_in_one_stack_lose_the_same_channels(
    use: Callable[[Stack, Tensor], Tensor], check_all: CheckAll
) -> None:
    graph = check_all(Stack(use), torch.randn(2, 6, generator=torch.Generator().manual_seed(1)))
    assert free_sizes(graph) == [8]


class Experts(nn.Module):
    """Each sample goes to one expert; the example does not reach all of them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.enter, self.router, self.leave = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        chosen, mixed = self.router(x).argmax(1), torch.zeros_like(x)
        for place, expert in enumerate(self.experts):
            if self.way == "mask":
                mixed[chosen == place] = expert(x[chosen == place])
            else:
                rows = torch.where(chosen == place)[0]
                mixed.index_add_(0, rows, expert(x[rows]))
        return self.leave(x + mixed)


@pytest.mark.parametrize("way", ["mask", "rows"])
def test_an_expert_of_no_samples_is_as_others_are(way: str) -> None:
    model, few, many = Experts(way).eval(), torch.randn(2, 6), torch.randn(200, 6)
    assert len(model.router(model.enter(few)).argmax(1).unique()) < 4
    assert len(model.router(model.enter(many)).argmax(1).unique()) == 4
    graph = analyse(model, few)
    assert 8 in free_sizes(graph)
    pruned = apply_mask(
        model, graph, graph.project(torch.rand(graph.num_classes).numpy(), Budget(keep_macs=0.5))
    )
    assert pruned.enter.out_features < 8
    assert pruned(many).shape == (200, 3)
