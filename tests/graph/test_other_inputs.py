"""Networks that a pruned copy could follow on the example and not elsewhere."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunegraph as pg
from prunegraph.core.errors import ModelError, SurgeryError
from prunegraph.core.masks import ChannelMask
from prunegraph.graph import StructureGraph
from prunegraph.graph.apply import unequal


def frozen(graph: StructureGraph, name: str) -> str | None:
    return next(group.frozen for group in graph.groups if group.name == name)


def keep(graph: StructureGraph, number: int) -> ChannelMask:
    """Return a mask that keeps as many classes of each free group, or its minimum."""
    bits, rng = np.ones(graph.num_units, dtype=bool), np.random.default_rng(0)
    for group in graph.groups:
        if group.frozen is None:
            removed = len(group.units) - max(number, group.min_keep)
            bits[rng.permutation(group.units)[: max(removed, 0)]] = False
    return graph.mask(bits)


def check_same(net: nn.Module, graph: StructureGraph, mask: ChannelMask, *inputs: Tensor) -> None:
    pruned, masked = pg.apply_mask(net, graph, mask), pg.zero_mask(net, graph, mask)
    with torch.no_grad():
        torch.testing.assert_close(pruned(*inputs), masked(*inputs), rtol=1e-4, atol=1e-5)


class Widens(nn.Module):
    """Projects its input if it has as many channels as it returns, or adds it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 32)
        self.side, self.out, self.way = nn.Linear(16, 32), nn.Linear(32, 6), way

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        y = self.two(x).relu()
        if self.way == "project":
            y = y + (self.side(x) if x.shape[1] != y.shape[1] else x)
        elif x.shape == y.shape:
            y = y + x
        x = self.out(y)
        return x if self.way == "add" else x.masked_fill(torch.arange(6) == 2, -math.inf)


@pytest.mark.parametrize("way", ["project", "add", "add, illegal actions"])
def test_forwards_that_compare_widths(way: str) -> None:
    torch.manual_seed(0)
    net, x = Widens(way).eval(), torch.randn(4, 8)
    graph = pg.analyse(net, x)
    assert graph.free.any()
    for number in (1, 2, 5, 8, 16):
        check_same(net, graph, keep(graph, number), x)


class Norm(nn.Module):
    """A layer norm with the deviation of a sample, which one channel has none of."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)


def test_two_channels_stay_where_one_gives_no_number() -> None:
    net, x = nn.Sequential(nn.Linear(8, 16), Norm(), nn.Linear(16, 4)).eval(), torch.randn(4, 8)
    graph = pg.analyse(net, x)
    assert pg.apply_mask(net, graph, keep(graph, 1))(x).isfinite().all()


class Classes(nn.Module):
    """Says how sure it is, and perhaps of what."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.one, self.two, self.way = nn.Linear(8, 16), nn.Linear(16, 6), way
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> object:
        score, place = self.two(self.one(x).relu()).max(1)
        if self.way == "returned":
            return score, place
        return self.out(x) * ((place > 2) if self.way == "used" else score)[:, None]


@pytest.mark.parametrize("way", ["returned", "used", "left"])
def test_positions_of_maxima_are_numbers_of_channels(way: str) -> None:
    graph = pg.analyse(Classes(way).eval(), torch.randn(4, 8))
    assert (frozen(graph, "two") is None) == (way == "left")
    assert frozen(graph, "one") is None


class Padded(nn.Module):
    """Torch's encoder on sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.embed, self.encoder = nn.Embedding(50, 32), nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(32, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.encoder(self.embed(tokens), src_key_padding_mask=tokens == 0)
        out: Tensor = self.out(hidden[:, 0])
        return out


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_takes_padding_as_its_user_runs_it() -> None:
    net, tokens = Padded().eval(), torch.randint(1, 50, (4, 10))
    tokens[1:, 6:] = 0
    graph = pg.analyse(net, tokens)
    check_same(net, graph, keep(graph, 3), tokens)


class Scaled(nn.Module):
    """Attention whose scale is a width of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(40, 16), nn.Linear(16, 40)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        query = 4 * self.query(x)
        maps = (query @ self.key(x).transpose(-2, -1) / query.size(-1) ** 0.5).softmax(-1)
        out: Tensor = self.out(x + maps @ self.value(x))
        return out


@pytest.mark.parametrize("first", [0, 1, 7])
def test_tokens_that_are_all_alike_hide_no_mistake(first: int) -> None:
    torch.manual_seed(0)
    for tokens in (torch.full((1, 8), first), torch.arange(8)[None]):
        assert frozen(pg.analyse(Scaled().eval(), tokens), "query") is not None


def test_a_mask_of_ones_stays_one() -> None:
    """Noise in its place would leave one token of each row, whose score does not matter."""

    class Masked(Scaled):
        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            x, bias = self.embed(tokens), (1 - mask[:, None]) * -1e4
            query = 4 * self.query(x)
            scores = query @ self.key(x).transpose(-2, -1) / query.size(-1) ** 0.5
            out: Tensor = self.out(x + (scores + bias).softmax(-1) @ self.value(x))
            return out

    graph = pg.analyse(Masked().eval(), (torch.arange(8)[None], torch.ones(1, 8)))
    assert frozen(graph, "query") is not None


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_inputs_and_inputs_with_gaps_are_taken() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            x = torch.cat([x[:, :2].nan_to_num(), x[:, 2:]], 1)
            x = torch.sparse.mm(edges, self.one(x)).relu()
            return torch.sparse.mm(edges, self.two(x))

    x = torch.randn(6, 4)
    x[0, 0] = math.nan
    graph = pg.analyse(Graph().eval(), (x, torch.eye(6).to_sparse_csr()))
    assert frozen(graph, "one") is None
    with pytest.raises(ModelError, match="returns NaN: check weights and example inputs"):
        pg.analyse(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), x)


def test_scores_that_hardly_differ_before_training_hide_no_mistake() -> None:
    net = Scaled().eval()
    for parameter in net.parameters():
        _ = nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else parameter.data.zero_()
    assert frozen(pg.analyse(net, torch.arange(8)[None]), "query") is not None


class Bytes(nn.Module):
    """Pads with a number that is as large as its width."""

    def __init__(self) -> None:
        super().__init__()
        self.pad_id, self.embed = 64, nn.Embedding(65, 64)
        self.one, self.out = nn.Linear(64, 64), nn.Linear(64, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        b, n = tokens.shape
        real = (tokens != self.pad_id)[..., None]
        x = self.one(self.embed(tokens).view(b * n, -1)).relu().view(b, n, -1) * real
        out: Tensor = self.out(x.sum(1) / real.sum(1))
        return out


def test_a_number_of_a_token_is_no_width() -> None:
    net, tokens = Bytes().eval(), torch.randint(0, 64, (2, 12))
    graph = pg.analyse(net, tokens)
    tokens[:, 5:] = 64
    check_same(net, graph, keep(graph, 20), tokens)


class Hooked(nn.Module):
    """Uses what a hook has written into it, by a name that its copies do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 4)
        self.kept: dict[str, Tensor] = {}
        self.one.register_forward_hook(lambda _, __, out: self.kept.update(mid=out.sum(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu()) * self.kept["mid"].sigmoid()[:, None]


@pytest.mark.parametrize("run_before", [False, True])
def test_hooks_that_write_into_the_network_that_was_copied(run_before: bool) -> None:
    net, x = Hooked().eval(), torch.randn(4, 8)
    if run_before:
        net(x)
    with pytest.raises(ModelError, match="a copy of Hooked computes with"):
        pg.analyse(net, x)


class Longest(nn.Module):
    """Mixes as many tokens as there are, by a part of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.mix, self.out = nn.Linear(8, 16), nn.Linear(24, 24), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, x = x.shape[1], self.one(x).relu()
        mixed = F.linear(x.transpose(1, 2), self.mix.weight[:n, :n], self.mix.bias[:n])
        out: Tensor = self.out(x + mixed.transpose(1, 2))
        return out


def test_what_the_example_does_not_read_of_a_weight_stays() -> None:
    net = Longest().eval()
    graph = pg.analyse(net, torch.randn(2, 6, 8))
    assert [group.name for group in graph.groups if group.frozen is None] == ["one"]
    check_same(net, graph, keep(graph, 5), torch.randn(2, 20, 8))


class Answer:
    """A record of the user's own."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean


class Instances:
    """One that holds fields, and itself."""

    def __init__(self, mean: Tensor) -> None:
        self.fields, self.origin = {"means": [mean]}, self


class Slots:
    """One without a dictionary."""

    __slots__ = ("mean",)

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean


def squashed(mean: Tensor) -> torch.distributions.Distribution:
    normal = torch.distributions.Normal(mean, torch.ones(()), validate_args=False)
    turns = [torch.distributions.TanhTransform()]
    return torch.distributions.TransformedDistribution(normal, turns, validate_args=False)


def distribution(mean: Tensor) -> torch.distributions.Distribution:
    return torch.distributions.Normal(mean, torch.ones(()), validate_args=False)


@pytest.mark.parametrize("record", [Answer, distribution, Instances, Slots, squashed])
def test_what_other_objects_hold_is_an_output(record: Callable[[Tensor], object]) -> None:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.mean, self.value = nn.Linear(8, 16), nn.Linear(16, 6), nn.Linear(16, 1)

        def forward(self, x: Tensor) -> tuple[object, Tensor]:
            x = self.one(x).tanh()
            return record(self.mean(x)), self.value(x)

    graph = pg.analyse(Policy().eval(), torch.randn(4, 8))
    assert frozen(graph, "mean") == "model output"


class Merging(nn.Linear):
    """Adds a part of its own to its weight while it evaluates, as LoRA does."""

    def train(self, mode: bool = True) -> "Merging":
        if mode != self.training:
            self.weight.data += -1.0 if mode else 1.0
        super().train(mode)
        return self


def test_recalibration_lets_modules_hear_that_training_goes_on() -> None:
    net = nn.Sequential(Merging(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)).train()
    before = net[0].weight.clone()
    pg.recalibrate_bn(net, [torch.randn(32, 8)])
    assert net[0].training
    torch.testing.assert_close(net[0].weight, before)


class Counting(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.two(self.one(x).relu())
        return out


def test_the_run_that_checks_a_pruned_network_leaves_nothing_in_it() -> None:
    net, x = Counting().eval(), torch.randn(4, 8)
    graph = pg.analyse(net, x)
    assert pg.apply_mask(net, graph, keep(graph, 4), example_inputs=x).calls == 0


def test_errors_of_any_class_are_one_line() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != 16:
                raise Exception(f"16 wanted, not {x.shape[1]}")  # noqa: EM102
            return self.one(x).relu()

    net = nn.Sequential(nn.Linear(3, 16), Picky(), nn.Linear(16, 8), nn.Linear(8, 4))
    assert "16 wanted" in str(frozen(pg.analyse(net.eval(), torch.randn(2, 3)), "0"))


class Asks(nn.Module):
    """Does something else if a layer has one certain width."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        out: Tensor = self.two(2 * x if x.shape[1] == 5 else x)
        return out


def test_a_mask_that_changes_what_is_computed_is_refused() -> None:
    net, x = Asks().eval(), torch.randn(4, 8)
    graph = pg.analyse(net, x)
    pg.apply_mask(net, graph, keep(graph, 6), example_inputs=x)
    with pytest.raises(SurgeryError, match=r"Asks cannot follow this mask: .*something else"):
        pg.apply_mask(net, graph, keep(graph, 5), example_inputs=x)


def test_a_mask_that_changes_what_is_computed_is_told_in_a_line() -> None:
    net, x = Asks().eval(), torch.randn(4, 8)
    graph = pg.analyse(net, x)
    told = unequal(net, graph, keep(graph, 5), x)
    assert told is not None
    assert told.startswith("Asks cannot follow this mask")


class Shared(nn.Module):
    """One layer several times, as ALBERT has it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.layers, self.out = nn.ModuleList([layer] * 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.out(x.mean(1))
        return out


@pytest.mark.parametrize("attention", ["head", "width"])
def test_a_layer_under_several_names_stays_one(attention: str) -> None:
    net, x = Shared().eval(), torch.randn(2, 5, 16)
    graph = pg.analyse(net, x, attention=attention)
    pruned = pg.apply_mask(net, graph, keep(graph, 3), example_inputs=x)
    assert len({id(layer.self_attn) for layer in pruned.layers}) == 1
    assert frozen(graph, "layers.0.self_attn") is None
