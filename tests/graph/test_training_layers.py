"""Layers that training alone uses follow the channels that they read."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.surgery import apply_mask, zero_mask
from prunegraph.testing import assert_masked_equals_pruned

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Auxiliary(nn.Module):
    """Has more outputs in training, as GoogLeNet and Inception do."""

    def __init__(self, branch: Callable[["Auxiliary", Tensor], Tensor]) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Dropout(0.3))
        self.two, self.head, self.branch = nn.Conv2d(16, 12, 3), nn.Linear(12, 5), branch
        self.convs = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.linear, self.same = nn.Linear(16, 5), nn.Linear(16, 16)
        self.gain, self.centres = nn.Parameter(torch.rand(16)), nn.Parameter(torch.randn(4, 16))
        self.width = 16

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.one(x)
        out: Tensor = self.head(self.two(x).mean((2, 3)))
        return (out, self.branch(self, x)) if self.training else out


BRANCHES: dict[str, Callable[[Auxiliary, Tensor], Tensor]] = {
    "layers": lambda net, x: net.convs(x),
    "gain": lambda net, x: x * net.gain[:, None, None],
    "centres": lambda net, x: x.mean((2, 3))[:, None] - net.centres,
    "cosine": lambda net, x: F.normalize(net.linear(x.mean((2, 3)))),
    "last": lambda net, x: net.same(x.permute(0, 2, 3, 1)),
    "view": lambda net, x: net.linear(x.mean((2, 3)).view(-1, net.width)),
    "features": lambda net, x: x + net.linear(x.mean((2, 3))).mean(),
    "drawn": lambda net, x: torch.multinomial(x.mean((2, 3)).softmax(1), 2) + net.linear.bias[0],
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_pruned_network_can_be_trained_and_nothing_more_is_held_back(name: str) -> None:
    torch.manual_seed(0)
    model = Auxiliary(BRANCHES[name]).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    graph = analyse(model, IMAGES)
    assert {g.name: g.units.size for g in graph.groups if g.frozen is None} == {
        "one.0": 16,
        "two": 12,
    }
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    keep = graph.dense_mask().keep.copy()
    keep[np.flatnonzero(graph.free)[::3]] = False
    mask = graph.mask(keep)
    assert_masked_equals_pruned(model, graph, mask, IMAGES)
    pruned = apply_mask(model, graph, mask)
    out, _ = pruned.train()(IMAGES)
    assert out.shape == (2, 5)
    assert sum(parameter.numel() for parameter in pruned.parameters()) == graph.cost(mask).params


def test_a_forward_that_fails_in_training_is_analysed_as_before() -> None:
    def fails(_net: Auxiliary, _x: Tensor) -> Tensor:
        msg = "targets"
        raise KeyError(msg)

    graph = analyse(Auxiliary(fails), IMAGES)
    assert ("convs.2", "not used by this forward: left whole") in {
        (item.module, item.reason) for item in graph.frozen_ops
    }


class Routed(nn.Module):
    """One of three experts runs, by the input; two are as wide as each other inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, width, 1), nn.BatchNorm2d(width), nn.Conv2d(width, 8, 1))
            for width in (6, 6, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        best = int(x[0, 0, 0, 0].abs() * 10) % 3
        x = self.first(x)
        out: Tensor = self.last(x + self.experts[best](x))
        return out


def test_experts_that_the_example_does_not_visit_follow_one_that_it_does() -> None:
    torch.manual_seed(0)
    model, images = Routed().eval(), torch.randn(2, 3, 6, 6)
    inputs = [images.clone() for _ in range(3)]
    for number, each in enumerate(inputs):
        each[0, 0, 0, 0] = 0.1 * number + 0.05
    graph = analyse(model, inputs[0])
    assert {g.name: g.units.size for g in graph.groups if g.frozen is None} == {
        "first": 8,
        "experts.0.0": 6,
    }
    keep = graph.frozen | (np.arange(graph.num_units) % 3 > 0)
    assert not keep.all()
    mask = graph.mask(keep)
    pruned, masked = apply_mask(model, graph, mask), zero_mask(model, graph, mask)
    for each in inputs:
        torch.testing.assert_close(pruned(each), masked(each))


class Deep(nn.Module):
    """Runs as many layers of a chain as there are images: they are no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 4)
        self.chain = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for layer in self.chain[: len(x)]:
            x = layer(x).relu()
        out: Tensor = self.last(x)
        return out


def test_a_layer_of_a_chain_that_the_example_does_not_reach_stays_whole() -> None:
    torch.manual_seed(0)
    model = Deep().eval()
    graph = analyse(model, torch.randn(2, 3))
    assert {"chain.2", "chain.3"} <= {item.module for item in graph.frozen_ops}


class Variational(nn.Module):
    """Its layer of deviations is run in eval mode, and left out.

    Args:
        custom_noise: the noise is as wide as an attribute says.
    """

    def __init__(self, custom_noise: bool) -> None:
        super().__init__()
        self.custom_noise, self.latent_dim = custom_noise, 6
        self.embed, self.mean, self.deviation = nn.Linear(5, 12), nn.Linear(12, 6), nn.Linear(12, 6)
        self.decode, self.head = nn.Linear(6, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).relu()
        latent, deviation = self.mean(x), self.deviation(x)
        if self.training:
            shape = (len(x), self.latent_dim) if self.custom_noise else latent.shape
            latent = latent + deviation.exp() * torch.randn(shape)
        out: Tensor = self.head(self.decode(latent).relu())
        return out


@pytest.mark.parametrize("custom_noise", [False, True])
def test_what_eval_mode_leaves_out_is_tied_as_in_training(
    custom_noise: bool, check_all: Callable[[nn.Module, Tensor], StructureGraph]
) -> None:
    torch.manual_seed(0)
    model, x = Variational(custom_noise), torch.randn(4, 5)
    graph = check_all(model, x)
    groups = [group for group in graph.groups if group.frozen is None]
    assert sorted(len(group.units) for group in groups) == [6, 10, 12]
    (latent,) = [group for group in groups if len(group.units) == 6]
    assert {"mean.weight:0", "deviation.weight:0", "decode.weight:1"} <= {*latent.members}
    keep = graph.dense_mask().keep.copy()
    keep[latent.units[:4]] = False
    assert apply_mask(model, graph, graph.mask(keep)).train()(x).shape == (4, 5)


class Noisy(nn.Module):
    """Adds noise to its weights in training, as agents that explore by it do."""

    def __init__(self, inputs: int, outputs: int, *, drawn: bool = False) -> None:
        super().__init__()
        self.drawn = drawn
        self.weight, self.bias = nn.Linear(inputs, outputs).parameters()
        self.spread = nn.Parameter(torch.rand(outputs, inputs))
        self.register_buffer("noise", torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.linear(x, self.weight, self.bias)
        noise = torch.randn_like(self.spread) if self.drawn else self.get_buffer("noise").normal_()
        return F.linear(x, self.weight + self.spread * noise, self.bias)


class Locked(nn.Module):
    """Drops the same channels of all steps, with a mask of its own making in training."""

    def __init__(self, width: int | None) -> None:
        super().__init__()
        self.hidden = width

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_empty(len(x), self.hidden or 16).bernoulli_(0.5)
        return 2 * x * mask if self.training else x


@pytest.mark.parametrize(
    ("block", "widths"),
    [
        (lambda: Noisy(16, 16), {"0": 16, "2": 16, "4": 12}),
        (lambda: Noisy(16, 16, drawn=True), {"0": 16, "2": 16, "4": 12}),
        (lambda: Locked(16), {"0": 16, "4": 12}),
        (lambda: Locked(None), {"4": 12}),
    ],
    ids=["noise", "drawn", "size", "number"],
)
def test_a_pruned_network_runs_in_training_mode(
    block: Callable[[], nn.Module], widths: dict[str, int]
) -> None:
    """It is tried there; what training needs at its full width stays, and says so."""
    layers = (nn.Linear(6, 16), nn.ReLU(), block(), nn.ReLU(), nn.Linear(16, 12), nn.ReLU())
    net, x = nn.Sequential(*layers, nn.Linear(12, 3)).eval(), torch.randn(4, 6)
    graph = analyse(net, x)
    assert graph.group_widths(graph.dense_mask()) == widths
    assert all("in training mode" in item.reason for item in graph.frozen_ops)
    keep = graph.dense_mask().keep.copy()
    keep[np.flatnonzero(graph.free)[::3]] = False
    assert_masked_equals_pruned(net, graph, graph.mask(keep), x)
    assert apply_mask(net, graph, graph.mask(keep)).train()(x).shape == (4, 3)


def test_parameters_that_the_example_does_not_choose_follow_one_that_it_does() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.out = nn.Linear(6, 16), nn.Linear(16, 3)
            self.scales = nn.ParameterList([torch.rand(16) for _ in range(3)])

        def forward(self, x: Tensor, task: int = 0) -> Tensor:
            out: Tensor = self.out(self.one(x) * self.scales[task])
            return out

    net, x = Scaled().eval(), torch.randn(4, 6)
    graph = analyse(net, x)
    keep = graph.dense_mask().keep.copy()
    keep[np.flatnonzero(graph.free)[::3]] = False
    mask = graph.mask(keep)
    pruned, masked = apply_mask(net, graph, mask), zero_mask(net, graph, mask)
    for task in range(3):
        torch.testing.assert_close(pruned(x, task), masked(x, task))


def test_an_exit_that_is_sure_is_no_expert() -> None:
    class Exits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.sure = nn.Linear(6, 16), nn.Linear(16, 16), 0.3
            self.exits = nn.ModuleList([nn.Linear(16, 3), nn.Linear(16, 3)])

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            x = self.one(x).relu()
            first, second = self.exits[0](x), self.exits[1]
            if self.training:
                return first, second(self.two(x).relu())
            found: Tensor = first if first.softmax(-1).max() > self.sure else second(self.two(x))
            return found

    net, x = Exits().eval(), torch.randn(2, 6)
    graph = analyse(net, x)
    keep = graph.dense_mask().keep.copy()
    keep[np.flatnonzero(graph.free)[::3]] = False
    pruned, masked = (cut(net, graph, graph.mask(keep)) for cut in (apply_mask, zero_mask))
    for sure in (0.3, 2.0):
        pruned.sure = masked.sure = sure
        torch.testing.assert_close(pruned(x), masked(x))


class Branching(nn.Module):
    """Runs a head more by a flag, and one of two layers by what the images hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 10)
        self.bright, self.dark = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.more = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor, *, more: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        h = self.first(x).relu()
        layer = self.bright if bool(x.mean() > 0) else self.dark
        out: Tensor = self.head(layer(h).mean((2, 3)))
        return (out, self.more(h)) if more else out


def test_layers_that_no_example_runs_are_told_of() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="no example runs dark, more, which may read channels"):
        graph = analyse(Branching(), IMAGES.abs())
    assert graph.not_run == ("dark", "more")


def test_layers_of_other_branches_are_pruned_along_and_cost_nothing() -> None:
    torch.manual_seed(0)
    model, bright = Branching().eval(), IMAGES.abs()
    others = [-bright, {"x": bright, "more": True}]
    graph = analyse(model, bright, others=others)
    assert not graph.not_run
    assert "more.weight:1" in next(group for group in graph.groups if group.name == "first").members
    keep = graph.dense_mask().keep.copy()
    keep[np.flatnonzero(graph.free)[::3]] = False
    mask = graph.mask(keep)
    for example in (bright, *others):
        small, zeroed = apply_mask(model, graph, mask), zero_mask(model, graph, mask)
        given = {"x": example} if isinstance(example, Tensor) else example
        torch.testing.assert_close(small(**given), zeroed(**given))
    assert_masked_equals_pruned(model, graph, mask, bright)
