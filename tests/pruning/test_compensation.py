"""Least-squares compensation against cases that can be computed by hand."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.errors import ModelError
from prunegraph.graph import StructureGraph, analyse
from prunegraph.pruning import apply_mask, compensation
from prunegraph.pruning.compensation import Compensation, sampled_inputs
from prunegraph.pruning.reads import reads
from prunegraph.types import KeepMask


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take all positions, in order, and hardly any ridge."""
    monkeypatch.setattr(compensation, "RIDGE", 1e-9)
    monkeypatch.setattr(compensation, "_draw", lambda count, _: torch.arange(count))


def compensated(
    net: nn.Module, graph: StructureGraph, mask: KeepMask, images: Tensor
) -> tuple[nn.Module, nn.Module]:
    """Return the pruned network and the same one compensated."""
    measured = Compensation(net, graph, lambda network: network(images))
    pruned = apply_mask(net, graph, mask)
    changed = copy.deepcopy(pruned)
    measured.apply(changed, mask)
    return pruned, changed


def without(graph: StructureGraph, op: int, *positions: int) -> KeepMask:
    """Return the mask without some of the channels that an op writes."""
    keep = np.ones(graph.num_classes, dtype=bool)
    keep[graph.ops[op].out_classes[list(positions)]] = False
    return graph.mask(keep)


def conv_net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, **options), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    ).eval()  # fmt: skip


@pytest.mark.usefixtures("exact")
def test_what_kept_channels_can_replace_is_replaced() -> None:
    net = conv_net(padding=1)
    with torch.no_grad():  # channel 1 is twice channel 0, channel 3 a constant
        net[0].weight[1], net[0].bias[1] = 2.0 * net[0].weight[0], 2.0 * net[0].bias[0]
        net[0].weight[3], net[0].bias[3] = 0.0, 1.0
    images = torch.randn(40, 3, 6, 6)
    graph = analyse(net, images[:1])
    net[2].padding_mode = "replicate"  # else the constant is none at the border
    net[2]._reversed_padding_repeated_twice = [1, 1, 1, 1]
    before = copy.deepcopy(net.state_dict())
    pruned, changed = compensated(net, graph, without(graph, 0, 1, 3), images)
    torch.testing.assert_close(changed(images), net(images), atol=1e-4, rtol=1e-4)
    assert (pruned(images) - net(images)).abs().max() > 0.05
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.usefixtures("exact")
def test_a_linear_layer_by_hand() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    images = torch.randn(300, 7)
    graph = analyse(net, images[:1])
    _, changed = compensated(net, graph, without(graph, 0, 2, 5), images)
    inputs = net[:2](images).detach()
    kept = torch.cat([inputs[:, [0, 1, 3, 4]], torch.ones(300, 1)], dim=1)
    best = torch.linalg.lstsq(kept, net(images).detach()).solution
    torch.testing.assert_close(changed[2].weight, best[:4].T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(changed[2].bias, best[4], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("normed", [False, True])
def test_without_a_bias_the_mean_counts_unless_a_norm_takes_it_up(normed: bool) -> None:
    torch.manual_seed(2)
    last: list[nn.Module] = [nn.BatchNorm1d(3)] if normed else []
    net = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3, bias=False), *last).eval()
    images = torch.randn(300, 7)
    graph = analyse(net, images[:1])
    _, changed = compensated(net, graph, without(graph, 0, 2, 5), images)
    inputs = net[:2](images).detach()
    outputs = net[2](inputs).detach()
    if normed:
        inputs, outputs = inputs - inputs.mean(0), outputs - outputs.mean(0)
    best = torch.linalg.lstsq(inputs[:, [0, 1, 3, 4]], outputs).solution
    torch.testing.assert_close(changed[2].weight, best.T, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1, "stride": 2},
        {"padding": (2, 1), "dilation": 2},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "reflect"},
    ],
)
def test_what_is_sampled_gives_the_outputs(options: dict[str, Any]) -> None:
    net, images = conv_net(**options), torch.randn(2, 3, 7, 9)
    graph = analyse(net, images[:1])
    found = {}

    def visit(read: Any) -> None:
        found[read.op.param] = sampled_inputs(read, torch.Generator())

    with torch.no_grad(), reads(net, graph, visit):
        net(images)
    inputs = net[:2](images)
    expected = net[2](inputs) - net[2].bias[:, None, None]
    given = found["2.weight"] @ net[2].weight.flatten(1).T
    torch.testing.assert_close(given, expected.movedim(1, 3).flatten(0, 2))


def test_a_sample_is_small_and_fixed_by_its_seed() -> None:
    net, images = conv_net(), torch.randn(2, 3, 12, 12)
    graph = analyse(net, images[:1])
    mask = without(graph, 0, 1)

    def weight(seed: int) -> Tensor:
        pruned = apply_mask(net, graph, mask)
        Compensation(net, graph, lambda network: network(images), seed=seed).apply(pruned, mask)
        return pruned[2].weight

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))


def test_a_network_that_loses_nothing_stays_as_it_is() -> None:
    net, images = conv_net(), torch.randn(4, 3, 8, 8)
    graph = analyse(net, images[:1])
    pruned, changed = compensated(net, graph, graph.dense_mask(), images)
    for old, new in zip(pruned.parameters(), changed.parameters(), strict=True):
        assert torch.equal(old, new)


def test_layers_that_cannot_be_compensated_stay_as_they_are(
    mixed: nn.Module, example: Tensor, make_mask: Callable[..., KeepMask]
) -> None:
    graph = analyse(mixed, example)
    pruned, changed = compensated(mixed.eval(), graph, make_mask(graph, 0), example)
    new = dict(changed.named_parameters())
    moved = {name for name, old in pruned.named_parameters() if not torch.equal(old, new[name])}
    assert moved == {"head.weight", "head.bias"}  # not grouped, tied, transposed, depthwise ones


class Squaring(nn.Conv2d):
    """A convolution of something else than what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x * x, self.weight, self.bias)


def test_a_layer_with_a_forward_of_its_own_stays_as_it_is() -> None:
    net, images = conv_net(), torch.randn(4, 3, 8, 8)
    net[2] = Squaring(6, 4, 3)
    graph = analyse(net, images[:1])
    pruned, changed = compensated(net, graph, without(graph, 0, 1), images)
    assert torch.equal(pruned[2].weight, changed[2].weight)


def test_layers_that_read_too_much_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = conv_net(), torch.randn(4, 3, 8, 8)
    graph = analyse(net, images[:1])
    monkeypatch.setattr(compensation, "MOST_INPUTS", 6 * 9 - 1)
    pruned, changed = compensated(net, graph, without(graph, 0, 1), images)
    assert torch.equal(pruned[2].weight, changed[2].weight)


def test_channels_that_are_always_zero_are_no_trouble() -> None:
    net, images = conv_net(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        net[0].bias.fill_(-1000.0)
    graph = analyse(net, images[:1])
    pruned, changed = compensated(net, graph, without(graph, 0, 1), images)
    assert torch.equal(pruned[2].weight, changed[2].weight)


def test_what_is_not_finite_is_one_clear_error() -> None:
    net, images = conv_net(), torch.full((4, 3, 8, 8), torch.inf)
    graph = analyse(net, images[:1].zero_())
    images[:] = torch.inf
    with pytest.raises(ModelError, match=r"what 0\.weight reads is not finite"):
        Compensation(net, graph, lambda network: network(images))


def test_double_precision_stays() -> None:
    net, images = conv_net().double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    graph = analyse(net, images[:1])
    mask = without(graph, 0, 1)
    pruned = apply_mask(net, graph, mask)
    old = pruned[2].weight.clone()
    Compensation(net, graph, lambda network: network(images.float())).apply(pruned, mask)
    assert pruned[2].weight.dtype == torch.float64
    assert not torch.equal(old, pruned[2].weight)
