import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunegraph.core.budget import Cost
from prunegraph.core.masks import ChannelMask
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.channel_gather import ChannelGather
from prunegraph.testing import assert_masked_equals_pruned, count_cost, largest_difference
from prunegraph.testing.oracle import TOLERANCE


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.shortcut = ChannelGather(torch.tensor([-1, -1, 0, 1, 2, 3, 4, 5, -1, -1]))
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.conv(x) + self.shortcut(x[:, :, ::2, ::2]))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Small()
    nn.init.normal_(net.bn.bias)
    nn.init.normal_(net.bn.running_mean)
    return net


@pytest.fixture
def example() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def graph(model: nn.Module, example: Tensor) -> StructureGraph:
    return analyse(model, example)


@pytest.fixture
def mask(graph: StructureGraph) -> ChannelMask:
    keep = np.ones(graph.num_units, dtype=bool)
    for name in ("stem.weight", "conv.weight"):
        keep[graph.param_units[name][0][[0, 3]]] = False
    return graph.mask(keep)


def with_swapped(graph: StructureGraph, name: str, axis: int) -> StructureGraph:
    """Return the graph with the classes of positions 0 (removed) and 1 (kept) swapped."""
    classes = {param: dict(axes) for param, axes in graph.param_units.items()}
    swapped = classes[name][axis].copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    classes[name][axis] = swapped
    return dataclasses.replace(graph, param_units=classes)


def test_a_right_graph_passes(
    model: nn.Module, graph: StructureGraph, mask: ChannelMask, example: Tensor
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert assert_masked_equals_pruned(model, graph, mask, example) < 1e-12
    assert assert_masked_equals_pruned(model, graph, mask, example, dtype=torch.float32) < 1e-5
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert model.stem.weight.dtype is torch.float32


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("stem.weight", 0),
        ("stem.bias", 0),
        ("bn.weight", 0),
        ("bn.bias", 0),
        ("bn.running_mean", 0),
        ("conv.weight", 0),
        ("conv.weight", 1),
        ("conv.bias", 0),
        ("head.weight", 1),
    ],
)
def test_one_wrong_index_fails(
    model: nn.Module,
    graph: StructureGraph,
    mask: ChannelMask,
    example: Tensor,
    name: str,
    axis: int,
) -> None:
    with pytest.raises(AssertionError, match="masked and pruned outputs differ"):
        assert_masked_equals_pruned(model, with_swapped(graph, name, axis), mask, example)


@pytest.mark.parametrize("side", [0, 1])
def test_a_wrong_gather_fails(
    model: nn.Module, graph: StructureGraph, mask: ChannelMask, example: Tensor, side: int
) -> None:
    ends = [classes.copy() for classes in graph.gathers["shortcut"]]
    ends[side] = np.roll(ends[side], 1)
    broken = dataclasses.replace(graph, gathers={"shortcut": tuple(ends)})
    with pytest.raises(AssertionError, match="masked and pruned outputs differ"):
        assert_masked_equals_pruned(model, broken, mask, example)


def test_a_wrong_cost_fails(
    model: nn.Module, graph: StructureGraph, mask: ChannelMask, example: Tensor
) -> None:
    class OneMore(StructureGraph):
        def cost(self, keep: ChannelMask | np.ndarray) -> Cost:
            right = super().cost(keep)
            return Cost(macs=right.macs + 1, params=right.params)

    values = {f.name: getattr(graph, f.name) for f in dataclasses.fields(graph)}
    with pytest.raises(AssertionError, match="the graph says Cost"):
        assert_masked_equals_pruned(model, OneMore(**values), mask, example)


def test_outputs_that_ignore_the_inputs_prove_nothing(
    model: nn.Module, graph: StructureGraph, mask: ChannelMask, example: Tensor
) -> None:
    nn.init.zeros_(model.head.weight)
    with pytest.raises(AssertionError, match="nothing is compared"):
        assert_masked_equals_pruned(model, graph, mask, example)


def test_outputs_that_hardly_move_prove_nothing(
    model: nn.Module, graph: StructureGraph, mask: ChannelMask, example: Tensor
) -> None:
    with torch.no_grad():
        model.head.weight.mul_(1e-12)
        model.head.bias.fill_(1.0)
    with pytest.raises(AssertionError, match="nothing is compared"):
        assert_masked_equals_pruned(model, graph, mask, example)


def test_a_large_bias_hides_nothing(
    model: nn.Module, graph: StructureGraph, mask: ChannelMask, example: Tensor
) -> None:
    with torch.no_grad():
        model.head.bias.fill_(1e6)
    broken = with_swapped(graph, "conv.weight", 1)
    assert assert_masked_equals_pruned(model, graph, mask, example) < 1e-8
    with pytest.raises(AssertionError, match="masked and pruned outputs differ"):
        assert_masked_equals_pruned(model, broken, mask, example)


def test_costs_are_counted_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 36, 5))
    expected = Cost(macs=36 * 4 * 3 * 9 + 144 * 5, params=4 * 3 * 9 + 144 * 5 + 5)
    assert count_cost(model, torch.zeros(1, 3, 8, 8)) == expected


def test_attention_is_counted_as_its_matrix_products() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.zeros(1, 5, 8)
    projections, products = 4 * 5 * 8 * 8, 2 * 5 * 5 * 8
    assert count_cost(attention, (x, x, x)).macs == projections + products


def test_attention_of_a_backend_that_the_forward_asks_for_is_counted() -> None:
    class Flash(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(x, x, x)

    assert count_cost(Flash(), torch.randn(1, 2, 5, 8)).macs == 2 * 2 * 5 * 5 * 8


def test_recurrent_layers_and_products_with_vectors_are_counted() -> None:
    lstm = nn.LSTM(8, 6, batch_first=True)
    assert count_cost(lstm, torch.randn(2, 5, 8)).macs == 2 * 5 * 4 * 6 * (8 + 6)

    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.mv(x, self.weight) + torch.dot(self.weight, x[0])

    assert count_cost(Vector(), torch.randn(5, 8)).macs == 5 * 8 + 8


def test_complex_weights_stay_complex() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
            self.turn = nn.Parameter(torch.randn(4, dtype=torch.cfloat))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            turned = torch.view_as_complex(x.float().view(-1, 4, 2)) * self.turn
            out: Tensor = self.last(x + turned.abs().repeat(1, 2).to(x))
            return out

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3), Complex()).eval()
    x = torch.randn(2, 3)
    graph = analyse(model, x)
    keep = graph.frozen | (np.arange(graph.num_units) % 3 > 0)
    assert not keep.all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that the imaginary part is discarded
        assert assert_masked_equals_pruned(model, graph, graph.mask(keep), x) < TOLERANCE


def test_differences_are_relative_and_nan_is_one() -> None:
    one, other = torch.tensor([4.0, 1.0]), torch.tensor([4.0, 2.0])
    assert largest_difference([one], [other]) == 0.25
    assert largest_difference([one], [other], scale=2.0) == 0.5
    assert math.isnan(largest_difference([one], [other * torch.nan]))
    with pytest.raises(AssertionError, match="shapes"):
        largest_difference([one], [other[:1]])


def test_a_view_of_a_parameter_may_be_the_argument_of_a_module() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.mix = nn.Parameter(torch.randn(1, 4)), nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)
            self.head.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.mix(self.token.expand(len(x), -1)))

    model = Token()
    assert count_cost(model, torch.randn(1, 4)) == Cost(macs=16 + 8, params=4 + 20 + 10)
    wanting = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert wanting == {"token", "mix.weight", "mix.bias", "head.bias"}
