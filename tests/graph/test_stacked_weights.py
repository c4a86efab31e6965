"""Weights of several layers in one stored stack, and experts to which no sample is sent."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.budget import Budget
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.apply import apply_mask

CheckAll = Callable[[nn.Module, Any], StructureGraph]


def free_sizes(graph: StructureGraph) -> list[int]:
    return sorted(len(group.units) for group in graph.groups if group.frozen is None)


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


def test_an_ensemble_of_layers_with_biases_loses_the_same_channels(check_all: CheckAll) -> None:
    class Ensemble(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(5, inputs, outputs))
            self.biases = nn.Parameter(torch.randn(5, 1, outputs))

        def forward(self, x: Tensor) -> Tensor:
            return torch.baddbmm(self.biases, x, self.weights)

    net = nn.Sequential(Ensemble(6, 16), nn.SiLU(), Ensemble(16, 12), nn.SiLU(), Ensemble(12, 4))
    assert free_sizes(check_all(net, torch.randn(5, 3, 6))) == [12, 16]


def test_a_weight_of_which_three_axes_are_merged_stays_whole(check_all: CheckAll) -> None:
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.out = nn.Linear(6, 16), nn.Linear(16, 24), nn.Linear(24, 3)
            self.weight = nn.Parameter(torch.randn(2, 3, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.two(self.one(x).relu()).relu()
            return self.out(x), F.linear(x, self.weight.reshape(1, -1))

    assert free_sizes(check_all(Merged(), torch.randn(3, 6))) == [16]


class Heads(nn.Module):
    """Attention whose weights are a matrix for each head, as ``einsum`` takes them."""

    def __init__(self, enter: str, leave: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ways, sizes = (enter, leave), {"d": 16, "h": 4, "k": 8}
        shape, back = ([sizes[axis] for axis in axes] for axes in (enter[4:7], leave[5:8]))
        self.one, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.query, self.key, self.value = (nn.Parameter(torch.randn(shape) / 4) for _ in range(3))
        self.bias, self.out = nn.Parameter(torch.randn(4, 1, 8)), nn.Parameter(torch.randn(back))

    def forward(self, x: Tensor) -> Tensor:
        x, (enter, leave) = self.one(x), self.ways
        query, key, value = (
            torch.einsum(enter, x, weight) for weight in (self.query, self.key, self.value)
        )
        maps = ((query + self.bias) @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
        mixed: Tensor = self.head((x + torch.einsum(leave, maps @ value, self.out)).relu())
        return mixed


@pytest.mark.parametrize("enter", ["bnd,dhk->bhnk", "bnd,hdk->bhnk", "bnd,hkd->bhnk"])
@pytest.mark.parametrize("leave", ["bhnk,hkd->bnd", "bhnk,dhk->bnd", "bhnk,hdk->bnd"])
def test_heads_of_weights_with_an_axis_of_heads_leave_whole(
    enter: str, leave: str, check_all: CheckAll
) -> None:
    graph = check_all(Heads(enter, leave), torch.randn(2, 5, 6))
    assert free_sizes(graph) == [4, 16]


def test_or_all_heads_lose_a_part_of_their_width() -> None:
    net = Heads("bnd,dhk->bhnk", "bhnk,hkd->bnd")
    graph = analyse(net, torch.randn(2, 5, 6), attention="width")
    assert free_sizes(graph) == [8, 8, 16]


class Broadcast(nn.Module):
    """Attention that multiplies its stream with a matrix for each head."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused = fused
        self.one, self.out, self.head = nn.Linear(6, 16), nn.Linear(32, 16), nn.Linear(16, 3)
        self.weights = nn.ParameterList(torch.randn(4, 16, 8) / 4 for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        query, key, value = (x[:, None] @ weight for weight in self.weights)
        if self.fused:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            mixed = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1) @ value
        result: Tensor = self.head((x + self.out(mixed.transpose(1, 2).flatten(2))).relu())
        return result


@pytest.mark.parametrize(("fused", "free"), [(False, [8, 8, 16]), (True, [8, 16])])
@pytest.mark.parametrize("samples", [1, 2])
def test_heads_of_broadcast_products_lose_a_part_of_their_width(
    samples: int, fused: bool, free: list[int], check_all: CheckAll
) -> None:
    graph = check_all(Broadcast(fused=fused), torch.randn(samples, 5, 6))
    assert free_sizes(graph) == free


class Mixture(nn.Module):
    """Experts in stacks, all of which see each sample."""

    def __init__(self, mix: Callable[["Mixture", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = mix
        self.enter, self.router, self.leave = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 5)
        self.up, self.down = (nn.Parameter(torch.randn(3, *s) / 3) for s in ((8, 12), (12, 8)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(x + self.mix(self, x, self.router(x).softmax(-1)))


def by_einsum(net: Mixture, x: Tensor, shares: Tensor) -> Tensor:
    inner = torch.einsum("bd,edh->beh", x, net.up).relu()
    return (torch.einsum("beh,ehd->bed", inner, net.down) * shares[..., None]).sum(1)


def by_one_einsum(net: Mixture, x: Tensor, shares: Tensor) -> Tensor:
    inner = torch.einsum("bd,edh->ebh", x, net.up).relu()
    return torch.einsum("ebh,ehd,be->bd", inner, net.down, shares)


def by_broadcasting(net: Mixture, x: Tensor, shares: Tensor) -> Tensor:
    return ((x[None] @ net.up).relu() @ net.down * shares.t()[..., None]).sum(0)


@pytest.mark.parametrize("mix", [by_einsum, by_one_einsum, by_broadcasting])
def test_all_experts_of_a_stack_lose_the_same_hidden_units(
    mix: Callable[[Mixture, Tensor, Tensor], Tensor], check_all: CheckAll
) -> None:
    assert free_sizes(check_all(Mixture(mix), torch.randn(4, 6))) == [8, 12]


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
        model, graph, graph.project(torch.rand(graph.num_units).numpy(), Budget(keep_macs=0.5))
    )
    assert pruned.enter.out_features < 8
    assert pruned(many).shape == (200, 3)
