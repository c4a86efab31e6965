"""Units of recurrent layers leave: every gate's row, the column of the recurrent weight."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from prunegraph.graph import analyse
from prunegraph.graph.structure import StructureGraph
from prunegraph.graph.surgery import apply_mask
from prunegraph.testing import assert_masked_equals_pruned

X = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
"""``[batch, channels, steps]``"""

Read = Callable[[nn.Module, Tensor], Tensor]


def last(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x)[0]
    return out[:, -1]


def both_ends(layer: nn.Module, x: Tensor) -> Tensor:
    hidden: Tensor = layer(x)[1][0]
    return torch.cat([hidden[-2], hidden[-1]], 1)


def summed_directions(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x)[0]
    return out.unflatten(-1, (2, -1)).sum(2)


def packed(layer: nn.Module, x: Tensor) -> Tensor:
    sequence = pack_padded_sequence(x, [6, 4], batch_first=True)
    out, _ = pad_packed_sequence(layer(sequence)[0], batch_first=True)
    return out.mean(1)


def step_by_step(cell: nn.Module, x: Tensor) -> Tensor:
    state = None
    for step in x.unbind(1):
        state = cell(step, state)
    out: Tensor = state[0] if isinstance(state, tuple) else state
    return out


class Sequences(nn.Module):
    """A convolution over time, a recurrent layer, a classifier."""

    def __init__(self, layer: nn.Module, read: Read = last, width: int = 6) -> None:
        super().__init__()
        self.conv, self.layer = nn.Conv1d(3, 8, 3, padding=1), layer
        self.head, self.read = nn.Linear(width, 5), read

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.read(self.layer, self.conv(x).tanh().transpose(1, 2)))
        return out


class OwnState(nn.Module):
    """Makes the first state itself, as tutorials do."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.layers = 6, 2
        self.conv, self.head = nn.Conv1d(3, 8, 3, padding=1), nn.Linear(6, 5)
        self.gru = nn.GRU(8, self.hidden, self.layers, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        first = x.new_zeros(self.layers, len(x), self.hidden)
        out, _ = self.gru(self.conv(x).tanh().transpose(1, 2), first)
        scores: Tensor = self.head(out)
        return scores


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Sequences(nn.LSTM(8, 6, batch_first=True)),
    "no_bias": lambda: Sequences(nn.LSTM(8, 6, batch_first=True, bias=False)),
    "two_layers": lambda: Sequences(
        nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True), width=12
    ),
    "gru": lambda: Sequences(nn.GRU(8, 6, 2, batch_first=True, bidirectional=True), width=12),
    "rnn": lambda: Sequences(nn.RNN(8, 6, batch_first=True)),
    "both_ends": lambda: Sequences(
        nn.LSTM(8, 6, batch_first=True, bidirectional=True), both_ends, 12
    ),
    "summed": lambda: Sequences(
        nn.GRU(8, 6, batch_first=True, bidirectional=True), summed_directions
    ),
    "packed": lambda: Sequences(nn.LSTM(8, 6, batch_first=True), packed),
    "lstm_cell": lambda: Sequences(nn.LSTMCell(8, 6), step_by_step),
    "gru_cell": lambda: Sequences(nn.GRUCell(8, 6), step_by_step),
    "own_state": OwnState,
}


def without(graph: StructureGraph, rng: np.random.Generator) -> np.ndarray:
    keep = np.ones(graph.num_classes, dtype=bool)
    for group in graph.groups:
        if group.frozen is None:
            removed = rng.integers(1, len(group.classes) - group.min_keep + 1)
            keep[rng.permutation(group.classes)[:removed]] = False
    return keep


@pytest.mark.parametrize("name", NETWORKS)
def test_units_leave_with_their_gates(name: str) -> None:
    torch.manual_seed(0)
    net = NETWORKS[name]().eval()
    graph = analyse(net, X)
    free = {group.name: group.classes.size for group in graph.groups if group.frozen is None}
    assert free == {"conv": 8, "gru" if name == "own_state" else "layer": 6}
    for seed in range(3):
        mask = graph.mask(without(graph, np.random.default_rng(seed)))
        assert_masked_equals_pruned(net, graph, mask, X)
        pruned = apply_mask(net, graph, mask)
        pruned.train()(X).sum().backward()
        assert analyse(pruned, X).dense_cost == graph.cost(mask)


@pytest.mark.parametrize("name", ["lstm", "two_layers", "both_ends"])
def test_a_fused_layer_has_the_structure_of_one_that_runs_step_by_step(name: str) -> None:
    net = NETWORKS[name]().eval()
    fused = analyse(net, X)
    stepwise = analyse(net.double(), X.double())
    assert [op.name for op in fused.ops] == [op.name for op in stepwise.ops]
    assert fused.fingerprint() == stepwise.fingerprint()


def test_a_projecting_layer_keeps_its_units_but_not_all_that_it_reads() -> None:
    with pytest.warns(UserWarning, match="projections"):
        graph = analyse(Sequences(nn.LSTM(8, 6, batch_first=True, proj_size=4), width=4), X)
    assert [group.name for group in graph.groups if group.frozen is None] == ["conv"]
    assert "projects its units" in {item.reason for item in graph.frozen_ops}.pop()
