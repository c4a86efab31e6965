"""States that begin with constants: of an attribute further out, gated, joined and stacked."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.graph.graph import StructureGraph

X = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
"""``[batch, steps, features]``"""


class Deep(nn.Module):
    """A cell above another, the states of both of one attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.nhid = 8
        self.cells = nn.ModuleList([nn.LSTMCell(5, 8), nn.LSTMCell(8, 8)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        states = [(x.new_zeros(len(x), self.nhid),) * 2 for _ in self.cells]
        for step in x.unbind(1):
            below = step
            for place, cell in enumerate(self.cells):
                states[place] = cell(below, states[place])
                below = states[place][0]
        out: Tensor = self.head(below)
        return out


class BothWays(nn.Module):
    """Two cells of one attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.units = 8
        self.forth, self.back = nn.GRUCell(5, 8), nn.GRUCell(5, 8)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        forth = back = x.new_zeros(len(x), self.units)
        for step in range(x.shape[1]):
            forth, back = self.forth(x[:, step], forth), self.back(x[:, -1 - step], back)
        out: Tensor = self.head(torch.cat([forth, back], 1))
        return out


class Decaying(nn.Module):
    """No cells, but two states of one attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 8
        self.slow, self.fast, self.head = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        slow, fast = x.new_zeros(len(x), self.hidden), x.new_zeros(len(x), self.hidden)
        for step in x.unbind(1):
            slow, fast = 0.9 * slow + self.slow(step), 0.5 * fast + self.fast(step)
        out: Tensor = self.head(torch.cat([slow, fast], 1))
        return out


class Gated(nn.Module):
    """The state is dropped where an input says that an episode is done."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 8
        self.embed, self.cell, self.head = nn.Linear(5, 10), nn.GRUCell(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), self.hidden_size)
        for step in x.unbind(1):
            state = self.cell(self.embed(step).relu(), state * (1 - step[:, :1].sigmoid()))
        out: Tensor = self.head(state)
        return out


class Wrapped(nn.Module):
    """A torch layer inside a module, its state made outside."""

    class Inner(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
            out: Tensor = self.layer(x, state)[0]
            return out

    def __init__(self) -> None:
        super().__init__()
        self.d_inner = 8
        self.inner, self.head = self.Inner(nn.LSTM(5, 8, batch_first=True)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        zeros = x.new_zeros(1, len(x), self.d_inner)
        out: Tensor = self.head(self.inner(x, (zeros, zeros)))
        return out


class Sequencer(nn.Module):
    """Layers of torch's as wide as each other, which begin with zeros of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 8
        self.embed, self.head = nn.Linear(5, 10), nn.Linear(32, 3)
        self.down = nn.LSTM(10, 8, batch_first=True, bidirectional=True)
        self.right = nn.LSTM(10, 8, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        out: Tensor = self.head(torch.cat([self.down(x)[0], self.right(x.flip(1))[0]], 2))
        return out


class Padded(nn.Module):
    """Zeros before the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 12
        self.embed, self.conv, self.head = nn.Linear(5, 12), nn.Conv1d(12, 9, 3), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(1, 2)
        x = torch.cat([x.new_zeros(len(x), self.dim, 2), x], 2)
        out: Tensor = self.head(self.conv(x).relu().transpose(1, 2))
        return out


class Stacked(nn.Module):
    """All states, the first one too, are read by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 12
        self.cell, self.read, self.head = nn.GRUCell(5, 12), nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        states = [x.new_zeros(len(x), self.hidden)]
        for step in x.unbind(1):
            states.append(self.cell(step, states[-1]))
        out: Tensor = self.head(self.read(torch.stack(states, 1)).tanh().mean(1))
        return out


class Blurred(nn.Module):
    """One stored kernel is repeated for as many channels as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 12
        self.conv, self.head = nn.Conv1d(5, 12, 3), nn.Conv1d(12, 4, 1)
        self.register_buffer("kernel", torch.rand(1, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.get_buffer("kernel").repeat(self.channels, 1, 1)
        blurred = F.conv1d(self.conv(x.transpose(1, 2)), kernel, groups=self.channels)
        out: Tensor = self.head(blurred)
        return out


@pytest.mark.parametrize(
    ("make", "widths"),
    [
        (Deep, [8]),
        (BothWays, [8]),
        (Decaying, [8]),
        (Gated, [8, 10]),
        (Wrapped, [8]),
        (Sequencer, [8, 8, 10]),
        (Padded, [9, 12]),
        (Stacked, [10, 12]),
        (Blurred, [12]),
    ],
)
def test_the_attribute_that_says_how_many_follows(
    make: Callable[[], nn.Module],
    widths: list[int],
    check_all: Callable[[nn.Module, Tensor], StructureGraph],
) -> None:
    torch.manual_seed(0)
    graph = check_all(make(), X)
    free = [len(group.units) for group in graph.groups if group.frozen is None]
    assert sorted(free) == widths
