"""Weights that a forward computes from stored ones before it uses them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.surgery import apply_mask
from prunegraph.layerwise.reconstruct import Reconstruction
from prunegraph.testing import assert_masked_equals_pruned
from prunegraph.testing.structure_check import random_mask

INPUTS, FIRST, SECOND, CLASSES = 3, 12, 16, 5


class Standardised(nn.Conv2d):
    """As BiT has it."""

    def computed(self) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, correction=0)
        return (self.weight - mean) / torch.sqrt(variance + 1e-10)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.computed(), self.bias)


class StandardisedByAxes(Standardised):
    """As the paper's authors have it."""

    def computed(self) -> Tensor:
        mean = self.weight.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
        centred = self.weight - mean
        spread = centred.view(centred.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return centred / spread.expand_as(centred)


class StandardisedByBatchNorm(Standardised):
    """As NFNet in timm has it, with a gain for each output."""

    def __init__(self, inputs: int, outputs: int, kernel: int, **options: int) -> None:
        super().__init__(inputs, outputs, kernel, **options)
        self.gain = nn.Parameter(torch.rand(outputs, 1, 1, 1) + 0.5)
        self.scale = self.weight[0].numel() ** -0.5

    def computed(self) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * self.scale).view(-1)
        return F.batch_norm(
            rows, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6
        ).reshape_as(self.weight)


class Normalised(Standardised):
    """Each output's weights have length one: a removed one's length is zero."""

    def computed(self) -> Tensor:
        return self.weight / self.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


class OfOneSign(Standardised):
    def computed(self) -> Tensor:
        return F.softplus(self.weight) * self.weight.sign().clone()


class Masked(Standardised):
    """As PixelCNN has it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, **options: int) -> None:
        super().__init__(inputs, outputs, kernel, **options)
        self.register_buffer("mask", torch.ones_like(self.weight))
        self.get_buffer("mask")[:, :, kernel // 2 + 1 :] = 0

    def computed(self) -> Tensor:
        return self.weight * self.get_buffer("mask")


class Rounded(Standardised):
    """As a network that is trained to be quantised has it, by the largest weight of an output."""

    def computed(self) -> Tensor:
        step = self.weight.abs().amax(dim=(1, 2, 3), keepdim=True) / 127
        return self.weight + (torch.round(self.weight / step) * step - self.weight).detach()


class OverTaps(Standardised):
    """A window over the kernel, and weights that differ from their mean over it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, **options: int) -> None:
        super().__init__(inputs, outputs, kernel, **options)
        self.window = nn.Parameter(torch.rand(kernel))

    def computed(self) -> Tensor:
        return (self.weight - self.weight.mean((2, 3), keepdim=True)) * self.window


CONVOLUTIONS = [
    Standardised,
    StandardisedByAxes,
    StandardisedByBatchNorm,
    Normalised,
    OfOneSign,
    Masked,
    Rounded,
    OverTaps,
]


class Net(nn.Module):
    """A plain path and a residual one."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.one, self.two = kind(INPUTS, FIRST, 3, padding=1), kind(FIRST, SECOND, 3, padding=1)
        self.three, self.last = kind(SECOND, FIRST, 3, padding=1), nn.Linear(FIRST, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        x = x + self.three(self.two(x).relu()).relu()
        return self.last(x.mean((2, 3)))


Check = Callable[[nn.Module, Any], StructureGraph]


def free_sizes(graph: StructureGraph) -> list[int]:
    return sorted(len(group.units) for group in graph.groups if group.frozen is None)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_they_are_pruned_as_the_stored_ones(kind: type[nn.Conv2d], check_all: Check) -> None:
    torch.manual_seed(0)
    graph = check_all(Net(kind), torch.randn(2, INPUTS, 8, 8))
    assert free_sizes(graph) == [FIRST, SECOND]
    assert [op.computed for op in graph.ops] == [True, True, True, False]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_they_cost_what_stored_ones_do(kind: type[nn.Conv2d]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, INPUTS, 8, 8)
    assert (
        analyse(Net(kind).eval(), x).dense_cost.macs
        == analyse(Net(nn.Conv2d).eval(), x).dense_cost.macs
    )


class Linear(nn.Linear):
    """BitNet's: weights of three values, by the mean of all."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean().clamp(min=1e-5)
        return F.linear(x, (self.weight / scale).round().clamp(-1, 1) * scale, self.bias)


class Cosine(nn.Module):
    """A classifier by angles, as for faces; what it reads is normalised too."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


@pytest.mark.parametrize(("first", "last"), [(Linear, nn.Linear), (nn.Linear, Cosine)])
def test_linear_layers(first: type[nn.Module], last: type[nn.Module], check_all: Check) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(first(7, SECOND), nn.ReLU(), first(SECOND, FIRST), last(FIRST, CLASSES))
    assert free_sizes(check_all(model, torch.randn(4, 7))) == [FIRST, SECOND]


class Root(nn.Module):
    """A parametrisation of one's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.sign() * weight.abs().sqrt()


def rooted(layer: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", Root())
    return layer


NORMS = [
    nn.utils.weight_norm,
    nn.utils.parametrizations.weight_norm,
    nn.utils.spectral_norm,
    nn.utils.parametrizations.spectral_norm,
    rooted,
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", NORMS)
def test_parametrised_layers_of_every_kind(
    norm: Callable[[nn.Module], nn.Module], check_all: Check
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        norm(nn.Conv1d(4, 16, 3, padding=1)),
        nn.ReLU(),
        norm(nn.Conv1d(16, 32, 3, padding=1, groups=4)),
        nn.ReLU(),
        norm(nn.Conv1d(32, 32, 3, padding=1, groups=32)),
        nn.ReLU(),
        norm(nn.ConvTranspose1d(32, 16, 4, 2, 1)),
        nn.ReLU(),
        norm(nn.Conv1d(16, 8, 3, padding=1)),
        nn.ReLU(),
        norm(nn.Linear(16, CLASSES)),
    )
    graph = check_all(model, torch.randn(2, 4, 8))
    assert free_sizes(graph) == [4, 8, 16]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", NORMS)
def test_a_pruned_network_trains_with_its_parametrisation(
    norm: Callable[[nn.Module], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = Net(lambda *args, **options: norm(nn.Conv2d(*args, **options))).eval()
    x = torch.randn(2, INPUTS, 8, 8)
    graph = analyse(model, x)
    pruned = apply_mask(model, graph, random_mask(graph, np.random.default_rng(0))[0]).train()
    before = {name: parameter.detach().clone() for name, parameter in pruned.named_parameters()}
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
    pruned(x).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in pruned.named_parameters())


def test_a_network_is_pruned_again() -> None:
    torch.manual_seed(0)
    model, x = Net(StandardisedByBatchNorm).eval(), torch.randn(2, INPUTS, 8, 8)
    graph = analyse(model, x)
    once = apply_mask(model, graph, random_mask(graph, np.random.default_rng(0))[0])
    again = analyse(once, x)
    assert_masked_equals_pruned(once, again, random_mask(again, np.random.default_rng(1))[0], x)


class Mixed(nn.Module):
    """A weight that is a product of two: its axes are of no stored one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.last = nn.Linear(7, FIRST), nn.Linear(SECOND, CLASSES)
        self.left = nn.Parameter(torch.randn(SECOND, 4))
        self.right = nn.Parameter(torch.randn(4, FIRST))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(self.one(x).relu(), self.left @ self.right).relu())


def test_what_is_not_known_stays_whole(check_all: Check) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7), nn.ReLU(), Mixed())
    graph = check_all(model, torch.randn(4, 7))
    assert free_sizes(graph) == [4, 7, 12]  # of its two axes one


class AlsoAdded(Standardised):
    """Its weights' means are used beside activations too."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.computed()
        return self._conv_forward(x, weight, self.bias) + weight.mean((1, 2, 3)).view(1, -1, 1, 1)


class Total(Standardised):
    """A weight that is computed, and read as a table of numbers."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.computed()
        return self._conv_forward(x, weight, self.bias) * (1 + weight[:, :3, 0, 0].sum())


@pytest.mark.parametrize("kind", [AlsoAdded, Total])
def test_a_computed_weight_may_be_used_otherwise_too(
    kind: type[nn.Conv2d], check_all: Check
) -> None:
    torch.manual_seed(0)
    check_all(nn.Sequential(nn.Conv2d(INPUTS, 7, 1), Net2(kind)), torch.randn(2, INPUTS, 8, 8))


class Net2(nn.Module):
    """One layer of a kind between plain ones."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.one, self.two = kind(7, FIRST, 3, padding=1), nn.Conv2d(FIRST, SECOND, 3)
        self.last = nn.Linear(SECOND, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.one(x.relu()).relu()).relu().mean((2, 3)))


class Direct(nn.Module):
    """Convolves with a weight that it computes from a plain layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(INPUTS, FIRST, 1), nn.Conv2d(FIRST, SECOND, 1)
        self.last = nn.Conv2d(SECOND, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        own = self.two(x) + F.conv2d(x, F.normalize(self.two.weight.flatten(1))[..., None, None])
        return self.last(own.relu())


def test_reconstruction_leaves_them_as_they_are() -> None:
    torch.manual_seed(0)
    model, x = Direct().eval(), torch.randn(8, INPUTS, 4, 4)
    graph = analyse(model, x)
    assert FIRST in free_sizes(graph)
    mask = random_mask(graph, np.random.default_rng(0))[0]
    plain = apply_mask(model, graph, mask)
    reconstructed = apply_mask(model, graph, mask)
    Reconstruction(model, graph, lambda network: network(x)).apply(reconstructed, mask)
    assert torch.equal(plain.get_parameter("two.weight"), reconstructed.get_parameter("two.weight"))
    assert not torch.equal(
        plain.get_parameter("last.weight"), reconstructed.get_parameter("last.weight")
    )


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_pruned_weights_have_the_spectral_norm_that_dense_ones_have(
    norm: Callable[[nn.Module], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = Net(lambda *args, **options: norm(nn.Conv2d(*args, **options)))
    x = torch.randn(2, INPUTS, 8, 8)
    for _ in range(100):
        model.train()(x)
    graph = analyse(model.eval(), x)
    pruned = apply_mask(model, graph, random_mask(graph, np.random.default_rng(0))[0])
    pruned(x)
    largest = [
        torch.linalg.matrix_norm(layer.weight.flatten(1), 2) for layer in (pruned.one, pruned.two)
    ]
    torch.testing.assert_close(torch.stack(largest), torch.ones(2), rtol=0.01, atol=0.0)


def test_a_pruned_network_is_made_plain_and_the_dense_one_stays() -> None:
    torch.manual_seed(0)
    norm = nn.utils.parametrizations.weight_norm
    model = Net(lambda *args, **options: norm(nn.Conv2d(*args, **options))).eval()
    x = torch.randn(2, INPUTS, 8, 8)
    graph, before = analyse(model, x), model(x)
    assert not [group.name for group in graph.groups if "parametrizations" in group.name]
    pruned = apply_mask(model, graph, random_mask(graph, np.random.default_rng(0))[0])
    expected = pruned(x)
    nn.utils.parametrize.remove_parametrizations(pruned.one, "weight")
    torch.testing.assert_close(pruned(x), expected)
    assert torch.equal(model(x), before)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", NORMS[:2])
def test_weights_of_kept_inputs_stay_what_they_were(norm: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(4, 16, 3), nn.ReLU(), norm(nn.ConvTranspose1d(16, 12, 3)), nn.ReLU(),
        norm(nn.Conv1d(12, 5, 3)),
    ).eval()  # fmt: skip
    x = torch.randn(2, 4, 9)
    graph = analyse(model, x)
    mask = random_mask(graph, np.random.default_rng(0))[0]
    free = [group.units for group in graph.groups if group.frozen is None]
    first, second = (torch.from_numpy(mask.keep[classes]) for classes in free)
    pruned = apply_mask(model, graph, mask)
    assert not (first.all() or second.all())
    torch.testing.assert_close(pruned[2].weight, model[2].weight[first][:, second])
    torch.testing.assert_close(pruned[4].weight, model[4].weight[:, second])


class Depthwise(nn.Module):
    """A standardised convolution of each channel alone, with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(INPUTS, SECOND, 1), Standardised(1, SECOND, 3, groups=1)
        self.last = nn.Conv2d(SECOND, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.two.computed()
        x = F.conv2d(self.one(x), weight, self.two.bias, groups=weight.shape[0])
        out: Tensor = self.last(x.relu())
        return out


def test_a_computed_weight_for_each_channel_alone(check_all: Check) -> None:
    torch.manual_seed(0)
    assert free_sizes(check_all(Depthwise(), torch.randn(2, INPUTS, 8, 8))) == [SECOND]


def test_a_square_convolution_of_one_tap(check_all: Check) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(INPUTS, FIRST, 1),
        nn.ReLU(),
        StandardisedByBatchNorm(FIRST, FIRST, 1),
        nn.ReLU(),
        nn.Conv2d(FIRST, CLASSES, 1),
    )
    assert free_sizes(check_all(model, torch.randn(2, INPUTS, 8, 8))) == [FIRST, FIRST]
