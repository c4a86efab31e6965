"""What the trial must find: mistakes that one random mask, or untrained weights, do not show."""

import copy
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegraph.core.errors import ModelError
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.graph import Group
from prunegraph.graph.proof.subjects import awake
from prunegraph.graph.proof.trial import _parts
from prunegraph.testing import assert_masked_equals_pruned
from prunegraph.testing.structure_check import check_structure

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions with something between, and a classifier."""

    def __init__(self, between: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.three, self.norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.alpha, self.head = nn.Parameter(torch.ones(())), nn.Linear(16, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self, self.one(x).relu()).mean((2, 3)))


def wrong_mean(net: Net, x: Tensor) -> Tensor:
    """A sum divided by the width: pruned and masked networks differ."""
    return x * (x.sum(1, keepdim=True) / x.shape[1])


def zero_head(net: Net) -> nn.Parameter:
    return net.head.weight


def zero_norm(net: Net) -> nn.Parameter:
    return net.norm.weight


def zero_scale(net: Net) -> nn.Parameter:
    return net.alpha


def without_last(graph: StructureGraph) -> np.ndarray:
    keep = np.ones(graph.num_units, dtype=bool)
    for group in graph.groups:
        if group.frozen is None:
            keep[group.units[len(group.units) // 2 :]] = False
    return keep


@pytest.mark.parametrize("silent", [zero_head, zero_norm, zero_scale])
@pytest.mark.parametrize("value", [0.0, 1e-6])
def test_untrained_weights_hide_nothing(
    silent: Callable[[Net], nn.Parameter], value: float
) -> None:
    net = Net(lambda net, x: x + net.alpha * net.norm(net.three(wrong_mean(net, net.two(x)))))
    nn.init.constant_(silent(net), value)
    graph = analyse(net, EXAMPLE)
    assert torch.equal(silent(net), torch.full_like(silent(net), value))
    nn.init.normal_(silent(net))  # training
    assert_masked_equals_pruned(net, graph, graph.mask(without_last(graph)), EXAMPLE)
    assert "two" not in graph.group_widths(graph.dense_mask())


def select_last(net: Net, x: Tensor) -> Tensor:
    return net.two(x) * (1 + x[:, -1].tanh().unsqueeze(1))


def roll(net: Net, x: Tensor) -> Tensor:
    return net.two(x) + x.roll(1, 1)


@pytest.mark.parametrize("between", [select_last, roll])
def test_a_channel_that_the_forward_names_stays(between: Callable[[Net, Tensor], Tensor]) -> None:
    net = Net(between)
    try:
        graph = analyse(net, EXAMPLE)
    except ModelError as error:
        assert "computes something else" in str(error)
        return
    assert_masked_equals_pruned(net, graph, graph.mask(without_last(graph)), EXAMPLE)


def test_each_class_is_removed_once_and_sizes_of_neighbours_differ() -> None:
    groups = [
        Group(name="", units=np.arange(8) + 8 * i, members=(), frozen=None) for i in range(20)
    ]
    for seed in range(10):
        parts = _parts(groups, np.random.default_rng(seed))
        for group, (first, second, *_) in zip(groups, parts, strict=True):
            assert sorted([*first, *second]) == group.units.tolist()
        sizes = [len(first) for first, *_ in parts]
        assert all(a != b for a, b in itertools.pairwise(sizes))


class Distant(nn.Module):
    """A stream takes the shape of an earlier one."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(10, width), nn.Linear(width, 5)
        self.inner = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x).relu()
        out: Tensor = self.last(self.inner(first).view_as(first))
        return out


@pytest.mark.parametrize(("width", "layers"), [(2, 2), (3, 2), (4, 3), (8, 5), (16, 9)])
def test_sizes_of_groups_that_are_far_apart_differ_too(width: int, layers: int) -> None:
    torch.manual_seed(0)
    found = check_structure(Distant(width, layers).eval(), torch.randn(4, 10), seed=0)
    assert found.failures == []


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_minimum_of_a_small_group_stays(size: int) -> None:
    group = Group(name="", units=np.arange(size), members=(), frozen=None)
    for part in _parts([group], np.random.default_rng(0))[0]:
        assert len(part) <= size - 1


def roll_a_quarter(x: Tensor) -> Tensor:
    share = x.shape[1] // 4
    return torch.cat([x[:, :share].roll(1, 2), x[:, share:]], 1)


def thirds(x: Tensor) -> Tensor:
    return torch.cat([part * i for i, part in enumerate(x.tensor_split(3, 1), start=1)], 1)


@pytest.mark.parametrize("width", [8, 12, 16, 18, 30, 32])
@pytest.mark.parametrize("between", [roll_a_quarter, thirds])
def test_channels_of_which_a_share_is_treated_otherwise_stay_or_are_tied(
    between: Callable[[Tensor], Tensor], width: int
) -> None:
    net = nn.Sequential(nn.Conv2d(3, width, 3), Between(between), nn.Conv2d(width, 6, 3))
    try:
        graph = analyse(net, EXAMPLE)
    except ModelError as error:
        assert "nothing to prune" in str(error)
        return
    assert between is thirds and width % 3 == 0
    assert_masked_equals_pruned(net, graph, graph.mask(without_last(graph)), EXAMPLE)


def test_two_channels_stay_where_the_forward_squeezes() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), Between(torch.squeeze), nn.Linear(8, 6)
    ).append(nn.Linear(6, 2))
    graph = analyse(net, EXAMPLE)
    assert {group.name: group.min_keep for group in graph.groups if group.frozen is None} == {
        "0": 2,
        "3": 1,
    }


def test_heads_whose_number_agrees_with_the_stream_by_chance_take_it_along() -> None:
    net = nn.Sequential(nn.Linear(6, 32), Attention(32, 4), nn.Linear(32, 2))
    example = torch.randn(2, 5, 6)
    graph = analyse(net, example)
    free = [group for group in graph.groups if group.frozen is None]
    assert [group.units.size for group in free] == [4]
    keep = np.ones(graph.num_units, dtype=bool)
    keep[free[0].units[1:3]] = False
    assert_masked_equals_pruned(net, graph, graph.mask(keep), example)


class Between(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Attention(nn.Module):
    """Attention as minGPT and early vision transformers write it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        parts = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(-1)
        out: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))
        return x + out


class Strict(nn.Module):
    """Its forward does not follow where a silent weight is drawn anew."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 2)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if bool(self.gate != 0):
            raise ValueError
        return self.two(self.one(x).relu())


def test_trials_fall_back_to_the_model_where_no_weight_may_change() -> None:
    model, x = Strict().eval(), torch.randn(2, 3)
    assert awake(model) is not model
    graph = analyse(model, x)
    assert [len(group.units) for group in graph.groups if group.frozen is None] == [8]


def test_nothing_is_copied_where_nothing_is_silent() -> None:
    model = nn.Linear(3, 2)
    assert awake(model) is model


class Even(nn.Module):
    """Attention over regions that are alike before training, scaled by a width that is a size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.regions = nn.Conv2d(16, 5, 1)
        self.query, self.key, self.value = (nn.Conv2d(16, 8, 1) for _ in range(3))
        self.out, self.width = nn.Conv2d(8, 4, 1), 8

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        shares = self.regions(x).flatten(2).softmax(-1)
        regions = (shares @ x.flatten(2).transpose(1, 2)).transpose(1, 2).unsqueeze(3)
        query = self.query(x).view(len(x), self.width, -1).transpose(1, 2)
        key, value = (f(regions).view(len(x), self.width, -1) for f in (self.key, self.value))
        mixed = (query @ key * self.width**-0.5).softmax(-1) @ value.transpose(1, 2)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(len(x), self.width, *x.shape[2:]))
        return out


def test_a_scale_that_hardly_shows_before_training_is_found() -> None:
    torch.manual_seed(0)
    model, x = Even().eval(), torch.randn(2, 3, 24, 24)
    graph = analyse(model, x)
    with torch.no_grad():  # as training may leave it
        for weight in (model.regions.weight, model.query.weight, model.key.weight):
            weight.mul_(8.0)
    keep = np.ones(graph.num_units, dtype=bool)
    for group in graph.groups:
        if group.frozen is None:
            keep[group.units[::2]] = False
    assert_masked_equals_pruned(model, graph, graph.mask(keep), x)


class Narrow(nn.Module):
    """Attention of one head whose scale follows its width, in a stream of so few channels."""

    def __init__(self, channels: int, width: int = 4) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(3, channels), nn.LayerNorm(channels)
        self.query, self.key, self.value = (nn.Linear(channels, width) for _ in range(3))
        self.out, self.last = nn.Linear(width, channels), nn.LayerNorm(channels)
        self.head, self.width = nn.Linear(channels, 5), width

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(x)
        scores = self.query(y) @ self.key(y).transpose(-2, -1) * self.width**-0.5
        return self.head(self.last(x + self.out(scores.softmax(-1) @ self.value(y))))


def assert_queries_are_right(model: nn.Module, example: Tensor) -> None:
    """Assert that the queries are left whole, or can be cut to one."""
    graph = analyse(model, example)
    (group,) = [each for each in graph.groups if each.name == "query"]
    if group.frozen is None:
        keep = np.ones(graph.num_units, dtype=bool)
        keep[group.units[1:]] = False
        assert_masked_equals_pruned(model, graph, graph.mask(keep), example)


@pytest.mark.parametrize("channels", [2, 3, 4, 8])
def test_a_stream_so_narrow_that_norms_hide_the_rest_hides_nothing(channels: int) -> None:
    torch.manual_seed(0)
    model, example = Narrow(channels).eval(), torch.randn(2, 6, 3)
    assert_queries_are_right(model, example)


class Neck(nn.Module):
    """Attention whose scale follows its width, read by a normalised neck of so few channels."""

    def __init__(self, channels: int, width: int = 4) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(3, width) for _ in range(3))
        self.neck, self.norm = nn.Linear(width, channels), nn.LayerNorm(channels)
        self.head, self.width = nn.Linear(channels, 5), width

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(-2, -1) * self.width**-0.5
        return self.head(self.norm(self.neck(scores.softmax(-1) @ self.value(x))).relu())


@pytest.mark.parametrize("channels", [3, 4, 8])
def test_a_neck_so_narrow_that_its_norm_hides_the_rest_hides_nothing(channels: int) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        model, example = Neck(channels).eval(), torch.randn(2, 6, 3)
        assert_queries_are_right(model, example)


class Shared(nn.Module):
    """One size for two widths: of queries and keys, and of values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads, self.width = 3, width
        self.query, self.key, self.value = (nn.Linear(5, 3 * width) for _ in range(3))
        self.inner, self.out = nn.Linear(3 * width, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(len(x), -1, self.heads, self.width).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = (q @ k.transpose(-2, -1) / 3).softmax(-1) @ v
        return self.out(self.inner(y.transpose(1, 2).flatten(2)).relu())


@pytest.mark.parametrize("width", range(4, 13))
def test_one_attribute_for_two_widths_by_width(width: int) -> None:
    x = torch.randn(2, 6, 5)
    for seed in range(3):
        torch.manual_seed(seed)
        net = Shared(width)
        graph = analyse(net, x, attention="width")
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=graph.num_units).astype(np.float32)
        keep = graph.frozen.copy()
        keep[np.argsort(-scores)[: graph.num_units * 2 // 3]] = True
        for group in graph.groups:
            keep[group.units[0]] = True
        assert_masked_equals_pruned(net, graph, graph.mask(keep), x)


class Chaos(nn.Module):
    """Amplifies the last digits of float32 to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(30))
        self.head = nn.Linear(24, 4)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=2.1 / 24**0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).sin() * 2
        return self.head(x)


def test_a_network_that_amplifies_rounding_errors_is_pruned() -> None:
    torch.manual_seed(0)
    net, x = Chaos(), torch.rand(2, 24)
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(x.double())
        assert (net(x) - exact).abs().max() > 0.1 * exact.abs().max()
    assert not [item for item in analyse(net, x).frozen_ops if item.op == "trial"]


class Chooses(nn.Module):
    """Orders its positions by scores that rounding alone tells apart where one channel is left."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.head = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.proj(x) * (1 + self.proj.weight.shape[0] * 2**-22)  # rounds by the width
        size = hidden.abs()
        scores = size.pow(3).sum(-1) / size.square().sum(-1) / size.sum(-1)
        order = scores.argsort(-1)[..., None].expand(-1, -1, 4)
        return self.head(hidden).gather(1, order)


def test_an_order_that_rounding_decides_where_little_is_left_freezes_nothing() -> None:
    x = torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0))
    graph = analyse(Chooses(), x)
    (hidden,) = [group for group in graph.groups if group.units.size == 16]
    assert hidden.min_keep == 1
    assert graph.free.sum() == 16


class Lambda(nn.Module):
    """Hides its layers from ``copy.deepcopy``, which shares functions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8)
        self.both = lambda x: self.two(self.one(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)


def wrap_a_block(net: Net) -> None:
    net.two.forward = torch.no_grad()(net.two.forward)  # type: ignore[method-assign]


def wrap_the_root(net: Net) -> None:
    net.forward = torch.no_grad()(net.forward)  # type: ignore[method-assign]


@pytest.mark.parametrize("wrap", [wrap_a_block, wrap_the_root])
def test_a_forward_that_copies_would_share_is_refused(wrap: Callable[[Net], None]) -> None:
    net = Net(lambda net, x: net.two(x))
    wrap(net)
    with pytest.raises(ModelError, match=r"a copy of Net computes with .*weight of the network"):
        analyse(net, EXAMPLE)


def test_a_lambda_over_self_is_refused() -> None:
    with pytest.raises(ModelError, match=r"a copy of Lambda computes with one\.weight"):
        analyse(Lambda(), torch.randn(2, 8))


class Answer(nn.Module):
    """A network whose outputs go through a function."""

    def __init__(self, net: nn.Module, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.net, self.function = net, function

    def forward(self, x: Tensor) -> object:
        return self.function(self.net(x))


def illegal(logits: Tensor) -> Tensor:
    return logits.masked_fill(torch.tensor([False, True, False, False]), -torch.inf)


def widths(net: nn.Module) -> list[int]:
    graph = analyse(net, EXAMPLE)
    return [*graph.group_widths(graph.dense_mask()).values()]


@dataclass
class Named:
    """What a forward may return."""

    count: int
    parts: list[Tensor]


@pytest.mark.parametrize(
    "function",
    [lambda y: (y.argmax(1), y), lambda y: torch.complex(y, y), illegal, lambda y: Named(1, [y])],
    ids=["integers too", "complex", "infinite", "in a dataclass"],
)
def test_outputs_of_every_kind_are_compared(function: Callable[[Tensor], object]) -> None:
    sound = Net(lambda net, x: net.two(x))
    assert widths(Answer(sound, function)) == widths(sound)
    wrong = Net(lambda net, x: net.two(x * (1 + 9 * x[:, -1:].relu())))
    assert widths(Answer(wrong, function)) == widths(wrong) != widths(sound)


@pytest.mark.parametrize("function", [lambda y: y.argmax(1), lambda y: y > 0, lambda y: {y}])
def test_outputs_that_prove_nothing_are_refused(function: Callable[[Tensor], object]) -> None:
    with pytest.raises(ModelError, match="returns no real or complex tensors"):
        analyse(Answer(Net(lambda net, x: net.two(x)), function), EXAMPLE)


class Detector(nn.Module):
    """One output: boxes in pixels, and beside them scores that depend on the width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.boxes, self.scores = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x).relu()).relu()
        wrong = torch.tensor(float(x.shape[1])) * 1e-4
        return torch.cat([640 * self.boxes(x).sigmoid(), 0.1 * self.scores(x).sigmoid() + wrong], 1)


def test_scores_beside_boxes_in_pixels_are_compared_in_their_own_scale() -> None:
    """Relative to 640 pixels, a hundredth of a score is nothing."""
    (reason,) = {item.reason for item in analyse(Detector(), EXAMPLE).frozen_ops}
    assert "something else than the masked one" in reason


def test_channels_that_noise_is_added_to_stay_and_say_why() -> None:
    graph = analyse(Net(lambda net, x: net.two(x + torch.randn_like(x))), EXAMPLE)
    reasons = {group.name: group.frozen for group in graph.groups}
    assert "draws random numbers in eval mode" in str(reasons["one"])
    assert reasons["two"] is None


def test_an_example_of_zeros_hides_no_mistake() -> None:
    def free(between: Callable[[Net, Tensor], Tensor]) -> list[str]:
        net = Net(between)
        for layer in (net.one, net.two, net.head):
            layer.bias = None
        graph = analyse(net, torch.zeros_like(EXAMPLE))
        return [*graph.group_widths(graph.dense_mask())]

    def fails_on_noise(net: Net, x: Tensor) -> Tensor:
        assert not x.any()
        return net.two(x)

    assert free(lambda net, x: net.two(wrong_mean(net, x))) == ["two"]
    assert free(lambda net, x: net.two(x)) == free(fails_on_noise) == ["one", "two"]


class Counts(nn.Module):
    """Writes buffers in its forward, in place and by another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(lambda net, x: net.two(x))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.mean()
        return self.net(x)


def test_buffers_that_a_forward_writes_stay_as_they_were() -> None:
    net = Counts()
    calls, last = net.calls, net.last
    analyse(net, EXAMPLE)
    assert net.calls is calls and net.last is last
    assert float(calls) == float(last) == 0.0


class Cast(Net):
    """Casts to half precision itself: in float32 its layers do not fit what they read."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.bfloat16())


@pytest.mark.parametrize("kind", [Net, Cast])
def test_half_precision_is_tried_in_float32_where_the_forward_can(kind: type[Net]) -> None:
    right = kind(lambda net, x: net.three(net.two(x).relu())).bfloat16()
    graph = analyse(right, EXAMPLE.bfloat16())
    assert graph.free.sum() == 48
    wrong = kind(lambda net, x: net.three(wrong_mean(net, net.two(x)))).bfloat16()
    frozen = analyse(wrong, EXAMPLE.bfloat16())
    assert frozen.free.sum() == 32


class Counted(nn.Module):
    """Knows which of its copies are alive."""

    alive: ClassVar[weakref.WeakSet[nn.Module]] = weakref.WeakSet()
    most = 0

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        Counted.alive.add(self)
        Counted.most = max(Counted.most, len(Counted.alive))
        return self.two(self.one(x).relu())


def test_trials_hold_one_copy_beside_the_network_and_that_with_new_weights() -> None:
    graph = analyse(Counted(), torch.randn(2, 8))
    assert graph.free.any()
    assert Counted.most <= 3


def test_outputs_that_are_very_many_are_one_class_and_cost_what_they_do() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5000))
    graph = analyse(net, torch.randn(2, 8))
    assert (graph.num_units, int(graph.free.sum())) == (18, 16)  # the input is one, too
    assert graph.dense_cost.macs == 2 * (8 * 16 + 16 * 5000)
    keep = graph.frozen | (np.arange(18) % 2 == 0)
    assert_masked_equals_pruned(net, graph, graph.mask(keep), torch.randn(2, 8))
