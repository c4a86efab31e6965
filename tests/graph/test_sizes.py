"""Integers of modules: which hold a size that surgery changes, and which only look so."""

import threading
from collections import deque

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegraph.errors import ModelError
from prunegraph.graph import analyse
from prunegraph.graph.structure import StructureGraph
from prunegraph.graph.surgery import apply_mask, zero_mask


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
    assert [group.classes.size for group in graph.groups if group.frozen is None] == [12]


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
