"""Attention is pruned by whole heads, however its forward is written."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.budget import Budget
from prunegraph.core.masks import ChannelMask
from prunegraph.graph import AttentionUnit, StructureGraph, analyse
from prunegraph.graph.apply import apply_mask
from prunegraph.graph.slim_attention import SlimMultiheadAttention
from prunegraph.testing import assert_masked_equals_pruned

EMBED, HEADS, TOKENS = 24, 4, 6


class Block(nn.Module):
    """Residual stream -> attention -> residual stream."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(5, EMBED)
        self.norm = nn.LayerNorm(EMBED)
        self.attention = attention
        self.head = nn.Linear(EMBED, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        out: Tensor = self.head(x + self.attention(self.norm(x)))
        return out


class Packed(nn.Module):
    """As timm writes it: one projection, sizes from attributes."""

    def __init__(self, *, fused: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, EMBED // HEADS
        self.inner = EMBED
        self.fused = fused
        self.qkv = nn.Linear(EMBED, 3 * EMBED)
        self.q_norm = nn.LayerNorm(self.head_dim) if norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim) if norm else nn.Identity()
        self.proj = nn.Linear(EMBED, EMBED)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        out: Tensor = self.proj(x.transpose(1, 2).reshape(b, n, self.inner))
        return out


class OfItsInput(nn.Module):
    """As torchvision's Swin writes it: widths from the input, a bias for each head, a 2-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(EMBED, 3 * EMBED)
        self.bias = nn.Parameter(torch.randn(TOKENS * TOKENS, HEADS))
        self.scale = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        self.proj = nn.Linear(EMBED, EMBED)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = self.bias[torch.arange(n * n)].view(n, n, -1).permute(2, 0, 1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        x = (scores * self.scale + bias).softmax(-1) @ v
        out: Tensor = self.proj(x.transpose(1, 2).reshape(b, n, c))
        return out


class Grouped(nn.Module):
    """As in Llama: fewer key heads, rotated positions, sizes inferred."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.repeats = EMBED // HEADS, 2
        self.q = nn.Linear(EMBED, EMBED, bias=False)
        self.k = nn.Linear(EMBED, EMBED // 2, bias=False)
        self.v = nn.Linear(EMBED, EMBED // 2, bias=False)
        self.out = nn.Linear(EMBED, EMBED, bias=False)
        self.register_buffer("frequency", torch.rand(self.head_dim // 2))

    def rotated(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[2], dtype=x.dtype)
        angle = position[:, None] @ self.get_buffer("frequency")[None]
        angle = torch.cat([angle, angle], -1)
        first, second = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            f(x).view(b, n, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        q, k = self.rotated(q), self.rotated(k)
        k, v = (
            t[:, :, None].expand(b, t.shape[1], self.repeats, n, self.head_dim).flatten(1, 2)
            for t in (k, v)
        )
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(x.transpose(1, 2).reshape(b, n, -1))
        return out


class Torch(nn.Module):
    """``nn.MultiheadAttention``."""

    def __init__(self, *, need_weights: bool = False, biased: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            EMBED, HEADS, batch_first=True, add_bias_kv=biased, add_zero_attn=biased
        )
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=self.need_weights)[0]
        return out


class Batched(nn.Module):
    """Heads along the batch, as in set transformers, by their width or by their number."""

    def __init__(self, *, by_number: bool = False, residual: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(EMBED, EMBED) for _ in range(3))
        self.out = nn.Linear(EMBED, EMBED)
        self.width, self.num_heads = EMBED // HEADS, HEADS
        self.scale, self.by_number, self.residual = self.width**-0.5, by_number, residual

    def along_batch(self, x: Tensor) -> Tensor:
        parts = x.chunk(self.num_heads, -1) if self.by_number else x.split(self.width, 2)
        return torch.cat(parts, dim=0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.along_batch(layer(x)) for layer in (self.q, self.k, self.v))
        y = (q @ k.transpose(1, 2) * self.scale).softmax(-1) @ v
        if self.residual:
            y = y + q
        out: Tensor = self.out(torch.cat(y.split(len(x), 0), -1))
        return out


ATTENTIONS = {
    "packed": Packed,
    "fused": lambda: Packed(fused=True),
    "normed": lambda: Packed(norm=True),
    "of_its_input": OfItsInput,
    "grouped": Grouped,
    "batched": Batched,
    "batched_by_number": lambda: Batched(by_number=True),
    "batched_residual": lambda: Batched(residual=True),
    "torch": Torch,
    "torch_weights": lambda: Torch(need_weights=True),
    "torch_biased": lambda: Torch(biased=True),
}


def block(name: str, attention: AttentionUnit = "head") -> tuple[nn.Module, StructureGraph, Tensor]:
    torch.manual_seed(0)
    model, x = Block(ATTENTIONS[name]()), torch.randn(2, TOKENS, 5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval(), analyse(model, x, attention=attention), x


def random_mask(graph: StructureGraph, seed: int) -> ChannelMask:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=graph.num_units).astype(np.float32)
    return graph.project(scores, Budget(keep_macs=float(rng.uniform(0.4, 0.9))))


def heads(graph: StructureGraph) -> list[int]:
    """Return the sizes of the free groups that hold an attention's inner channels."""
    return [
        len(group.units)
        for group in graph.groups
        if group.frozen is None
        and any("attention" in m and ":0" in m for m in group.members)
        and not any(m.startswith("embed") for m in group.members)
    ]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_masked_equals_pruned(name: str) -> None:
    model, graph, x = block(name)
    for seed in range(8):
        assert_masked_equals_pruned(model, graph, random_mask(graph, seed), x)


@pytest.mark.parametrize("name", sorted(set(ATTENTIONS) - {"of_its_input", "grouped"}))
def test_heads_and_stream_are_groups_of_their_own(name: str) -> None:
    _, graph, _ = block(name)
    assert heads(graph) == [HEADS]
    assert EMBED in {len(group.units) for group in graph.groups if group.frozen is None}


class Siamese(nn.Module):
    """Halves of the channels that pass one layer side by side along the batch, or none."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem, self.layer, self.out = nn.Conv2d(3, 16, 1), layer, nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        halves = self.stem(x).chunk(2, 1)
        both: Tensor = self.layer(torch.cat(halves, 0))
        out: Tensor = self.out(torch.cat(both.chunk(2, 0), 1))
        return out


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()])
def test_halves_along_the_batch_that_are_no_heads_lose_the_same_channels(layer: nn.Module) -> None:
    torch.manual_seed(0)
    model, x = Siamese(layer).eval(), torch.randn(2, 3, 5, 5)
    graph = analyse(model, x)
    sizes = {group.name: group.units.size for group in graph.groups if group.frozen is None}
    assert sizes == {"stem": 8} | ({"layer": 8} if isinstance(layer, nn.Conv2d) else {})
    for seed in range(4):
        assert_masked_equals_pruned(model, graph, random_mask(graph, seed), x)


def test_a_key_head_leaves_with_its_query_heads() -> None:
    _, graph, _ = block("grouped")
    assert heads(graph) == [HEADS // 2]


def test_heads_that_must_match_the_stream_leave_with_their_share_of_it() -> None:
    _, graph, _ = block("of_its_input")
    (group,) = [group for group in graph.groups if group.frozen is None]
    assert len(group.units) == HEADS
    assert {"embed.weight:0", "attention.qkv.weight:0", "attention.bias:1"} <= set(group.members)


def test_attributes_follow_the_heads() -> None:
    model, graph, _ = block("packed")
    group = next(g for g in graph.groups if len(g.units) == HEADS and g.frozen is None)
    keep = np.ones(graph.num_units, dtype=bool)
    keep[group.units[:1]] = False
    attention = apply_mask(model, graph, graph.mask(keep)).attention
    assert isinstance(attention, Packed)
    assert (attention.num_heads, attention.head_dim) == (HEADS - 1, EMBED // HEADS)
    assert attention.inner == EMBED - EMBED // HEADS
    dense = model.attention
    assert isinstance(dense, Packed)
    assert (dense.num_heads, dense.inner) == (HEADS, EMBED)


@pytest.mark.parametrize("name", ["torch", "torch_biased", "packed"])
def test_a_pruned_attention_is_pruned_again(name: str) -> None:
    model, graph, x = block(name)
    once = apply_mask(model, graph, random_mask(graph, 1))
    again = analyse(once, x)
    for seed in range(3):
        assert_masked_equals_pruned(once, again, random_mask(again, seed), x)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.memory = nn.Linear(5, EMBED), nn.Linear(7, 16)
        self.attention = nn.MultiheadAttention(EMBED, HEADS, kdim=16, vdim=16, batch_first=True)
        self.same = nn.MultiheadAttention(EMBED, HEADS)
        self.head = nn.Linear(EMBED, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x, memory = self.query(x), self.memory(memory)
        x = self.attention(x, memory, memory, need_weights=False)[0]
        y = x.transpose(0, 1)
        out: Tensor = self.head(self.same(y, y + 1, y)[0])
        return out


def test_cross_attention() -> None:
    torch.manual_seed(0)
    model, inputs = CrossAttention().eval(), (torch.randn(2, 4, 5), torch.randn(2, 6, 7))
    graph = analyse(model, inputs)
    assert sorted(len(g.units) for g in graph.groups if g.frozen is None) == [
        4,
        4,
        16,
        24,
        24,
        24,
    ]
    for seed in range(5):
        mask = random_mask(graph, seed)
        assert_masked_equals_pruned(model, graph, mask, inputs)
    slim = apply_mask(model, graph, mask)
    assert isinstance(slim.get_submodule("same"), SlimMultiheadAttention)
    again = analyse(slim, inputs)
    assert_masked_equals_pruned(slim, again, random_mask(again, 9), inputs)


class AsksForItsClass(CrossAttention):
    """As torch_geometric's ``GPSConv``."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        assert isinstance(self.attention, nn.MultiheadAttention)
        return super().forward(x, memory)


def test_a_forward_that_asks_for_the_class_of_an_attention(
    check_all: Callable[[nn.Module, Any], StructureGraph],
) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 5), torch.randn(2, 6, 7)
    graph = check_all(AsksForItsClass(), inputs)
    assert not [item for item in graph.frozen_ops if "full width" in item.reason]


def test_a_pruned_encoder_keeps_off_the_fused_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.Sequential(nn.Linear(5, EMBED), encoder, nn.Linear(EMBED, 3)).eval()
    x = torch.randn(2, TOKENS, 5)
    graph = analyse(model, x)
    pruned = apply_mask(model, graph, random_mask(graph, 0))
    with torch.no_grad():
        fast = pruned(x)
    assert torch.allclose(fast, pruned(x), atol=1e-6)


@pytest.mark.parametrize("compiled", [torch.jit.script, torch.fx.symbolic_trace])
def test_a_pruned_attention_is_compiled_as_a_dense_one(
    compiled: Callable[[nn.Module], nn.Module],
) -> None:
    torch.manual_seed(0)
    model, inputs = CrossAttention().eval(), (torch.randn(2, 4, 5), torch.randn(2, 6, 7))
    graph = analyse(model, inputs)
    pruned = apply_mask(model, graph, random_mask(graph, 0))
    assert torch.equal(compiled(pruned)(*inputs), pruned(*inputs))


def test_width_of_a_single_fused_head_is_frozen_with_the_reason() -> None:
    torch.manual_seed(0)

    class OneHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(5, 8) for _ in range(3))
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x)[:, None] for f in (self.q, self.k, self.v))
            out: Tensor = self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])
            return out

    model, x = OneHead().eval(), torch.randn(2, TOKENS, 5)
    graph = analyse(model, x)
    assert any("sets the scale" in item.reason for item in graph.frozen_ops)
    assert [g.members for g in graph.groups if g.frozen is None] == [
        ("v.weight:0", "v.bias:0", "out.weight:1")
    ]
    assert_masked_equals_pruned(
        model, graph, graph.project(np.zeros(graph.num_units), Budget(keep_macs=0.8)), x
    )


def test_the_input_network_is_left_alone() -> None:
    model, graph, _ = block("torch")
    before = copy.deepcopy(model.state_dict())
    apply_mask(model, graph, random_mask(graph, 0))
    assert isinstance(model.get_submodule("attention.attention"), nn.MultiheadAttention)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


BY_WIDTH = sorted(set(ATTENTIONS) - {"of_its_input"})  # which leaves nothing to prune


@pytest.mark.parametrize("name", BY_WIDTH)
def test_masked_equals_pruned_by_width(name: str) -> None:
    model, graph, x = block(name, "width")
    for seed in range(5):
        assert_masked_equals_pruned(model, graph, random_mask(graph, seed), x)


@pytest.mark.parametrize("name", ["torch", "torch_weights"])
def test_heads_stay_and_lose_width(name: str) -> None:
    model, graph, _ = block(name, "width")
    width = EMBED // HEADS
    assert heads(graph) == [width]
    group = next(g for g in graph.groups if len(g.units) == width and g.frozen is None)
    keep = np.ones(graph.num_units, dtype=bool)
    keep[group.units[:2]] = False
    slim = apply_mask(model, graph, graph.mask(keep)).get_submodule("attention.attention")
    assert isinstance(slim, SlimMultiheadAttention)
    assert slim.num_heads == HEADS
    assert slim.out_proj.in_features == HEADS * (width - 2)
    assert slim.scale == pytest.approx(width**-0.5)


def test_heads_first_then_their_width() -> None:
    model, graph, x = block("torch")
    fewer = apply_mask(model, graph, random_mask(graph, 1))
    by_width = analyse(fewer, x, attention="width")
    for seed in range(3):
        assert_masked_equals_pruned(fewer, by_width, random_mask(by_width, seed), x)


def test_values_may_be_narrower_than_queries() -> None:
    """Separate projections: queries and keys lose other positions than values."""
    torch.manual_seed(0)
    model, inputs = CrossAttention().eval(), (torch.randn(2, 4, 5), torch.randn(2, 6, 7))
    graph = analyse(model, inputs, attention="width")
    sizes = sorted(len(group.units) for group in graph.groups if group.frozen is None)
    assert sizes.count(EMBED // HEADS) == 4
    for seed in range(3):
        assert_masked_equals_pruned(model, graph, random_mask(graph, seed), inputs)


class Rotary(nn.Module):
    """Attention whose queries and keys are turned by angles from a table, as LLaMA's are."""

    def __init__(self, shape: tuple[int, ...], *, heads_first: bool) -> None:
        super().__init__()
        self.n_heads, self.heads_first = 4, heads_first
        self.words, self.qkv = nn.Embedding(40, 16), nn.Linear(16, 48)
        self.mix, self.out = nn.Linear(16, 16), nn.Linear(16, 5)
        self.register_buffer("angles", torch.rand(20, 4).view(shape))

    def turned(self, x: Tensor) -> Tensor:
        place = slice(None, x.shape[2 if self.heads_first else 1])
        angles = self.get_buffer("angles")
        angles = angles[place] if angles.shape[0] == 20 else angles[:, :, place]
        one, two = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-two, one], -1) * angles.sin()

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        q, k, v = (y.unflatten(-1, (self.n_heads, -1)) for y in self.qkv(x).chunk(3, -1))
        if self.heads_first:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        q, k = self.turned(q), self.turned(k)
        if not self.heads_first:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out: Tensor = self.out(x + self.mix(y.flatten(2)))
        return out


@pytest.mark.parametrize(
    ("shape", "heads_first"), [((20, 4), True), ((1, 1, 20, 4), True), ((20, 1, 4), False)]
)
def test_a_table_of_rotary_angles_is_shared_by_all_heads(
    shape: tuple[int, ...], heads_first: bool
) -> None:
    words = torch.arange(12).view(2, 6)
    net = Rotary(shape, heads_first=heads_first).eval()
    graph = analyse(net, words)
    assert {g.name: g.units.size for g in graph.groups if g.frozen is None} == {
        "mix": 16,
        "qkv": 4,
    }
    keep = graph.dense_mask().keep.copy()
    for group in graph.groups:
        if group.frozen is None:
            keep[group.units[::3]] = False
    assert_masked_equals_pruned(net, graph, graph.mask(keep), words)
    longer = torch.arange(27).view(3, 9)
    apply_mask(net, graph, graph.mask(keep), example_inputs=longer)  # it checks them


class ConstantKeys(nn.Module):
    """A product over channels and constants, which are of no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(5, 8), nn.Linear(5, 8)
        self.one, self.two = nn.Linear(6, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        ones = torch.ones(*x.shape[:2], 2)
        q, k = (torch.cat([layer(x), ones], -1) for layer in (self.query, self.key))
        return self.two(self.one(q @ k.transpose(1, 2)).relu())


@pytest.mark.parametrize("attention", ["head", "width"])
def test_constants_among_the_channels_of_a_product(attention: AttentionUnit) -> None:
    net, x = ConstantKeys(), torch.randn(2, 6, 5)
    graph = analyse(net, x, attention=attention)
    mask = graph.project(np.arange(graph.num_units, dtype=np.float32), Budget(keep_macs=0.8))
    assert_masked_equals_pruned(net, graph, mask, x)
