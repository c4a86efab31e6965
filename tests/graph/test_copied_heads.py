"""Query heads that share one head of keys and values leave alone; the keys stay."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.apply import apply_mask, zero_mask

HEADS, WIDTH, TOKENS = 4, 8, 6

Check = Callable[[nn.Module, Any], StructureGraph]


class MultiQuery(nn.Module):
    """Attention with one head of keys and values, written in several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.num_heads, self.head_dim = way, HEADS, WIDTH
        self.embed = nn.Linear(5, HEADS * WIDTH)
        self.q = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
        self.kv = nn.Linear(HEADS * WIDTH, 2 * WIDTH)
        self.proj = nn.Linear(HEADS * WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(x).chunk(2, -1)
        x = self.attend(q, k, v).transpose(1, 2).reshape(b, n, -1)
        out: Tensor = self.proj(x)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return ``[b, heads, n, width]`` of the queries, and ``[b, n, width]`` keys and values."""
        if self.way == "einsum":
            scores = torch.einsum("bhnd,bmd->bhnm", q, k) / self.head_dim**0.5
            return torch.einsum("bhnm,bmd->bhnd", scores.softmax(-1), v)
        k, v = k.unsqueeze(1), v.unsqueeze(1)
        match self.way:
            case "expand":
                k, v = (each.expand(-1, self.num_heads, -1, -1) for each in (k, v))
            case "repeat":
                k, v = (each.repeat(1, self.num_heads, 1, 1) for each in (k, v))
            case "interleave":
                k, v = (each.repeat_interleave(self.num_heads, 1) for each in (k, v))
            case "grouped":
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            case "product":
                return (q @ k.transpose(-1, -2) / self.head_dim**0.5).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v)


WAYS = ["einsum", "expand", "repeat", "interleave", "grouped", "product", "broadcast"]


@pytest.mark.parametrize("way", WAYS)
def test_query_heads_leave_alone(way: str, check_all: Check) -> None:
    network = MultiQuery(way)
    graph = check_all(network, torch.randn(2, TOKENS, 5))
    groups = {group.name: group for group in graph.groups}
    assert groups["q"].frozen is None
    assert groups["q"].units.size == HEADS
    assert groups["kv"].frozen is not None


def test_by_width_no_head_leaves() -> None:
    graph = analyse(MultiQuery("expand").eval(), torch.randn(2, TOKENS, 5), attention="width")
    assert [group.name for group in graph.groups if not group.frozen] == ["embed"]


class Repeated(MultiQuery):
    """As transformers' Llama writes it: with a mask the keys are copied, without one they are not.

    The example shows no mask, so it does not show that ``num_key_value_groups`` is a size.
    """

    def __init__(self, key_heads: int) -> None:
        super().__init__("repeat")
        self.num_key_value_groups = HEADS // key_heads
        self.kv = nn.Linear(HEADS * WIDTH, 2 * key_heads * WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x, copies = self.embed(x), self.num_key_value_groups
        b, n, _ = x.shape
        q, k, v = (
            each.view(b, n, -1, self.head_dim).transpose(1, 2)
            for each in (self.q(x), *self.kv(x).chunk(2, -1))
        )
        if mask is None:
            x = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (each.repeat_interleave(copies, 1) for each in (k, v))
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.proj(x.transpose(1, 2).reshape(b, n, -1))
        return out


@pytest.mark.parametrize(("key_heads", "copies"), [(1, 3), (2, 2)])
def test_the_number_of_copies_follows_the_heads(key_heads: int, copies: int) -> None:
    network = Repeated(key_heads).eval()
    x = torch.randn(2, TOKENS, 5)
    graph = analyse(network, x)
    heads = next(group for group in graph.groups if group.name == "q")
    assert heads.units.size == (HEADS if key_heads == 1 else key_heads)
    keep = np.ones(graph.num_units, dtype=bool)
    keep[heads.units[0]] = False
    mask = graph.mask(keep)
    small, silent = apply_mask(network, graph, mask), zero_mask(network, graph, mask)
    assert small.num_key_value_groups == copies
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    torch.testing.assert_close(small(x, causal), silent(x, causal))


class SharedStates(nn.Module):
    """The scan of Mamba-2, without its convolution: all heads share what is written and read."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.n_groups, self.state_size = HEADS, WIDTH, groups, 5
        self.intermediate_size, self.norm_size = HEADS * WIDTH, HEADS * WIDTH // groups
        states = groups * self.state_size
        self.embed = nn.Linear(3, 12)
        self.sizes = [self.intermediate_size, states, states, HEADS]
        self.in_proj = nn.Linear(12, sum(self.sizes))
        self.a_log, self.skip = nn.Parameter(torch.rand(HEADS)), nn.Parameter(torch.rand(HEADS))
        self.out_proj = nn.Linear(self.intermediate_size, 12)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        values, write, read, steps = self.in_proj(x).split(self.sizes, -1)
        values = values.view(b, n, self.num_heads, self.head_dim)
        steps = F.softplus(steps)
        write, read = (
            each.view(b, n, self.n_groups, -1).repeat_interleave(self.num_heads // self.n_groups, 2)
            for each in (write, read)
        )
        decay = (-self.a_log.exp() * steps).cumsum(1)
        between = (decay.unsqueeze(2) - decay.unsqueeze(1)).exp()
        causal = torch.ones(n, n).tril().view(1, n, n, 1)
        scores = torch.einsum("blhn,bshn->blsh", read, write) * between * causal
        y = torch.einsum("blsh,bshp->blhp", scores, values * steps.unsqueeze(-1))
        last = write * (decay[:, -1:] - decay).exp().unsqueeze(-1)
        state = torch.einsum("blhn,blhp->bhpn", last, values)
        y = y + torch.einsum("blhn,bhpn->blhp", read, state) + self.skip.unsqueeze(-1) * values
        y = y.reshape(b, n, -1, self.norm_size)
        y = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        out: Tensor = self.head(x + self.out_proj(y.view(b, n, -1)))
        return out


@pytest.mark.parametrize(("groups", "free"), [(1, HEADS), (2, 2)])
def test_heads_of_a_state_space_leave(groups: int, free: int, check_all: Check) -> None:
    graph = check_all(SharedStates(groups), torch.randn(2, TOKENS, 3))
    heads = [group for group in graph.groups if group.name == "in_proj"]
    assert heads[0].frozen is None
    assert heads[0].units.size == free


def test_copies_that_no_heads_share_keep_their_channels(check_all: Check) -> None:
    class Spread(nn.Module):
        """A feature of the whole image beside each of its positions, as many as its channels."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, TOKENS), nn.Linear(3, TOKENS)
            self.head = nn.Linear(2 * TOKENS, 2)

        def forward(self, x: Tensor) -> Tensor:
            whole = self.two(x.mean(1)).unsqueeze(1).expand(-1, TOKENS, -1)
            out: Tensor = self.head(torch.cat([self.one(x), whole], -1))
            return out

    graph = check_all(Spread(), torch.randn(2, TOKENS, 3))
    assert {group.name for group in graph.groups if not group.frozen} == {"one", "two"}


class Sliced(nn.Module):
    """As transformers' Phi-3 writes it: queries, keys and values are slices of one projection."""

    def __init__(self, key_heads: int) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head_dim = HEADS, key_heads, WIDTH
        self.embed = nn.Linear(5, 12)
        self.qkv = nn.Linear(12, (HEADS + 2 * key_heads) * WIDTH)
        self.proj = nn.Linear(HEADS * WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(self.embed(x))
        end, width = self.heads * self.head_dim, self.key_heads * self.head_dim
        q, k, v = (
            part.view(b, n, -1, self.head_dim).transpose(1, 2)
            for part in (qkv[..., :end], qkv[..., end : end + width], qkv[..., end + width :])
        )
        x = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        out: Tensor = self.proj(x.transpose(1, 2).reshape(b, n, -1))
        return out


@pytest.mark.parametrize("key_heads", [2, HEADS])
def test_slices_of_queries_and_keys_are_not_tied(key_heads: int, check_all: Check) -> None:
    """Half of the projection are queries; or a third, as keys and values."""
    graph = check_all(Sliced(key_heads), torch.randn(2, TOKENS, 5))
    heads = next(group for group in graph.groups if group.name == "qkv")
    assert heads.frozen is None
    assert heads.units.size == key_heads


class Biased(nn.Module):
    """As transformers' T5 writes it: a bias of zeros goes from layer to layer."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, HEADS * WIDTH), nn.Linear(HEADS * WIDTH, 3)
        self.layers = nn.ModuleList(layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x, bias = self.embed(x), None
        for layer in self.layers:
            y, bias = layer(x, bias)
            x = x + y
        out: Tensor = self.head(x)
        return out


class BiasedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n_heads, self.inner = HEADS, HEADS * WIDTH
        self.qkv = nn.Linear(self.inner, 3 * self.inner)
        self.proj = nn.Linear(self.inner, self.inner)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = (y.view(b, n, -1, WIDTH).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        if bias is None:
            bias = torch.zeros(1, self.n_heads, n, n)
        x = self.attend(q, k, v, bias)
        return self.proj(x.transpose(1, 2).reshape(b, n, -1)), bias

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) / WIDTH**0.5 + bias).softmax(-1) @ v


class FusedLayer(BiasedLayer):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@pytest.mark.parametrize("layer", [BiasedLayer, FusedLayer])
def test_layers_that_share_a_bias_of_zeros_have_as_many_heads(
    layer: Callable[[], nn.Module], check_all: Check
) -> None:
    graph = check_all(Biased(layer), torch.randn(2, TOKENS, 5))
    free = {group.name: group.units.size for group in graph.groups if not group.frozen}
    assert free == {"embed": HEADS * WIDTH, "layers.0.qkv": HEADS}
