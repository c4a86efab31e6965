"""Least-squares reconstruction against cases that can be computed by hand."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.errors import MaskError, ModelError
from prunegraph.core.masks import ChannelMask
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.apply import apply_mask
from prunegraph.layerwise import reconstruct as reconstruction
from prunegraph.layerwise import sampling
from prunegraph.layerwise import statistics as statistics
from prunegraph.layerwise.capture import LinearCalls, Read, layer_inputs
from prunegraph.layerwise.recalibrate import recalibrate_bn
from prunegraph.layerwise.reconstruct import Reconstruction
from prunegraph.layerwise.sampling import sampled_inputs


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take all positions, in order, and hardly any ridge."""
    monkeypatch.setattr(statistics, "RIDGE", 1e-9)
    monkeypatch.setattr(sampling, "_draw", lambda count, _: torch.arange(count))
    monkeypatch.setattr(sampling, "POSITIONS", 10**6)


def reconstructed(
    net: nn.Module, graph: StructureGraph, mask: ChannelMask, images: Tensor
) -> tuple[nn.Module, nn.Module]:
    """Return the pruned network and the same one reconstructed."""
    measured = Reconstruction(net, graph, lambda network: network(images))
    pruned = apply_mask(net, graph, mask)
    changed = copy.deepcopy(pruned)
    measured.apply(changed, mask)
    return pruned, changed


def sampled(
    net: nn.Module, graph: StructureGraph, images: Tensor
) -> tuple[dict[str | None, Tensor], Tensor]:
    """Return what is sampled of each weight's layer, and the outputs of the network."""
    found = {}

    def visit(read: Read) -> None:
        generator = torch.Generator().manual_seed(0)
        found[read.op.param] = sampled_inputs(read.module, read.activation, generator)

    with torch.no_grad(), layer_inputs(net, graph, visit):
        return found, net(images)


def without(graph: StructureGraph, op: int, *positions: int) -> ChannelMask:
    """Return the mask without some of the channels that an op writes."""
    keep = np.ones(graph.num_units, dtype=bool)
    keep[graph.ops[op].out_units[list(positions)]] = False
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
    pruned, changed = reconstructed(net, graph, without(graph, 0, 1, 3), images)
    torch.testing.assert_close(changed(images), net(images), atol=1e-4, rtol=1e-4)
    assert (pruned(images) - net(images)).abs().max() > 0.05
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.usefixtures("exact")
def test_a_linear_layer_by_hand() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    images = torch.randn(300, 7)
    graph = analyse(net, images[:1])
    _, changed = reconstructed(net, graph, without(graph, 0, 2, 5), images)
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
    _, changed = reconstructed(net, graph, without(graph, 0, 2, 5), images)
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
    found, _ = sampled(net, graph, images)
    inputs = net[:2](images)
    expected = net[2](inputs) - net[2].bias[:, None, None]
    given = found["2.weight"] @ net[2].weight.flatten(1).T
    torch.testing.assert_close(given, expected.movedim(1, 3).flatten(0, 2))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("options", [{}, {"padding": 1, "stride": 2}, {"dilation": 2}])
@pytest.mark.parametrize(("kind", "shape"), [(nn.Conv1d, (9,)), (nn.Conv3d, (5, 7, 6))])
def test_convolutions_along_one_and_three_axes_are_sampled(
    kind: type[nn.Conv1d | nn.Conv3d], shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(kind(3, 6, 1), nn.ReLU(), kind(6, 4, 3, **options), nn.Flatten(2)).eval()
    images = torch.randn(2, 3, *shape)
    graph = analyse(net, images[:1])
    found, outputs = sampled(net, graph, images)
    given = found["2.weight"] @ net[2].weight.flatten(1).T + net[2].bias
    torch.testing.assert_close(given, outputs.movedim(1, 2).flatten(0, 1))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"stride": 3, "output_padding": 2},
        {"dilation": 2, "padding": 5},
        {"dilation": 2, "padding": 3},
    ],
)
@pytest.mark.parametrize(
    ("kind", "plain", "shape"),
    [
        (nn.ConvTranspose1d, nn.Conv1d, (9,)),
        (nn.ConvTranspose2d, nn.Conv2d, (7, 8)),
        (nn.ConvTranspose3d, nn.Conv3d, (7, 7, 8)),
    ],
)
def test_transposed_convolutions_are_sampled_and_compensated(
    kind: Any, plain: Any, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    first = plain(3, 6, 1, bias=False)
    net = nn.Sequential(first, nn.Identity(), kind(6, 4, 3, **options)).eval()
    many = len(shape) == 3 and "stride" in options  # outputs of an image
    images = torch.randn(8 if many else 64, 3, *shape)
    graph = analyse(net, images[:1])
    found, outputs = sampled(net, graph, images)
    given = found["2.weight"] @ sampling.outputs_first(net[2].weight).flatten(1).T
    expected = outputs.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(given + net[2].bias, expected, atol=1e-5, rtol=1e-4)
    mask = without(graph, 0, 1, 3, 5)  # of 6 channels of 3 inputs 3 tell the others
    pruned, changed = reconstructed(net, graph, mask, images)
    assert (changed(images) - outputs).norm() < 0.05 * (pruned(images) - outputs).norm()


class Conv1D(nn.Module):
    """A linear layer whose weight lies the other way round, as in the GPT-2 of transformers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], self.weight.shape[1])


class OwnLinear(nn.Linear):
    """A linear layer with a forward of its own, which computes the same."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight) + self.bias


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, OwnLinear])
@pytest.mark.parametrize("size", [6, 8])
def test_what_computes_as_a_linear_layer_does_is_compensated_as_one(
    kind: Callable[[int, int], nn.Module], size: int
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(kind(3, 8), nn.Identity(), kind(8, size), nn.ReLU(), kind(size, 2)).eval()
    words = torch.randn(4, 10, 3)
    graph = analyse(net, words[:1])
    mask = without(graph, 0, *range(5))  # of 8 channels of 3 inputs 3 tell the others
    changed = reconstructed(net, graph, mask, words)[1]
    torch.testing.assert_close(changed(words), net(words), atol=1e-3, rtol=1e-3)


class Attending(nn.Module):
    """Attention of tokens to each other; its keys may be others."""

    def __init__(self, *, batch_first: bool, shifted: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8, bias=False), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.shifted = shifted

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.attention(x, x + 1.0 if self.shifted else x, x)[0])


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("batch_first", [True, False])
def test_queries_keys_and_values_of_one_tensor_are_compensated(*, batch_first: bool) -> None:
    torch.manual_seed(0)
    words = torch.randn(4, 10, 3)
    net = Attending(batch_first=batch_first, shifted=False).eval()
    graph = analyse(net, words)
    changed = reconstructed(net, graph, without(graph, 0, *range(5)), words)[1]
    torch.testing.assert_close(changed(words), net(words), atol=1e-3, rtol=1e-3)
    net.shifted = True
    graph = analyse(net, words)
    pruned, changed = reconstructed(net, graph, without(graph, 0, *range(5)), words)
    assert torch.equal(changed.attention.in_proj_weight, pruned.attention.in_proj_weight)


@pytest.mark.usefixtures("exact")
def test_a_square_weight_is_read_the_way_it_is_used() -> None:
    assert sampling.input_axis(Conv1D(6, 6)) == 0
    assert sampling.input_axis(OwnLinear(6, 6)) == 1
    assert sampling.input_axis(nn.Embedding(6, 6)) is None
    assert sampling.input_axis(nn.ConvTranspose2d(6, 6, 3)) == 0
    assert sampling.input_axis(nn.Conv1d(6, 6, 3, groups=2)) == 1
    assert sampling.input_axis(nn.Conv1d(6, 6, 3, groups=6)) is None
    assert sampling.input_axis(nn.ConvTranspose1d(6, 6, 3, groups=2)) is None


def test_a_sample_is_small_and_fixed_by_its_seed() -> None:
    net, images = conv_net(), torch.randn(2, 3, 12, 12)
    graph = analyse(net, images[:1])
    mask = without(graph, 0, 1)

    def weight(seed: int) -> Tensor:
        pruned = apply_mask(net, graph, mask)
        Reconstruction(net, graph, lambda network: network(images), seed=seed).apply(pruned, mask)
        return pruned[2].weight

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))


def test_a_network_that_loses_nothing_stays_as_it_is() -> None:
    net, images = conv_net(), torch.randn(4, 3, 8, 8)
    graph = analyse(net, images[:1])
    pruned, changed = reconstructed(net, graph, graph.dense_mask(), images)
    for old, new in zip(pruned.parameters(), changed.parameters(), strict=True):
        assert torch.equal(old, new)


def test_layers_that_cannot_be_compensated_stay_as_they_are(
    mixed: nn.Module, example: Tensor, make_mask: Callable[..., ChannelMask]
) -> None:
    graph = analyse(mixed, example)
    pruned, changed = reconstructed(mixed.eval(), graph, make_mask(graph, 0), example)
    new = dict(changed.named_parameters())
    moved = {name for name, old in pruned.named_parameters() if not torch.equal(old, new[name])}
    layers = ("head", "up", "grouped")  # not tied and depthwise ones
    assert moved == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("bias", [True, False])
def test_each_group_of_a_convolution_is_compensated_alone(*, bias: bool) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 1, groups=1, bias=False)
    net = nn.Sequential(first, nn.Identity(), nn.Conv2d(8, 6, 3, groups=2, bias=bias)).eval()
    with torch.no_grad():  # of the four channels of a group two tell the others
        first.weight[[2, 3, 6, 7]] = first.weight[[0, 1, 4, 5]] + first.weight[[1, 0, 5, 4]]
        first.weight[[3, 7]] -= 3.0 * first.weight[[0, 4]]
    images = torch.randn(16, 3, 6, 6)
    graph = analyse(net, images[:1])
    mask = without(graph, 0, 2, 3)
    pruned, changed = reconstructed(net, graph, mask, images)
    assert pruned[2].weight.shape == (6, 2, 3, 3)
    torch.testing.assert_close(changed(images), net(images), atol=1e-3, rtol=1e-3)


class Squaring(nn.Conv2d):
    """A convolution of something else than what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x * x, self.weight, self.bias)


def test_a_layer_with_a_forward_of_its_own_stays_as_it_is() -> None:
    net, images = conv_net(), torch.randn(4, 3, 8, 8)
    net[2] = Squaring(6, 4, 3)
    graph = analyse(net, images[:1])
    pruned, changed = reconstructed(net, graph, without(graph, 0, 1), images)
    assert torch.equal(pruned[2].weight, changed[2].weight)


@pytest.mark.parametrize("bias", [True, False])
def test_of_layers_that_read_much_rows_are_kept_and_tell_the_same(
    monkeypatch: pytest.MonkeyPatch, *, bias: bool
) -> None:
    net, images = conv_net(bias=bias), torch.randn(4, 3, 8, 8)
    graph = analyse(net, images[:1])
    mask = without(graph, 0, 1)
    pruned, by_products = reconstructed(net, graph, mask, images)
    monkeypatch.setattr(reconstruction, "MOST_INPUTS", 6 * 9 - 1)
    by_rows = reconstructed(net, graph, mask, images)[1]
    assert not torch.equal(pruned[2].weight, by_rows[2].weight)
    for one, other in zip(by_rows.parameters(), by_products.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_rows_that_are_kept_are_of_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MOST_ROWS", 100)
    kept = statistics.InputRows(seed=0)
    for batch in range(10):
        kept.add(torch.full((50, 2), float(batch)))
    found = kept.statistics("layer", centred=False).rows[:, 0]
    assert (len(found), len(found.unique())) == (100, 10)


def test_channels_that_are_always_zero_are_no_trouble() -> None:
    net, images = conv_net(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        net[0].bias.fill_(-1000.0)
    graph = analyse(net, images[:1])
    pruned, changed = reconstructed(net, graph, without(graph, 0, 1), images)
    assert torch.equal(pruned[2].weight, changed[2].weight)


def test_what_is_not_finite_is_one_clear_error() -> None:
    net, images = conv_net(), torch.full((4, 3, 8, 8), torch.inf)
    graph = analyse(net, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ModelError, match=r"what 2\.weight reads is not finite"):
        Reconstruction(net, graph, lambda network: network(images))


def test_the_precision_of_the_network_stays() -> None:
    net, images = conv_net().double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    graph = analyse(net, images[:1])
    pruned, changed = reconstructed(net, graph, without(graph, 0, 1), images)
    assert changed[2].weight.dtype == torch.float64
    assert not torch.equal(pruned[2].weight, changed[2].weight)


def error(net: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Return the mean squared difference of two networks' outputs."""
    with torch.no_grad():
        return float((net(images) - other(images)).square().mean())


@pytest.mark.parametrize("autocast", [False, True])
def test_inputs_that_hardly_vary_are_no_trouble(autocast: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        net[1].weight[0], net[1].bias[:] = 1e-4, 1.0
    images = torch.randn(64, 3, 8, 8)
    recalibrate_bn(net, [images])
    graph = analyse(net, images[:1])

    def run(network: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            network(images)

    mask = without(graph, 0, *range(8, 16))
    pruned = apply_mask(net, graph, mask)
    changed = copy.deepcopy(pruned)
    Reconstruction(net, graph, run).apply(changed, mask)
    for network in (pruned, changed):
        recalibrate_bn(network, [images])
    assert error(net, changed, images) < 0.5 * error(net, pruned, images)


class Block(nn.Module):
    """A residual block whose shortcut has neither bias nor norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.shortcut = nn.Linear(12, 8, bias=False)
        self.inner = nn.Linear(12, 8, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.shortcut(x) + self.norm(self.inner(x)))


@pytest.mark.usefixtures("exact")
def test_the_norm_of_another_branch_takes_up_nothing() -> None:
    torch.manual_seed(0)
    net, images = Block().eval(), torch.randn(300, 6)
    recalibrate_bn(net, [images])
    graph = analyse(net, images[:1])
    _, changed = reconstructed(net, graph, without(graph, 0, 0, 1, 2), images)
    inputs = net.stem(images).relu().detach()
    best = torch.linalg.lstsq(inputs[:, 3:], net.shortcut(inputs).detach()).solution
    torch.testing.assert_close(changed.shortcut.weight, best.T, atol=1e-4, rtol=1e-4)
    centred = inputs - inputs.mean(0)
    best = torch.linalg.lstsq(centred[:, 3:], net.inner(centred).detach()).solution
    torch.testing.assert_close(changed.inner.weight, best.T, atol=1e-4, rtol=1e-4)


class PreActivation(nn.Module):
    """A layer whose output a norm reads, and a sum too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Linear(6, 12), nn.Linear(12, 8, bias=False)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.stem(x).relu())
        return self.head(y + self.norm(y).relu())


@pytest.mark.usefixtures("exact")
def test_a_norm_beside_another_reader_takes_up_nothing() -> None:
    torch.manual_seed(0)
    net, images = PreActivation().eval(), torch.randn(300, 6)
    recalibrate_bn(net, [images])
    graph = analyse(net, images[:1])
    _, changed = reconstructed(net, graph, without(graph, 0, 0, 1, 2), images)
    inputs = net.stem(images).relu().detach()
    best = torch.linalg.lstsq(inputs[:, 3:], net.inner(inputs).detach()).solution
    torch.testing.assert_close(changed.inner.weight, best.T, atol=1e-4, rtol=1e-4)


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.code = nn.Linear(6, 12), nn.Linear(12, 8, bias=False)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        code = self.code(self.stem(x).relu()).relu()
        return self.head(F.linear(code, self.code.weight.t()).relu())


def test_a_weight_that_is_used_without_its_layer_stays_as_it_is() -> None:
    torch.manual_seed(0)
    net, images = Tied().eval(), torch.randn(300, 6)
    graph = analyse(net, images[:1])
    pruned, changed = reconstructed(net, graph, without(graph, 0, 0, 1, 2), images)
    assert torch.equal(pruned.code.weight, changed.code.weight)
    means = {}
    with layer_inputs(net, graph, lambda read: means.update({read.op.param: read.units})):
        net(images)
    np.testing.assert_array_equal(means["code.weight"], graph.param_units["code.weight"][1])


def test_a_layer_that_is_also_used_without_being_called_stays_as_it_is() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.out = nn.Linear(8, 32), nn.Linear(32, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            both = self.two(x.relu()).tanh() + ((-x).relu() @ self.two.weight.t()).tanh()
            result: Tensor = self.out(both)
            return result

    torch.manual_seed(0)
    net, images = Twice().eval(), torch.randn(64, 8)
    graph = analyse(net, images[:2])
    pruned, changed = reconstructed(net, graph, without(graph, 0, *range(16)), images)
    assert torch.equal(pruned.two.weight, changed.two.weight)
    pruned, changed = reconstructed(net, graph, without(graph, 1, 0, 3), images)
    assert not torch.equal(pruned.out.weight, changed.out.weight)


class Given(nn.Module):
    """Gives the weights of its layers to a function, as Swin does, and as BEiT."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.own = nn.Linear(6, 12), nn.Linear(12, 8)
        self.bare, self.bias = nn.Linear(8, 3, bias=False), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.stem(x).relu(), self.own.weight, self.own.bias).relu()
        return F.linear(x, self.bare.weight, bias=self.bias)


def test_a_layer_whose_weight_is_given_to_linear_is_compensated_as_one_that_is_called() -> None:
    torch.manual_seed(0)
    net, images = Given().eval(), torch.randn(300, 6)
    called = nn.Sequential(net.stem, nn.ReLU(), net.own, nn.ReLU(), net.bare)
    changed = []
    for each in (net, called):
        graph = analyse(each, images[:1])
        keep = np.ones(graph.num_units, dtype=np.bool_)
        free = [group for group in graph.groups if group.frozen is None]
        for group, number in zip(free, (5, 2), strict=True):
            keep[group.units[:number]] = False
        changed.append(reconstructed(each, graph, graph.mask(keep), images)[1])
    given, usual = changed
    for own, other in zip((given.own, given.bare), (usual[2], usual[4]), strict=True):
        torch.testing.assert_close(own.weight, other.weight)
    torch.testing.assert_close(given.own.bias, usual[2].bias)


def test_layers_are_called_in_place_of_functions_once_and_give_the_same() -> None:
    net, images, calls = Given(), torch.randn(4, 6), []
    for layer in (net.stem, net.own, net.bare):
        layer.register_forward_pre_hook(lambda layer, _: calls.append(layer))
    before = net(images)
    assert calls == [net.stem]
    with LinearCalls(net) as given:
        torch.testing.assert_close(net(images), before, rtol=0, atol=1e-6)
    assert given.needed
    assert calls == [net.stem, net.stem, net.own, net.bare]
    net(images)
    assert len(calls) == 5
    assert len(net.stem._forward_pre_hooks) == 1


@pytest.mark.usefixtures("exact")
def test_what_changes_in_place_before_a_norm_is_not_taken_up() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8, bias=False), nn.ReLU(inplace=True),
        nn.BatchNorm1d(8), nn.Linear(8, 3),
    ).eval()  # fmt: skip
    images = torch.randn(300, 6)
    graph = analyse(net, images[:1])
    _, changed = reconstructed(net, graph, without(graph, 0, 0, 1, 2), images)
    inputs = net[:2](images).detach()
    best = torch.linalg.lstsq(inputs[:, 3:], net[2](inputs).detach()).solution
    torch.testing.assert_close(changed[2].weight, best.T, atol=1e-4, rtol=1e-4)


class SharedBias(nn.Module):
    """Two layers with one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.one, self.other = nn.Linear(12, 8), nn.Linear(12, 8)
        self.other.bias = self.one.bias
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.one(x).relu() + self.other(x).relu())


def test_a_bias_of_two_layers_is_left_alone() -> None:
    torch.manual_seed(0)
    net, images = SharedBias().eval(), torch.randn(300, 6)
    graph = analyse(net, images[:1])
    pruned, changed = reconstructed(net, graph, without(graph, 0, 0, 1, 2), images)
    assert torch.equal(pruned.one.bias, changed.one.bias)
    assert error(net, changed, images) < 0.5 * error(net, pruned, images)


class OneByOne(nn.Module):
    """Runs layers on single images and single vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        means = [self.other(self.one(image).relu()).mean((1, 2)) for image in x]
        return torch.stack([self.last(self.first(mean).relu()) for mean in means])


def test_inputs_without_a_batch_axis() -> None:
    torch.manual_seed(0)
    net, images = OneByOne().eval(), torch.randn(16, 8, 8, 8)
    graph = analyse(net, images[:1])
    pruned, changed = reconstructed(net, graph, without(graph, 0, 0, 1), images)
    assert error(net, changed, images) < error(net, pruned, images)


def test_applying_it_again_changes_nothing() -> None:
    net, images = conv_net(), torch.randn(4, 3, 8, 8)
    graph = analyse(net, images[:1])
    mask = without(graph, 0, 1)
    measured = Reconstruction(net, graph, lambda network: network(images))
    once = apply_mask(net, graph, mask)
    measured.apply(once, mask)
    twice = copy.deepcopy(once)
    measured.apply(twice, mask)
    for old, new in zip(once.parameters(), twice.parameters(), strict=True):
        assert torch.equal(old, new)


def test_the_network_of_another_mask_is_one_clear_error() -> None:
    net, images = conv_net(), torch.randn(4, 3, 8, 8)
    graph = analyse(net, images[:1])
    measured = Reconstruction(net, graph, lambda network: network(images))
    with pytest.raises(MaskError, match=r"2\.weight is \(4, 5, 3, 3\), not of 144 values"):
        measured.apply(apply_mask(net, graph, without(graph, 0, 1)), without(graph, 0, 1, 2))


def test_a_large_batch_is_sampled_at_as_many_places_as_small_ones() -> None:
    net, image = conv_net(), torch.randn(1, 3, 12, 12)
    graph = analyse(net, image)
    found, _ = sampled(net, graph, image.expand(64, -1, -1, -1))
    first, second = found["2.weight"].unflatten(0, (64, -1))[[0, 32]]
    assert not torch.equal(first, second)
