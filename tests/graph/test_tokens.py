"""Layers that mix tokens, and products of channels with what is none."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.proof.inputs import PROVED_TOKENS

TOKENS, INPUTS, WIDTH, INNER, CLASSES, HEADS = 5, 6, 16, 20, 4, 4


Check = Callable[[nn.Module, Any], StructureGraph]


def free_sizes(graph: StructureGraph) -> list[int]:
    return sorted(len(group.units) for group in graph.groups if group.frozen is None)


class Mixing(nn.Module):
    """A stream of tokens that a layer mixes."""

    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(INPUTS, WIDTH), mix, nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.last((x + self.mix(x)).relu())
        return out


class Turned(nn.Module):
    """Runs layers along the tokens."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x.transpose(1, 2)).transpose(1, 2)
        return out


class Gathered(nn.Module):
    """Linformer's: a stored matrix makes fewer tokens, another spreads them."""

    def __init__(self) -> None:
        super().__init__()
        self.less, self.more = nn.Parameter(torch.randn(3, TOKENS)), nn.Parameter(torch.ones(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.more @ torch.einsum("bnd,kn->bkd", x, self.less).relu()


MIXERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Turned(nn.Linear(TOKENS, 7), nn.GELU(), nn.Linear(7, TOKENS)),
    "norm": lambda: Turned(nn.LayerNorm(TOKENS), nn.Linear(TOKENS, TOKENS, bias=False)),
    "conv": lambda: nn.Conv1d(TOKENS, TOKENS, 1),
    "batch norm": lambda: nn.BatchNorm1d(TOKENS),
    "einsum": Gathered,
}


@pytest.mark.parametrize("kind", MIXERS)
def test_channels_can_go_where_tokens_are_mixed(kind: str, check_all: Check) -> None:
    torch.manual_seed(0)
    graph = check_all(Mixing(MIXERS[kind]()), torch.randn(2, TOKENS, INPUTS))
    assert free_sizes(graph) == [WIDTH]


@pytest.mark.parametrize("kind", MIXERS)
def test_a_mixer_costs_less_with_fewer_channels(kind: str) -> None:
    torch.manual_seed(0)
    graph = analyse(Mixing(MIXERS[kind]()).eval(), torch.randn(2, TOKENS, INPUTS))
    mixing = [op for op in graph.ops if op.param is None]
    assert kind == "batch norm" or sum(op.out_units.size for op in mixing) >= WIDTH


def test_layer_norm_over_places(check_all: Check) -> None:
    class OverPlaces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(WIDTH, CLASSES, 1)
            self.norm = nn.LayerNorm([6, 6])

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.norm(self.first(x)))
            return out

    torch.manual_seed(0)
    assert free_sizes(check_all(OverPlaces(), torch.randn(2, 3, 6, 6))) == [WIDTH]


def pooled(queries: Tensor, x: Tensor) -> Tensor:
    return (queries @ x.mT).softmax(-1) @ x


class Pooled(nn.Module):
    """A few stored queries, or maps that a layer makes, gather tokens."""

    def __init__(self, *, stored: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.queries = nn.Parameter(torch.randn(3, WIDTH)) if stored else None
        self.maps = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if self.queries is None:
            out: Tensor = self.last(self.maps(x).softmax(1).mT @ x)
        else:
            out = self.last(pooled(self.queries, x))
        return out


@pytest.mark.parametrize("stored", [True, False])
def test_maps_that_gather_tokens_stay_and_the_channels_go(stored: bool, check_all: Check) -> None:
    torch.manual_seed(0)
    graph = check_all(Pooled(stored=stored), torch.randn(2, TOKENS, INPUTS))
    assert free_sizes(graph) == [WIDTH]


class OneHead(nn.Module):
    """SAGAN's attention, with a scale that is a number or none."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.first = scale, nn.Linear(INPUTS, WIDTH)
        self.query, self.key = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        scores = self.query(x) @ self.key(x).mT * self.scale
        out: Tensor = self.last(scores.softmax(-1) @ x)
        return out


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_one_head_with_a_scale_of_its_own(scale: float, check_all: Check) -> None:
    torch.manual_seed(0)
    assert free_sizes(check_all(OneHead(scale), torch.randn(2, TOKENS, INPUTS))) == [8, WIDTH]


def test_one_head_whose_scale_is_computed_from_its_width(check_all: Check) -> None:
    class Scaled(OneHead):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            query = self.query(x)
            scores = query @ self.key(x).mT / query.shape[-1] ** 0.5
            out: Tensor = self.last(scores.softmax(-1) @ x)
            return out

    torch.manual_seed(0)
    assert free_sizes(check_all(Scaled(1.0), torch.randn(2, TOKENS, INPUTS))) == [WIDTH]


class LinearAttention(nn.Module):
    """EfficientViT's: a column of ones beside the values sums up the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.first = 4, nn.Linear(INPUTS, WIDTH)
        self.qkv, self.last = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        heads = self.qkv(self.first(x)).view(b, n, -1, 3 * self.dim).transpose(1, 2)
        query, key, value = heads.relu().split(self.dim, -1)
        out = query @ (key.mT @ F.pad(value, (0, 1), value=1.0))
        out = out[..., :-1] / (out[..., -1:] + 1e-5)
        result: Tensor = self.last(out.transpose(1, 2).reshape(b, n, -1))
        return result


def test_ones_beside_the_values_of_each_head(check_all: Check) -> None:
    torch.manual_seed(0)
    graph = check_all(LinearAttention(), torch.randn(2, TOKENS, INPUTS))
    assert free_sizes(graph) == [HEADS, WIDTH]


class Template(nn.Module):
    """A tracker's: features of one image are kernels for those of another."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.last = nn.Conv2d(3, WIDTH, 3), nn.Conv2d(WIDTH, CLASSES, 1)

    def forward(self, x: Tensor, template: Tensor) -> Tensor:
        kernels = self.features(template)[0, :, None]
        out: Tensor = self.last(F.conv2d(self.features(x), kernels, groups=kernels.shape[0]))
        return out


def test_features_that_are_kernels_of_others(check_all: Check) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(2, 3, 12, 12), torch.randn(1, 3, 5, 5))
    assert free_sizes(check_all(Template(), inputs)) == [WIDTH]


class Prepended(nn.Module):
    """Stored tokens before those of the input, and a norm that is written out; none at all, too."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.tokens, self.gain = (
            nn.Parameter(torch.randn(count, WIDTH)),
            nn.Parameter(torch.ones(1)),
        )
        self.first, self.last = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.tokens.expand(len(x), -1, -1), self.first(x)), 1)
        x = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.gain
        out: Tensor = self.last(x)
        return out


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors.*:UserWarning")
@pytest.mark.parametrize("count", [0, 3])
def test_stored_tokens_before_others(count: int, check_all: Check) -> None:
    torch.manual_seed(0)
    graph = check_all(Prepended(count), torch.randn(2, TOKENS, INPUTS))
    assert free_sizes(graph) == [WIDTH]


class Halves(nn.Module):
    """A part of the channels that may be none."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x[..., :WIDTH].sin(), x[..., WIDTH:]), -1)


class Kept(nn.Module):
    """States of layers that are stacked, and not used."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        states = []
        for layer in (self.one, self.two):
            x = layer(x).relu()
            states.append(x)
        assert len(torch.stack(states, 1))
        return x


@pytest.mark.parametrize("inner", [Halves, Kept])
def test_parts_that_are_empty_or_stacked(inner: Callable[[], nn.Module], check_all: Check) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, WIDTH), inner(), nn.Linear(WIDTH, CLASSES))
    assert WIDTH in free_sizes(check_all(model, torch.randn(2, INPUTS)))


class Partial(nn.Module):
    """FasterNet's: a few channels are convolved in place."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts, self.some = parts, nn.Conv2d(parts, parts, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x[:, : self.parts] = self.some(x[:, : self.parts])
        return x


@pytest.mark.parametrize("parts", [1, 2])
def test_a_few_channels_that_are_convolved_in_place(parts: int, check_all: Check) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Partial(parts), nn.Conv2d(8, CLASSES, 1))
    graph = check_all(model, torch.randn(1, 3, 6, 6))
    assert free_sizes(graph) == ([7] if parts == 1 else [2, 6])


class Tiled(nn.Module):
    """As transformers' SAM 3: a table of positions is laid out in a square, and angles turn heads.

    The angles are computed from a buffer of places: their rows are tokens, not channels.
    """

    places: Tensor
    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 2, stride=2)
        self.table = nn.Parameter(torch.randn(1, 36, 16))
        self.norm, self.qkv = nn.LayerNorm(16), nn.Linear(16, 48)
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 3)
        self.register_buffer("places", torch.rand(16, 2))
        self.register_buffer("frequencies", torch.rand(2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        square = self.table.reshape(1, 6, 6, -1).permute(0, 3, 1, 2).tile(1, 1, 2, 2)
        x = x + square[:, :, :4, :4].permute(0, 2, 3, 1).reshape(1, 16, -1)
        y = self.norm(x.view(len(x), 4, 4, -1)).flatten(1, 2)
        q, k, v = self.qkv(y).view(len(x), 16, 3, -1, 4).permute(2, 0, 3, 1, 4)
        angles = (self.places[..., None] * self.frequencies).cos().flatten(1)
        y = F.scaled_dot_product_attention(q * angles, k * angles, v)
        out: Tensor = self.head(x + self.mix(y.transpose(1, 2).flatten(2)))
        return out


def test_rows_of_tables_beside_channels_are_tokens(check_all: Check) -> None:
    graph = check_all(Tiled(), torch.randn(2, 3, 8, 8))
    free = {group.name: group for group in graph.groups if not group.frozen}
    assert {name: group.units.size for name, group in free.items()} == {"patches": 16, "qkv": 4}
    assert "table:2" in free["patches"].members


class Words(nn.Module):
    """Token numbers to scores; notes how many tokens it was run on."""

    lengths: ClassVar[list[int]] = []

    def __init__(self, fixed: int | None = None) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(9, 8), nn.Linear(8, 12), nn.Linear(12, 9)
        self.fixed = fixed

    def forward(self, ids: Tensor) -> Tensor:
        self.lengths.append(ids.shape[1])
        x = self.inner(self.table(ids)).relu()
        return self.head(x if self.fixed is None else x.view(len(x), self.fixed, -1))


@pytest.mark.parametrize("fixed", [None, 100])
def test_the_proof_runs_on_few_tokens_where_the_forward_can(fixed: int | None) -> None:
    Words.lengths.clear()
    graph = analyse(Words(fixed), torch.arange(100)[None] % 9)
    assert int(graph.free.sum()) == 8 + 12
    assert Words.lengths[0] == 100  # every token has a label
    assert {*Words.lengths[2:]} == {PROVED_TOKENS if fixed is None else 100}
    assert graph.dense_cost.macs == 100 * (8 * 12 + 12 * 9)
