"""Integers of modules: which hold a size that surgery changes, and which only look so."""

import copy
import threading
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.errors import ModelError
from prunegraph.graph import analyse
from prunegraph.graph.graph import StructureGraph
from prunegraph.graph.surgery import apply_mask, zero_mask
from prunegraph.testing import assert_masked_equals_pruned
from prunegraph.testing.structure_check import check_structure

WIDTH, HEADS, TOKENS = 24, 4, 9


def check_elsewhere(net: nn.Module, example: Tensor, elsewhere: Tensor) -> StructureGraph:
    """Check that masked and pruned agree on inputs of another size, too."""
    graph = analyse(net.eval(), example)
    keep = graph.dense_mask().keep.copy()
    keep[np.flatnonzero(graph.free)[::3]] = False
    mask = graph.mask(keep)
    pruned, masked = apply_mask(net, graph, mask), zero_mask(net, graph, mask)
    for inputs in (example, elsewhere):
        found = pruned.double()(inputs.double()) - masked.double()(inputs.double())
        assert found.abs().max() < 1e-9
    return graph


class Longer(nn.Module):
    """Has as many units as it keeps steps of longer sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.lstm = nn.Linear(5, 16), nn.LSTM(16, 4, batch_first=True)
        self.last, self.max_len, self.head = 4, 4, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(self.one(x)[:, : 2 * self.max_len])[0]
        if y.shape[1] > 6:
            y = y[:, -self.last :]
        out: Tensor = self.head(y.mean(1))
        return out


def test_lengths_that_equal_a_width_stay() -> None:
    graph = check_elsewhere(Longer(), torch.randn(2, 5, 5), torch.randn(2, 12, 5))
    assert {group.name for group in graph.groups if group.frozen is None} == {"one", "lstm"}


class Larger(nn.Module):
    """Reads its width always, and a number that equals it on larger images alone."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.out = 16, 16
        self.one, self.head = nn.Conv2d(3, 16, 1), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.one(x).view(len(x), self.dim, -1).mean(2))
        return out.view(len(x), self.out // 4, 4).flatten(1) if x.shape[-1] > 8 else out


def test_a_number_that_the_example_does_not_read_stays() -> None:
    graph = check_elsewhere(Larger(), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 9, 9))
    assert [attribute.name for attribute in graph.size_attributes] == ["dim"]


class Decoder(nn.Module):
    """Writes each step into a tensor of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.cell, self.head = nn.Linear(5, 16), nn.GRUCell(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        state = x.new_zeros(len(x), self.cell.hidden_size)
        states = x.new_zeros(len(x), x.shape[1], self.cell.hidden_size)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
            states[:, step] = state
        out: Tensor = self.head(states)
        return out


def test_steps_that_are_written_one_by_one_leave_units_free() -> None:
    graph = check_elsewhere(Decoder(), torch.randn(2, 5, 5), torch.randn(3, 7, 5))
    assert {group.name for group in graph.groups if group.frozen is None} == {"one", "cell"}


class Turned(nn.Module):
    """Writes into a transposed view: no rule knows that."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(5, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        written = y.new_zeros(len(y), y.shape[1])
        written.t().copy_(y.t())
        out: Tensor = self.head(self.two(written).relu())
        return out


def test_a_write_that_no_rule_knows_freezes_that_place_alone() -> None:
    graph = check_elsewhere(Turned(), torch.randn(1, 5), torch.randn(4, 5))
    assert [group.units.size for group in graph.groups if group.frozen is None] == [12]


class Counting(nn.Module):
    """Counts in a plain tensor, keeps the last results, and cannot be copied with a lock."""

    def __init__(self, lock: object) -> None:
        super().__init__()
        self.one, self.head, self.lock = nn.Linear(5, 16), nn.Linear(16, 3), lock
        self.calls, self.last = torch.zeros(1), deque[float](maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last.append(1.0)
        out: Tensor = self.head(self.one(x).relu())
        return out


def test_plain_tensors_and_queues_are_left_as_they_were() -> None:
    net = Counting(None)
    analyse(net, torch.randn(2, 5))
    assert not net.calls
    assert not net.last


def test_a_network_that_cannot_be_copied_is_told_in_one_line() -> None:
    with pytest.raises(ModelError, match=r"Counting cannot be copied .*lock"):
        analyse(Counting(threading.Lock()), torch.randn(2, 5))


def around(block: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, WIDTH), block, nn.Linear(WIDTH, 3)).eval()


def free_sizes(graph: StructureGraph) -> list[int]:
    return sorted(len(group.units) for group in graph.groups if group.frozen is None)


class CheckedHeads(nn.Module):
    """As wav2vec2's attention: it compares its input's width, and its heads are as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = WIDTH, HEADS, WIDTH // HEADS
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        if width != self.embed_dim:
            msg = "unexpected width"
            raise ValueError(msg)
        qkv = self.qkv(x).chunk(3, -1)
        q, k, v = (t.view(b, n, self.num_heads, self.head_dim).transpose(1, 2) for t in qkv)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        result: Tensor = self.out(out.reshape(b, n, self.num_heads * self.head_dim))
        return result


def test_a_width_that_is_checked_is_the_streams_before_heads_are_tied_to_it() -> None:
    net, x = around(CheckedHeads()), torch.randn(2, TOKENS, 5)
    assert free_sizes(analyse(net, x)) == [HEADS, WIDTH, WIDTH]
    result = check_structure(net, x, seed=0, num_masks=3)
    assert result.num_compared
    assert not result.failures


class Chomped(nn.Module):
    """As a TCN: what is cut off at the end happens to be as long as the convolution is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.chomp_size = WIDTH

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.chomp_size]


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.chomp = nn.Conv1d(WIDTH, WIDTH, 7, padding=24, dilation=4), Chomped()

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        out: Tensor = (x + self.chomp(self.conv(x)).relu()).transpose(1, 2)
        return out


def test_a_number_that_is_as_large_as_a_width_by_chance_stays() -> None:
    net, x = around(Causal()), torch.randn(2, TOKENS, 5)
    assert sum(free_sizes(analyse(net, x))) >= WIDTH
    result = check_structure(net, x, seed=0, num_masks=3)
    assert result.num_compared
    assert not result.failures


class Fragile(nn.Module):
    """Fails, as a kernel that is not there on this machine."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError


class Guarded(nn.Module):
    """Tries a part that fails before it names a size of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.fast, self.hidden = nn.Conv2d(3, WIDTH, 3), Fragile(), WIDTH
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        try:
            x = self.fast(x)
        except RuntimeError:
            x = x.view(len(x), self.hidden, -1).mean(2)
        out: Tensor = self.out(x)
        return out


def test_a_part_that_fails_and_is_caught_is_left_again() -> None:
    graph = analyse(Guarded(), torch.randn(2, 3, 6, 6))
    assert [op.name for op in graph.ops] == ["one", "out"]
    assert free_sizes(graph) == [WIDTH]


class Recipe(nn.Module):
    """As einops' layers: what it reads is made again, when it is copied, of what it was given."""

    def __init__(self, **lengths: int) -> None:
        super().__init__()
        self.lengths = lengths
        self._lengths = tuple(lengths.items())

    def __getstate__(self) -> dict[str, object]:
        return {"lengths": self.lengths}

    def __setstate__(self, state: dict[str, dict[str, int]]) -> None:
        self.__init__(**state["lengths"])  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self._lengths[-1][1], -1)).transpose(1, 2)


class Nested(nn.Module):
    """Sizes are in tuples and dictionaries of names and numbers."""

    def __init__(self, **lengths: int) -> None:
        super().__init__()
        self.keys = Recipe(**lengths)
        self.split, self.merge = {"heads": HEADS, "rest": -1}, (("parts", (HEADS,)), ("rest", -1))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).chunk(3, -1)
        q, v = (t.view(b, n, self.split["heads"], -1).transpose(1, 2) for t in qkv[::2])
        k = self.keys(qkv[1])
        out: Tensor = F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2)
        result: Tensor = self.out(out.reshape(b, n, -1))
        return result


@pytest.mark.parametrize("lengths", [{"heads": HEADS}, {"m": HEADS}, {"k": HEADS, "m": HEADS}])
def test_sizes_inside_nested_containers_follow(lengths: dict[str, int]) -> None:
    net, x = around(Nested(**lengths)), torch.randn(2, TOKENS, 5)
    graph = analyse(net, x)
    assert free_sizes(graph) == [HEADS, WIDTH, WIDTH]
    heads = next(group for group in graph.groups if len(group.units) == HEADS)
    keep = graph.dense_mask().keep.copy()
    keep[heads.units[0]] = False
    pruned = apply_mask(net, graph, graph.mask(keep))
    assert pruned.get_submodule("1").split == {"heads": HEADS - 1, "rest": -1}
    assert torch.equal(copy.deepcopy(pruned)(x), pruned(x))
    assert net.get_submodule("1").split == {"heads": HEADS, "rest": -1}
    assert_masked_equals_pruned(net, graph, graph.mask(keep), x)


class Generator(nn.Module):
    """Divides the features of a linear layer into channels and their positions, last or first."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.channels = how, WIDTH
        self.dense, self.conv = nn.Linear(5, 16 * WIDTH), nn.ConvTranspose2d(WIDTH, 12, 4, 2, 1)
        self.unflatten, self.last = nn.Unflatten(1, (WIDTH, 4, 4)), nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense(x).relu()
        if self.how == "computed":
            x = x.view(len(x), -1, 4, 4)
        elif self.how == "attribute":
            x = x.view(-1, self.channels, 16).unflatten(2, (4, 4))
        elif self.how == "module":
            x = self.unflatten(x)
        elif self.how == "last":
            x = x.view(len(x), 4, 4, -1).permute(0, 3, 1, 2)
        else:
            x = x.view(-1, 24, 4, 4)
        out: Tensor = self.last(self.conv(x).relu())
        return out


@pytest.mark.parametrize("how", ["computed", "attribute", "module", "last"])
def test_features_divided_into_channels_and_positions_leave_by_channel(how: str) -> None:
    net = Generator(how)
    assert free_sizes(analyse(net, torch.randn(2, 5))) == [12, WIDTH]
    assert not check_structure(net, torch.randn(2, 5), seed=0).failures


def test_channels_whose_number_a_view_writes_out_stay_and_say_so() -> None:
    graph = analyse(Generator("literal"), torch.randn(2, 5))
    assert free_sizes(graph) == [12]
    assert "[-1, 24, 4, 4]" in str(graph.groups[1].frozen)


class Context(nn.Module):
    """Reads the last steps, of which there may be as many as a stream is wide."""

    def __init__(self, name: str, heads: str) -> None:
        super().__init__()
        self.name, self.heads = name, heads
        setattr(self, name, WIDTH)
        setattr(self, heads, HEADS)
        self.words, self.qkv = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words[:, -getattr(self, self.name) :])
        shape = (*x.shape[:2], getattr(self, self.heads), -1)
        q, k, v = (y.view(shape).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        out: Tensor = self.out(x + self.mix(y))
        return out


@pytest.mark.parametrize("name", ["seq_len", "context", "most"])
@pytest.mark.parametrize("heads", ["n_head", "h"])
def test_a_number_of_steps_that_equals_a_width_stays(name: str, heads: str) -> None:
    """By its name, or because the trial finds that it is no size; a size by any name follows."""
    net = Context(name, heads).eval()
    graph = analyse(net, torch.arange(20).view(2, 10))
    assert free_sizes(graph) == [HEADS, WIDTH]
    keep = graph.dense_mask().keep.copy()
    keep[np.flatnonzero(graph.free)[::3]] = False
    longer = torch.arange(80).view(2, 40) % 50
    pruned = apply_mask(net, graph, graph.mask(keep))
    masked = zero_mask(net, graph, graph.mask(keep))
    torch.testing.assert_close(pruned(longer), masked(longer))
    assert getattr(pruned, name) == WIDTH
    assert getattr(pruned, heads) < HEADS


@dataclass(frozen=True)
class Settings:
    """Of several modules; two numbers are alike."""

    n_head: int = HEADS
    n_layer: int = HEADS
    width: int = WIDTH // HEADS


class Configured(nn.Module):
    """Attention that asks an object of settings for its sizes."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config: Any = config
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:2], self.config.n_head, self.config.width).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out: Tensor = self.mix(y.reshape(*x.shape[:2], self.config.n_head * self.config.width))
        return out


@pytest.mark.parametrize("config", [Settings(), SimpleNamespace(**vars(Settings()))])
def test_sizes_in_an_object_of_settings_follow(config: Any) -> None:
    net = around(Configured(config)).eval()
    example = torch.randn(2, TOKENS, 5)
    graph = analyse(net, example)
    assert HEADS in free_sizes(graph)
    found = check_structure(net, example, seed=0, num_masks=3)
    assert not found.failures
    keep = graph.dense_mask().keep.copy()
    (heads,) = [group for group in graph.groups if group.units.size == HEADS]
    keep[heads.units[0]] = False
    pruned = apply_mask(net, graph, graph.mask(keep))
    (attention,) = [module for module in pruned.modules() if isinstance(module, Configured)]
    assert (attention.config.n_head, attention.config.width) == (HEADS - 1, WIDTH // HEADS)
    assert config.n_head == HEADS


@pytest.mark.parametrize(
    ("count", "width"), [("n_head", "d_head"), ("h", "d_k"), ("H", "D"), ("n_heads", "dh")]
)
def test_heads_that_are_as_many_as_each_is_wide_are_told_by_names(count: str, width: str) -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, count, HEADS)
            setattr(self, width, HEADS)
            self.query, self.mix = nn.Linear(WIDTH, 48), nn.Linear(16, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                y.view(*x.shape[:2], getattr(self, count), getattr(self, width)).transpose(1, 2)
                for y in self.query(x).chunk(3, -1)
            )
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], -1)
            out: Tensor = self.mix(y)
            return out

    net, example = around(Square()).eval(), torch.randn(2, TOKENS, 5)
    assert HEADS in free_sizes(analyse(net, example))
    assert not check_structure(net, example, seed=0, num_masks=3).failures


def test_sizes_of_parts_follow_whatever_their_tuple_is_called() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.split_indexes = (6, 6, 6, 6)
            self.one, self.two = (nn.Conv2d(6, 6, 3, padding=1, groups=6) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            first, second, *others = torch.split(x, self.split_indexes, dim=1)
            return torch.cat((self.one(first), self.two(second), *others), 1)

    net = nn.Sequential(nn.Conv2d(3, 24, 1), Parts(), nn.Conv2d(24, 5, 1)).eval()
    example = torch.randn(2, 3, 8, 8)
    assert free_sizes(analyse(net, example)) == [6]
    assert not check_structure(net, example, seed=0, num_masks=3).failures


class Shared:
    """Settings, and what the network writes for its layers."""

    def __init__(self) -> None:
        self.n_head, self.width, self.bias = HEADS, WIDTH // HEADS, torch.zeros(())


class Written(Configured):
    def forward(self, x: Tensor) -> Tensor:
        self.config.bias = x.mean()
        return super().forward(x) + self.config.bias


def test_settings_that_a_forward_writes_stay_one_object() -> None:
    net, example = around(Written(Shared())).eval(), torch.randn(2, TOKENS, 5)
    assert HEADS not in free_sizes(analyse(net, example))


class Scaled(Configured):
    """As transformers' attention asks for what its settings may lack."""

    def forward(self, x: Tensor) -> Tensor:
        scale: float = getattr(self.config, "scale", 1.0)
        return super().forward(x) * scale


class HandedOn(Configured):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + read_bias(self.config)


def read_bias(config: Any) -> Tensor:
    bias: Tensor = config.bias
    return bias


class Resettable(nn.Module):
    """Writes into the settings of its part, as transformers' networks may."""

    def __init__(self, part: Configured) -> None:
        super().__init__()
        self.part, self.config = around(part), part.config

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.part(x)
        return out

    def reset(self, bias: Tensor) -> None:
        self.config.bias = bias


def test_settings_are_copied_where_the_part_reads_nothing_that_is_written() -> None:
    net, example = Resettable(Scaled(Shared())).eval(), torch.randn(2, TOKENS, 5)
    assert HEADS in free_sizes(analyse(net, example))
    assert not check_structure(net, example, seed=0, num_masks=3).failures


def test_settings_that_a_part_hands_on_stay_one_object() -> None:
    net, example = Resettable(HandedOn(Shared())).eval(), torch.randn(2, TOKENS, 5)
    assert HEADS not in free_sizes(analyse(net, example))


def test_a_class_of_settings_is_left_alone() -> None:
    net, example = around(Configured(Settings)).eval(), torch.randn(2, TOKENS, 5)
    assert HEADS not in free_sizes(analyse(net, example))
    assert Settings.n_head == HEADS


def test_a_size_is_one_whatever_its_name_where_the_forward_needs_it() -> None:
    class Decoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code_len, self.one = 16, nn.Linear(8, 16 * 9)
            self.two = nn.ConvTranspose2d(16, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(self.one(x).relu().view(-1, self.code_len, 3, 3))
            return out

    assert free_sizes(analyse(Decoded().eval(), torch.randn(2, 8))) == [16]
