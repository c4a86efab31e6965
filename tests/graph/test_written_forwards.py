"""Forwards as well-known networks write them: widths read from inputs, attributes and checks."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.surgery import apply_mask
from prunegraph.graph.trace.attribute_reads import named_by_forward
from prunegraph.testing import assert_masked_equals_pruned
from prunegraph.testing.structure_check import check_structure, random_mask

WIDTH, HEADS, TOKENS = 24, 4, 9


class Columns(nn.Module):
    """GPT-2's ``Conv1D``: a linear layer whose weight is turned, that names its output's width."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


class SquareColumns(nn.Module):
    """Two of them in a row, as wide as each other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Columns(WIDTH, WIDTH), Columns(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


class ShorterSequence(nn.Module):
    """As SegFormer and PVT shorten keys: what a convolution returns is as wide as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.shorten, self.mix = nn.Conv2d(WIDTH, WIDTH, 3, stride=3), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, _, c = x.shape
        image = x.permute(0, 2, 1).reshape(b, c, 3, 3)
        short = self.shorten(image).reshape(b, c, -1).permute(0, 2, 1)
        return x + self.mix(short.tanh())


class Checked(nn.Module):
    """As transformers' patch embeddings: the width of the input is compared with an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.num_channels = WIDTH
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.num_channels:
            msg = "the channel dimension does not match the configuration"
            raise ValueError(msg)
        out: Tensor = self.inner(x).relu()
        return out


class OfKeywords(nn.Module):
    """As BLIP's attention: called with keywords, and the width of its heads is the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, *, states: Tensor) -> Tensor:
        b, n, c = states.size()
        qkv = self.qkv(states).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3)
        out: Tensor = self.out(x.reshape(*x.size()[:-2], c))
        return out


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = OfKeywords()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(states=x)


def with_a_tuple(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        return forward(*args, **kwargs)

    return wrapped


class Decorated(nn.Module):
    """As transformers decorates forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.max_tokens = WIDTH, 100

    @with_a_tuple
    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[1] < self.max_tokens else x.new_zeros(len(x), 1, self.embed_dim)


def test_what_a_decorated_forward_names_is_found() -> None:
    assert named_by_forward(Decorated) == {"forward", "embed_dim", "max_tokens"}


class FlatKernel(nn.Module):
    """As Mamba's convolution: the weight's axis of size 1 is taken away and put back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight.squeeze(1).unsqueeze(1)
        out = F.conv1d(x.transpose(1, 2), weight, self.conv.bias, padding=1, groups=x.shape[-1])
        return out.transpose(1, 2)


class OuterProduct(nn.Module):
    """As Mamba's states: channels times a few numbers a token, summed over these."""

    def __init__(self) -> None:
        super().__init__()
        self.states, self.inner = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        outer = self.inner(x)[..., :, None] * self.states(x)[..., None, :]
        return outer.tanh().sum(-1)


class ResizedTable(nn.Module):
    """As vision transformers resize the table of positions to the image."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        image = self.table.reshape(1, 2, 2, -1).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=(3, 3), mode="bicubic")
        return x + image.flatten(2).transpose(1, 2)


class NonLocal(nn.Module):
    """As Wang et al. 2018 have it: one number for queries and keys and for values."""

    def __init__(self) -> None:
        super().__init__()
        self.inter_channels = 6
        self.query, self.key, self.value = (nn.Linear(WIDTH, 6) for _ in range(3))
        self.out = nn.Linear(6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = len(x), x.shape[1], self.inter_channels
        query, key, value = (f(x).view(b, n, c) for f in (self.query, self.key, self.value))
        mixed = (query @ key.transpose(1, 2)).softmax(2) @ value
        out: Tensor = x + self.out(mixed.view(b, n, c))
        return out


class Smoothed(nn.Module):
    """A kernel that is stored once a channel; the forward names how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.count = WIDTH
        self.register_buffer("kernel", torch.rand(1, 1, 3).repeat(WIDTH, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.get_buffer("kernel")
        return F.conv1d(x.transpose(1, 2), kernel, padding=1, groups=self.count).transpose(1, 2)


class Separated(nn.Module):
    """As Conv-TasNet has it: one mask a speaker, each of as many channels as what it masks."""

    def __init__(self) -> None:
        super().__init__()
        self.num_speakers, self.width = 2, WIDTH
        self.mask = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        masks = self.mask(x).view(b, n, self.num_speakers, self.width).sigmoid()
        return (x[:, :, None] * masks).view(b, n * self.num_speakers, self.width)


def normalised() -> nn.Module:
    """Return a layer with norms over channels and positions, as a global context block has them."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm([TOKENS, WIDTH]), nn.ReLU())


BLOCKS: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "normalised": (normalised, [WIDTH, WIDTH]),
    "separated": (Separated, [WIDTH]),
    "non_local": (NonLocal, [6, WIDTH]),
    "smoothed": (Smoothed, [WIDTH]),
    "columns": (SquareColumns, [WIDTH, WIDTH, WIDTH]),
    "shorter_sequence": (ShorterSequence, [WIDTH]),
    "checked": (Checked, [WIDTH, WIDTH]),
    "keywords": (Keywords, [HEADS]),
    "flat_kernel": (FlatKernel, [WIDTH]),
    "outer_product": (OuterProduct, [WIDTH, WIDTH]),
    "resized_table": (ResizedTable, [WIDTH]),
}


def around(block: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, WIDTH), block, nn.Linear(WIDTH, 3))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net.eval()


def free_sizes(graph: StructureGraph) -> list[int]:
    return sorted(len(group.units) for group in graph.groups if group.frozen is None)


@pytest.mark.parametrize("name", BLOCKS)
def test_channels_are_free_where_the_forward_reads_its_width(name: str) -> None:
    block, sizes = BLOCKS[name]
    net, x = around(block()), torch.randn(2, TOKENS, 5)
    assert free_sizes(analyse(net, x)) == sizes
    found = check_structure(net, x, seed=0, num_masks=4)
    assert found.failures == []
    assert found.num_compared >= 4


class NormsOfOneSize(nn.Module):
    """As SwinUNETR: a norm without weights, and a module's over as many other channels."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.many = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH)
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        few = self.few(x)
        first = self.out(self.norm(torch.cat([few, few.tanh()], -1)))
        many = self.many(x)
        return first + F.layer_norm(many, many.shape[-1:])


def test_a_norm_is_told_from_one_inside_of_as_many_channels() -> None:
    net, x = around(NormsOfOneSize()), torch.randn(2, TOKENS, 5)
    graph = analyse(net, x)
    assert free_sizes(graph) == [WIDTH // 2, WIDTH, WIDTH]
    keep = graph.dense_mask().keep.copy()
    for group in graph.groups:
        if len(group.units) == WIDTH:  # the norm inside keeps all
            keep[group.units[::3]] = False
    assert_masked_equals_pruned(net, graph, graph.mask(keep), x)


class Experts(nn.Module):
    """Each token goes through one of three experts, whose weights are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.up = nn.Parameter(torch.randn(3, 32, WIDTH))
        self.down = nn.Parameter(torch.randn(3, WIDTH, 32))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        expert = self.router(rows).argmax(-1)
        order = expert.argsort()
        ends = torch.bincount(expert, minlength=3).cumsum(0).to(torch.int32)
        inner = torch._grouped_mm(rows[order], self.up.transpose(1, 2), offs=ends).relu()
        out = torch._grouped_mm(inner, self.down.transpose(1, 2), offs=ends)
        return x + out[order.argsort()].view(x.shape)


def test_experts_lose_channels_in_blocks_of_16_bytes() -> None:
    net, x = around(Experts()), torch.randn(2, 8, 5)
    try:
        net(x)
    except NotImplementedError:
        pytest.skip("this torch multiplies no groups of matrices on CPUs: 2.8 does not")
    graph = analyse(net, x)
    assert free_sizes(graph) == [WIDTH // 4, 32 // 4]
    for seed in range(4):
        mask, _ = random_mask(graph, np.random.default_rng(seed))
        assert_masked_equals_pruned(net, graph, mask, x, dtype=torch.float32, tolerance=1e-3)


class TwoAttentions(nn.Module):
    """As ConvBERT: two kinds of two heads, side by side, which must be as many."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.others = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(2 * WIDTH, WIDTH)

    def heads(self, x: Tensor) -> Tensor:
        x = x.view(*x.shape[:2], -1, WIDTH // 2).transpose(1, 2)
        return F.scaled_dot_product_attention(x, x, x).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        pair = torch.stack([self.heads(self.values(x)), self.heads(self.others(x))], -1)
        out: Tensor = self.out(pair.flatten(2))
        return out


def test_two_kinds_of_two_heads_do_not_agree_by_chance() -> None:
    net, x = around(TwoAttentions()), torch.randn(2, TOKENS, 5)
    found = check_structure(net, x, seed=0, num_masks=8)
    assert found.failures == []


class OfItsInput(nn.Module):
    """Attention whose heads are as wide as its input says."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        values = self.mixed(*qkv.permute(2, 0, 3, 1, 4))
        out: Tensor = self.out(values.reshape(b, n, c))
        return x + out


class HeadsLast(OfItsInput):
    """As NesT: what attention returns has its heads innermost."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).permute(0, 2, 3, 1)


def test_heads_that_lie_innermost_leave_with_their_share_of_the_stream() -> None:
    net, x = around(HeadsLast()), torch.randn(2, TOKENS, 5)
    assert free_sizes(analyse(net, x)) == [HEADS]
    found = check_structure(net, x, seed=0, num_masks=4)
    assert found.failures == []


class Batched(OfItsInput):
    """As TimeSformer: a batch of as many heads as the stream has channels says nothing of them."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2)


def test_a_batch_of_heads_is_not_the_stream() -> None:
    net, x = around(Batched()), torch.randn(WIDTH // HEADS, TOKENS, 5)
    assert free_sizes(analyse(net, x)) == [HEADS]


class Random(nn.Module):
    """As a masked autoencoder: which tokens it sees is drawn in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.rand(x.shape[:2]).argsort(1)[:, :4]
        out: Tensor = self.inner(x.gather(1, seen[..., None].expand(-1, -1, x.shape[-1])))
        return out


def test_the_oracle_draws_the_same_numbers_for_both_networks() -> None:
    net, x = around(Random()), torch.randn(2, TOKENS, 5)
    graph = analyse(net, x)
    keep = graph.frozen | (np.arange(graph.num_units) % 3 > 0)
    assert_masked_equals_pruned(net, graph, graph.mask(keep), x)
    assert free_sizes(graph) == [WIDTH, WIDTH]


class Cached(nn.Module):
    """As LeViT: a bias for each pair of positions, looked up once and kept while evaluating."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.kept = nn.Parameter(torch.randn(1, WIDTH)), {}
        self.inner = nn.Linear(WIDTH, WIDTH)

    def train(self, mode: bool = True) -> "Cached":
        self.kept = {} if mode else self.kept
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias.expand(x.shape[1], -1)
        out: Tensor = self.inner(x) + self.kept["bias"]
        return out


def test_what_is_kept_while_evaluating_is_made_again() -> None:
    net, x = around(Cached()), torch.randn(2, TOKENS, 5)
    net[1].bias.requires_grad_(False)
    before = net(x)
    kept = net[1].kept["bias"]
    graph = analyse(net, x)
    assert free_sizes(graph) == [WIDTH, WIDTH]
    assert net[1].kept["bias"] is kept
    keep = graph.frozen | (np.arange(graph.num_units) % 3 > 0)
    pruned = apply_mask(net, graph, graph.mask(keep))
    assert pruned(x).shape == before.shape
    assert not pruned.training
    assert not pruned[1].bias.requires_grad
    assert pruned[1].inner.weight.requires_grad
