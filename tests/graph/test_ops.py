"""Ops between two convolutions that leave the channels between them free."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.graph import analyse
from prunegraph.graph.surgery import apply_mask, zero_mask
from prunegraph.testing import assert_masked_equals_pruned

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

Op = Callable[[Tensor], Tensor]


def resampled(x: Tensor) -> Tensor:
    theta = torch.eye(2, 3)[None].expand(len(x), 2, 3).to(x)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def clipped(x: Tensor) -> Tensor:
    y = x.clone()
    y[y < 0.1] = 0.0
    return y


OVER_SPACE: dict[str, Op] = {
    "std": lambda x: x / (x.std((2, 3), keepdim=True) + 1),
    "var": lambda x: x - x.var((2, 3), keepdim=True),
    "var_mean": lambda x: torch.var_mean(x, (2, 3), keepdim=True)[0] * x,
    "logsumexp": lambda x: x + torch.logsumexp(x, (2, 3), keepdim=True),
    "prod": lambda x: x * x.prod(3, keepdim=True),
    "any": lambda x: x * (x > 0).any(3, keepdim=True),
    "median": lambda x: x * x.median(3, keepdim=True)[0],
    "kthvalue": lambda x: x * x.kthvalue(3, 3)[0].unsqueeze(-1),
    "cumsum": lambda x: x.cumsum(3),
    "cummax": lambda x: x.cummax(2)[0],
    "sort": lambda x: x.sort(3)[0],
    "sort_stable": lambda x: x.sort(dim=3, stable=True)[0],
    "topk": lambda x: x.flatten(2).topk(4, 2)[0].unsqueeze(-1),
    "grid_sample": resampled,
    "masked_write": clipped,
    "hardshrink": F.hardshrink,
    "remainder": lambda x: torch.remainder(x, 2.0),
    "logical_and": lambda x: x * ((x > 0) & (x < 1)),
    "ceil": torch.ceil,
}

OVER_CHANNELS: dict[str, Op] = {
    "max": lambda x: x * x.max(1, keepdim=True)[0].sigmoid(),
    "amax": lambda x: x * torch.amax(x, dim=1, keepdim=True).sigmoid(),
    "std": lambda x: x / (x.std(1, keepdim=True, correction=0) + 1),
    "cbam": lambda x: x * (x.amax(1, keepdim=True) + x.mean(1, keepdim=True)).sigmoid(),
}


def interleaved(x: Tensor) -> Tensor:
    out = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    out[:, :, ::2, ::2] = x
    out[:, :, 1::2, 1::2] = x * 2
    return out


def shifted(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :, :-1] = x[:, :, 1:]
    out[:, :, -1:] = x[:, :, :1]
    return out


def padded_round(x: Tensor) -> Tensor:
    return F.pad(x, (1, 2, 2, 1), mode="circular")


def custom_convolution(x: Tensor) -> Tensor:
    return F.fold(F.unfold(x, 3, padding=1).relu(), x.shape[-2:], 3, padding=1)


def channels_last(op: Op) -> Op:
    """Apply what works on space to images whose channels lie along the last axis of it."""
    return lambda x: op(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


FREE: dict[str, Op] = {
    "pooled_1": channels_last(lambda x: F.max_pool2d(x, (3, 1), (2, 1), (1, 0))),
    "averaged_1": channels_last(lambda x: F.avg_pool2d(x, (2, 1))),
    "adapted_1": channels_last(lambda x: F.adaptive_avg_pool2d(x, (4, None))),
    "resized_1": channels_last(lambda x: F.interpolate(x, scale_factor=(2.0, 1.0))),
    "normalize": lambda x: F.normalize(x, dim=1),
    "normalize_1": lambda x: F.normalize(x, p=1, dim=1),
    "largest": lambda x: F.normalize(x, p=float("inf"), dim=1),
    "expanded": lambda x: x * x.sum(1, keepdim=True).sigmoid().expand_as(x),
    "any": lambda x: x * (x > 0).any(1, keepdim=True),
    "circular": padded_round,
    "interleaved": interleaved,
    "shifted": shifted,
    "unfold": custom_convolution,
    "over_all": lambda x: x / (1 + x.std()),
    "var_mean_of_channels": lambda x: x - torch.var_mean(x, 1, correction=0, keepdim=True)[1],
}
"""What sums over channels, or moves them about in space."""


class Between(nn.Module):
    """Convolution, op, convolution, classifier."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.head, self.op = nn.Linear(12, 5), op

    def forward(self, x: Tensor) -> Tensor:
        between = self.op(self.one(x) * 0.5)
        out: Tensor = self.head(self.two(between).relu().mean((2, 3)))
        return out


def check_free(net: nn.Module, classes: int = 16) -> None:
    graph = analyse(net, EXAMPLE)
    (group,) = [group for group in graph.groups if group.name == "one"]
    assert group.frozen is None
    assert group.units.size == classes
    for kept in (slice(0, 3), slice(1, None, 2), slice(-2, None)):
        keep = np.ones(graph.num_units, dtype=bool)
        keep[group.units] = False
        keep[group.units[kept]] = True
        assert_masked_equals_pruned(net, graph, graph.mask(keep), EXAMPLE)


@pytest.mark.parametrize("name", OVER_SPACE)
def test_what_works_on_space_leaves_channels_free(name: str) -> None:
    check_free(Between(OVER_SPACE[name]))


@pytest.mark.parametrize("name", FREE)
def test_sums_and_writes_into_slices_leave_channels_free(name: str) -> None:
    check_free(Between(FREE[name]))


@pytest.mark.parametrize("name", OVER_CHANNELS)
def test_what_is_taken_over_channels_is_taken_over_those_that_are_kept(name: str) -> None:
    check_free(Between(OVER_CHANNELS[name]))


class Halves(nn.Module):
    """Splits by sizes that are attributes, as YOLO's blocks do; has another number of that size."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)
        self.c, self.num_classes = 8, 8

    def forward(self, x: Tensor) -> Tensor:
        values, gates = self.one(x).split((self.c, self.c), 1)
        out: Tensor = self.two(torch.cat([values * gates.sigmoid(), gates], 1))
        return out


def test_a_split_by_equal_sizes_ties_its_parts() -> None:
    check_free(Halves(), classes=8)


def test_an_attribute_that_the_forward_does_not_read_keeps_its_value() -> None:
    net = Halves()
    graph = analyse(net, EXAMPLE)
    keep = graph.dense_mask().keep.copy()
    keep[np.flatnonzero(graph.free)[:3]] = False
    pruned = apply_mask(net, graph, graph.mask(keep))
    assert (pruned.c, pruned.num_classes) == (5, 8)


def test_every_second_channel_goes_with_its_neighbour() -> None:
    check_free(Between(lambda x: torch.cat([x[:, ::2] * 2, x[:, 1::2]], 1)), classes=8)


class Positions(nn.Module):
    """A table of positions longer than the example, and a cache that the first call fills."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 4)
        self.positions = nn.Parameter(torch.randn(1, 30, 16))
        self.scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x.flatten(1, 2)) + self.positions[:, : x.shape[1] * x.shape[2]]
        if self.scale is None:
            self.scale = torch.ones(y.shape[-1])
        out: Tensor = self.two((y * self.scale).relu())
        return out


def test_a_table_that_is_read_in_part_and_a_cache_leave_channels_free() -> None:
    net = Positions()
    check_free(net)
    assert net.scale is None


class Noisy(nn.Module):
    """Draws numbers, as a variational autoencoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(x).relu())
        return y + torch.randn_like(y)


def test_random_numbers_of_a_forward_hide_nothing_and_lock_nothing() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    graph = analyse(Noisy(), EXAMPLE)
    assert {group.name for group in graph.groups if group.frozen is None} == {"one"}
    torch.manual_seed(3)
    assert torch.equal(before, torch.get_rng_state())


class OwnLayerNorm(nn.Module):
    """As ConvNeXt's authors write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))
        self.normalized_shape = (width,)

    def forward(self, x: Tensor) -> Tensor:
        last = x.permute(0, 2, 3, 1)
        out = F.layer_norm(last, self.normalized_shape, self.weight, self.bias, 1e-6)
        return out.permute(0, 3, 1, 2)


def test_a_layer_norm_of_one_s_own_is_one_over_the_kept_channels() -> None:
    net = Between(torch.relu)
    net.op = OwnLayerNorm(16)
    check_free(net)


def test_autocast_inside_a_forward_hides_no_weights() -> None:
    class Mixed(Between):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    graph = analyse(Mixed(torch.relu), EXAMPLE)
    assert {group.name for group in graph.groups if group.frozen is None} == {"one", "two"}


def test_a_masked_encoder_takes_no_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    net = nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(layer, 1), nn.Linear(16, 4)).eval()
    example = torch.randn(2, 5, 8)
    graph = analyse(net, example)
    keep = graph.dense_mask().keep.copy()
    keep[np.flatnonzero(graph.free)[::3]] = False
    mask = graph.mask(keep)
    with torch.no_grad():
        masked, pruned = zero_mask(net, graph, mask)(example), apply_mask(net, graph, mask)(example)
    torch.testing.assert_close(masked, pruned)


def test_a_group_of_which_nothing_can_go_says_so() -> None:
    net = Between(lambda x: torch.cat([x[:, ::2] * 2, x[:, 1::2]], 1))
    net.one, net.two = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 12, 1)
    graph = analyse(net, EXAMPLE)
    reasons = {group.name: group.frozen for group in graph.groups}
    assert reasons["one"] == "all its channels leave together, and one must stay"
    assert graph.free.sum() == 12


class Weighted(nn.Module):
    """Attention that returns weights, with as many heads as each is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.attention = nn.Linear(8, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.two = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.one(x)
        mixed, weights = self.attention(y, y, y)
        return self.two(y + mixed), weights


def test_heads_can_go_where_there_are_as_many_as_each_is_wide() -> None:
    net, example = Weighted(), torch.randn(2, 5, 8)
    graph = analyse(net, example)
    sizes = {group.name: group.units.size for group in graph.groups if group.frozen is None}
    assert sizes == {"one": 16, "attention": 4}
    keep = graph.dense_mask().keep.copy()
    keep[np.flatnonzero(graph.free)[::3]] = False
    assert_masked_equals_pruned(net, graph, graph.mask(keep), example)


class Weights(nn.Module):
    """Two linear layers whose weights are used as an op says."""

    def __init__(self, op: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.op = nn.Linear(8, 16), nn.Linear(12, 5), op
        self.weight = nn.Parameter(torch.randn(12, 16))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.op(self.one(x.flatten(1, 2)).tanh(), self.weight).tanh())
        return out


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "einsum": lambda x, w: torch.einsum("bnc,dc->bnd", x, w),
    "einsum_from_left": lambda x, w: torch.einsum("dc,bcn->bdn", w, x.mT).mT,
    "left": lambda x, w: (w @ x.mT).mT,
    "scaled": lambda x, w: F.linear(x, 0.5 * w),
    "divided": lambda x, w: F.conv1d(x.mT, (w / 3)[..., None]).mT,
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_weight_that_is_used_without_a_layer_is_followed(name: str) -> None:
    net = Weights(PRODUCTS[name])
    check_free(net)
    groups = {group.name: group for group in analyse(net, EXAMPLE).groups}
    assert groups["weight"].frozen is None
    assert groups["weight"].units.size == 12


class Picked(nn.Module):
    """Action values of which each sample's action is picked."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.values = nn.Linear(8, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        out: Tensor = self.values(self.one(x).relu()).gather(1, action)
        return out


def test_channels_that_are_picked_by_an_input_all_stay() -> None:
    graph = analyse(Picked(), (torch.randn(2, 8), torch.zeros(2, 1, dtype=torch.long)))
    reasons = {group.name: group.frozen for group in graph.groups}
    assert reasons["one"] is None
    assert reasons["values"] == "channels are picked by computed indices"


class Gates(nn.Module):
    """Takes means and maxima over channels of two widths in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x = self.two(x * (x.mean(1, keepdim=True) + x.amax(1, keepdim=True)).sigmoid())
        out: Tensor = self.head((x * x.amax(1, keepdim=True).sigmoid()).mean((2, 3)))
        return out


def test_means_over_channels_of_two_widths_are_told_apart() -> None:
    net = Gates()
    check_free(net)
    assert {group.name for group in analyse(net, EXAMPLE).groups if group.frozen is None} == {
        "one",
        "two",
    }


class OwnGroupNorm(nn.Module):
    """A group norm with weights of its own."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.rand(16)), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.weight, self.bias)


@pytest.mark.parametrize(("groups", "classes"), [(1, 16), (8, 8)])
def test_a_group_norm_of_one_s_own_keeps_its_groups(groups: int, classes: int) -> None:
    check_free(Between(OwnGroupNorm(groups)), classes)


class InTraining(nn.Module):
    """Reads its width in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.width = nn.Linear(8, 16), nn.Linear(16, 4), 16

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        out: Tensor = self.two(y.view(-1, self.width) if self.training else y.flatten(0, -2))
        return out


def test_an_attribute_that_training_alone_reads_follows() -> None:
    net = InTraining()
    graph = analyse(net, EXAMPLE)
    keep = graph.dense_mask().keep.copy()
    keep[np.flatnonzero(graph.free)[:3]] = False
    pruned = apply_mask(net, graph, graph.mask(keep))
    assert pruned.train()(EXAMPLE).shape == (48, 4)


class Unchanging(dict[str, int]):
    """Refuses changes, as the configurations of diffusers do."""

    def update(self, *_: object) -> None:
        raise TypeError


class Careless(nn.Module):
    """Draws random numbers, makes a layer late, and keeps results."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 4)
        self.late: nn.Module | None = None
        self.results: dict[str, Tensor] = {}
        self.options = Unchanging(width=16)

    def forward(self, x: Tensor) -> Tensor:
        if self.late is None:
            self.late = nn.Identity()
            self.register_buffer("shift", torch.rand(1))
        out: Tensor = self.late(self.two(self.one(x).relu() * (0.5 + random.random())))
        self.results["out"] = out + np.random.rand()  # noqa: NPY002 - a careless one
        return out


def test_an_analysis_leaves_random_numbers_and_what_a_forward_keeps_as_they_were() -> None:
    net = Careless()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    analyse(net, EXAMPLE)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert net.late is None
    assert not net.results
    assert net.options == {"width": 16}
    assert list(net.state_dict()) == ["one.weight", "one.bias", "two.weight", "two.bias"]
