"""Units of recurrent layers leave: every gate's row, the column of the recurrent weight."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from prunegraph.graph import analyse
from prunegraph.graph.graph import StructureGraph
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
    "custom_state": OwnState,
}


def without(graph: StructureGraph, rng: np.random.Generator) -> np.ndarray:
    keep = np.ones(graph.num_units, dtype=bool)
    for group in graph.groups:
        if group.frozen is None:
            removed = rng.integers(1, len(group.units) - group.min_keep + 1)
            keep[rng.permutation(group.units)[:removed]] = False
    return keep


@pytest.mark.parametrize("name", NETWORKS)
def test_units_leave_with_their_gates(name: str) -> None:
    torch.manual_seed(0)
    net = NETWORKS[name]().eval()
    graph = analyse(net, X)
    free = {group.name: group.units.size for group in graph.groups if group.frozen is None}
    assert free == {"conv": 8, "gru" if name == "custom_state" else "layer": 6}
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


class OwnCell(nn.Module):
    """A gated recurrent unit, written out."""

    def __init__(self, read: int, hidden: int) -> None:
        super().__init__()
        self.read, self.recur = nn.Linear(read, 3 * hidden), nn.Linear(hidden, 3 * hidden)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        x_reset, x_keep, x_new = self.read(x).chunk(3, 1)
        h_reset, h_keep, h_new = self.recur(state).chunk(3, 1)
        keep = torch.sigmoid(x_keep + h_keep)
        new = torch.tanh(x_new + torch.sigmoid(x_reset + h_reset) * h_new)
        return new + keep * (state - new)


class OwnGRU(nn.Module):
    def __init__(self, hidden: int | None = 10) -> None:
        super().__init__()
        self.hidden_size = hidden
        self.cell, self.head = OwnCell(3, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), self.hidden_size or 10)
        for step in x.unbind(2):
            state = self.cell(step, state)
        out: Tensor = self.head(state)
        return out


class ConvLSTMCell(nn.Module):
    """Shi et al. 2015 (arXiv 1506.04214), without peepholes."""

    def __init__(self, read: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.gates = nn.Conv1d(read + hidden_dim, 4 * hidden_dim, 3, padding=1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        parts = self.gates(torch.cat([x, state[0]], 1)).split(self.hidden_dim, 1)
        read, forget, out = (torch.sigmoid(part) for part in parts[:3])
        cell = forget * state[1] + read * torch.tanh(parts[3])
        return out * torch.tanh(cell), cell

    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        zeros = x.new_zeros(len(x), self.hidden_dim, x.shape[2])
        return zeros, zeros


class ConvLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([ConvLSTMCell(3, 8), ConvLSTMCell(8, 12)])
        self.head = nn.Conv1d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        steps = [x, x.flip(2), x.roll(1, 2)]
        for cell in self.cells:
            assert isinstance(cell, ConvLSTMCell)
            state, made = cell.first(x), []
            for step in steps:
                state = cell(step, state)
                made.append(state[0])
            steps = made
        out: Tensor = self.head(steps[-1])
        return out


class Peephole(nn.Module):
    """A cell that is told its size, and keeps weights of zeros that it makes once."""

    peephole: Tensor | None

    def __init__(self, read: int, hidden: int) -> None:
        super().__init__()
        self.read, self.recur = nn.Linear(read, hidden), nn.Linear(hidden, hidden, bias=False)
        self.peephole = None

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        assert self.peephole is not None
        keep = torch.sigmoid(self.read(x) + self.recur(state) + state * self.peephole)
        return keep * state + (1 - keep) * torch.tanh(self.read(x))

    def begin(self, size: int, count: int) -> Tensor:
        if self.peephole is None:
            self.peephole = torch.zeros(1, count)
        return torch.zeros(size, count)


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden_channels = [8, 5]
        self.cells = nn.ModuleList([Peephole(3, 8), Peephole(8, 5)])
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        states = [
            cell.begin(len(x), count)  # type: ignore[operator]
            for cell, count in zip(self.cells, self.hidden_channels, strict=True)
        ]
        for step in x.unbind(2):
            for place, cell in enumerate(self.cells):
                states[place] = step = cell(step, states[place])
        out: Tensor = self.head(step)
        return out


class Recurrence(nn.Module):
    """Channels that decay, each by itself, from zeros that no layer reads (S4, minGRU)."""

    def __init__(self) -> None:
        super().__init__()
        self.d_model = 9
        self.embed, self.keep = nn.Linear(3, 9), nn.Linear(9, 9)
        self.decay, self.head = nn.Parameter(torch.rand(9)), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), self.d_model)
        for step in self.embed(x.transpose(1, 2)).unbind(1):
            state = state * self.decay + torch.sigmoid(self.keep(step)) * step
        out: Tensor = self.head(state)
        return out


@pytest.mark.parametrize(
    ("make", "widths"), [(OwnGRU, [10]), (ConvLSTM, [8, 12]), (Stacked, [8, 5]), (Recurrence, [9])]
)
def test_cells_of_ones_own_begin_with_as_many_zeros(
    make: Callable[[], nn.Module],
    widths: list[int],
    check_all: Callable[[nn.Module, Tensor], StructureGraph],
) -> None:
    torch.manual_seed(0)
    graph = check_all(make(), X)
    assert [len(group.units) for group in graph.groups if group.frozen is None] == widths
    assert not graph.frozen_ops


def test_a_cell_that_begins_with_a_literal_number_of_zeros_stays_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.Conv1d(3, 3, 1), OwnGRU(None)).eval()
    graph = analyse(model, X)
    frozen = [group for group in graph.groups if len(group.units) == 10]
    assert [group.frozen is not None for group in frozen] == [True]


class Coordinates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv1d(3, 6, 1), nn.Conv1d(8, 6, 1)
        self.head = nn.Conv1d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        where = torch.linspace(-1, 1, 6).expand(len(x), 2, 6)
        out: Tensor = self.head(self.after(torch.cat([self.before(x), where], 1)))
        return out


def test_constants_that_no_layer_makes_stay(
    check_all: Callable[[nn.Module, Tensor], StructureGraph],
) -> None:
    torch.manual_seed(0)
    graph = check_all(Coordinates(), X)
    assert [len(group.units) for group in graph.groups if group.frozen is None] == [6, 6]
    assert [item.reason for item in graph.frozen_ops] == ["a channel of constants, or one alone"]
