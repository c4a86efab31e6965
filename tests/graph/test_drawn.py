"""Networks on the meta device: structure, costs and proof without values."""

import pytest
import torch
from torch import Tensor, nn

import prunegraph as pg
from prunegraph.core.errors import ConfigError, ModelError
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.late_weights import LateWeight
from prunegraph.graph.trace.calls import WatchedCalls


class Reader(nn.Module):
    """An embedding, an encoder, a literal size or none, a normalised convolution."""

    def __init__(self, literal: bool = False) -> None:
        super().__init__()
        self.embed, self.literal = nn.Embedding(300, 64), literal
        self.encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.conv, self.norm = nn.Conv1d(64, 80, 3, padding=1), nn.BatchNorm1d(80)
        self.head = nn.Linear(160, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.conv(self.encoder(self.embed(tokens)).transpose(1, 2))).relu()
        x = torch.cat([x.mean(2), x.amax(2)], 1)
        out: Tensor = self.head(x.view(-1, 160) if self.literal else x)
        return out


def _told(graph: StructureGraph) -> object:
    groups = [(g.name, len(g.units), g.min_keep, g.frozen, g.members) for g in graph.groups]
    return graph.dense_cost, groups, graph.fingerprint()


@pytest.mark.parametrize("literal", [False, True])
def test_a_network_without_values_has_the_structure_of_one_with_them(literal: bool) -> None:
    torch.manual_seed(0)
    tokens = torch.arange(12).view(2, 6)
    graph = analyse(Reader(literal).eval(), tokens)
    assert graph.proof == "own weights"
    with torch.device("meta"):
        empty = Reader(literal).eval()
    for example in (tokens, tokens.to("meta")):
        found = analyse(empty, example)
        assert _told(found) == _told(graph)
        assert found.proof == "drawn weights"
    assert bool(graph.groups[-2].frozen) is literal
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert analyse(empty, tokens, trial=False).proof == "none"


def test_its_mask_cuts_the_network_with_values() -> None:
    torch.manual_seed(0)
    model, tokens = Reader().eval(), torch.arange(12).view(2, 6)
    with torch.device("meta"):
        empty = Reader().eval()
    graph = analyse(empty, tokens)
    mask = graph.project(torch.rand(graph.num_units).numpy(), pg.Budget(keep_macs=0.5))
    small = pg.apply_mask(model, graph, mask, example_inputs=tokens)  # compares with the masked one
    assert sum(p.numel() for p in small.parameters()) == graph.cost(mask).params


def test_large_weights_have_no_memory_while_the_forward_runs() -> None:
    with torch.device("meta"):
        model = Reader().eval()
    sizes: list[int] = []

    def note(_: object, given: list[object], __: object) -> None:
        weights = [item for item in given if isinstance(item, nn.Parameter)]
        real = (item for item in weights if not (item.is_meta or isinstance(item, LateWeight)))
        sizes.extend(item.numel() for item in real)

    with WatchedCalls(note):
        analyse(model, torch.arange(12).view(2, 6))
    assert sizes
    assert max(sizes) <= 4096


class Shuffled(nn.Module):
    """Picks channels by a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("order", torch.arange(8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x)[:, self.order])
        return out


def test_what_cannot_be_drawn_is_refused() -> None:
    with torch.device("meta"):
        model = Shuffled().eval()
    with pytest.raises(ModelError, match="order is on the meta device and may name positions"):
        analyse(model, torch.randn(2, 4))
    model.order = torch.arange(8)
    with pytest.raises(ModelError, match="nothing to prune: the forward needs its full width"):
        analyse(model, torch.randn(2, 4))  # with its values the index is read


def test_analysing_where_new_tensors_have_no_values() -> None:
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        with pytest.raises(ConfigError, match=r"leave torch.device\('meta'\)"):
            analyse(empty, torch.ones(1, 3))
