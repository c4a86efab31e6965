"""Copies that share what nothing writes into, and weights that are made when they are read."""

import subprocess
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.graph import analyse, copy_network
from prunegraph.graph.analyse import call_forward, runner
from prunegraph.graph.late_weights import SMALL, Change, LateWeight, cast_network, late
from prunegraph.graph.proof.copies import check_copies
from prunegraph.graph.proof.inputs import smaller_images
from prunegraph.graph.rules.table import RULES
from prunegraph.graph.trace.steps import StepRecorder


class Merging(nn.Linear):
    """Writes into its weight when its mode changes, as LoRA's layers do."""

    def train(self, mode: bool = True) -> "Merging":
        if mode != self.training:
            self.weight.data += 1.0 if mode else -1.0
        return super().train(mode)


class Listening(nn.Linear):
    """Does something else then."""

    def train(self, mode: bool = True) -> "Listening":
        self.heard = mode
        return super().train(mode)


def _shares(model: nn.Module) -> bool:
    copied = copy_network(model, share=True)
    pairs = [*zip(model.parameters(), copied.parameters(), strict=True)]
    assert all(one is not other and torch.equal(one, other) for one, other in pairs)
    (large,) = (pair for pair in pairs if pair[0].numel() > SMALL)
    small = [pair for pair in pairs if pair[0].numel() <= SMALL]
    assert all(one.data_ptr() != other.data_ptr() for one, other in small)
    return large[0].data_ptr() == large[1].data_ptr()


def test_large_weights_are_shared_unless_a_change_of_mode_writes_into_them() -> None:
    for kind, shared in ((nn.Linear, True), (Listening, True), (Merging, False)):
        layer = kind(80, 60)
        before = layer.weight.detach().clone()
        assert _shares(layer) is shared
        assert torch.equal(layer.weight, before)


def test_a_copy_is_what_deepcopy_makes() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = nn.Sequential(inner, nn.ModuleList([inner]), nn.LSTM(3, 4))
    copied = copy_network(model)
    assert copied[0] is copied[1][0] is not inner
    assert copied.state_dict().keys() == model.state_dict().keys()
    assert copied[0][1].num_features == 4
    hooks = copied[0]._forward_hooks
    copied[0].register_forward_hook(lambda *_: None)
    assert hooks
    assert not inner._forward_hooks


def test_a_late_weight_is_made_when_it_is_read() -> None:
    layer = nn.Linear(80, 60)
    dense, keep = layer.weight, {0: torch.arange(60) % 3 > 0, 1: torch.arange(80) % 5 > 0}
    factors = torch.rand(60) + 0.5, torch.rand(80) + 0.5
    double = torch.float64
    by_hand = (dense * factors[0][:, None] * factors[1]).to(double)
    rows = torch.tensor([[3, 59], [3, 0]])
    for is_cut in (True, False):
        change = Change(source=dense, keep=keep, cut=is_cut, factors=factors, dtype=double)
        weight = late(dense, change)
        kept = keep[0][:, None] & keep[1]
        values = by_hand[keep[0]][:, keep[1]] if is_cut else by_hand.where(kept, 0.0)
        assert isinstance(weight, nn.Parameter)
        assert (weight.shape, weight.dtype) == (values.shape, double)
        torch.testing.assert_close(weight + 0, values)
        inputs = torch.randn(2, values.shape[1], dtype=double)
        torch.testing.assert_close(F.linear(inputs, weight), inputs @ values.T)
        found = F.embedding(rows % len(values), weight)
        torch.testing.assert_close(found, values[rows % len(values)])
        assert type(weight.detach()) is type(weight.data) is LateWeight
        other = late(dense, change)
        with torch.no_grad():
            weight.mul_(2)
            weight.data[0] = 5.0
        values = values * 2
        values[0] = 5.0
        torch.testing.assert_close(weight + 0, values)
        assert not torch.equal(other + 0, values)
        torch.testing.assert_close(dense * factors[0][:, None] * factors[1], by_hand.to(dense))


def _tied_outputs(net: nn.Module, tokens: Tensor) -> list[Tensor]:
    embed, lstm, head, norm = net.children()
    return [norm(head(embed(tokens))), lstm(embed(tokens))[0]]


def test_a_late_copy_of_another_precision_ties_what_was_tied() -> None:
    model = nn.Sequential(
        nn.Embedding(90, 80), nn.LSTM(80, 20), nn.Linear(80, 90), nn.LayerNorm(90)
    )
    model[2].weight = model[0].weight
    copied = copy_network(model, share=True)
    cast_network(copied, torch.float64, lately=True)
    assert isinstance(copied[2].weight, LateWeight)
    assert isinstance(copied[1]._flat_weights[0], LateWeight)
    assert type(copied[3].weight) is nn.Parameter
    assert {p.dtype for p in copied.parameters()} == {torch.float64}
    tokens = torch.tensor([3, 4])
    wanted = deepcopy(model).double()
    for one, other in zip(*(_tied_outputs(each, tokens) for each in (copied, wanted)), strict=True):
        torch.testing.assert_close(one, other)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class _Doubles(nn.Linear):
    """Scales its weight in place when its mode changes, as RWKV does at the next forward."""

    scaled = False

    def forward(self, x: Tensor) -> Tensor:
        if self.scaled is not self.training:
            with torch.no_grad():
                self.weight.mul_(2.0 if self.training else 0.5)
            self.scaled = self.training
        return super().forward(x)


def test_a_forward_that_writes_into_a_weight_is_proved_on_late_copies() -> None:
    torch.manual_seed(0)
    tokens = torch.arange(6).view(2, 3)
    embed = nn.Embedding(90, 64, max_norm=1.0)  # it scales its weight in place
    model = nn.Sequential(embed, _Doubles(64, 80), nn.Linear(80, 4)).eval()
    with torch.no_grad():
        assert check_copies(model, runner(tokens))
    assert int(analyse(model, tokens).free.sum()) >= 80


PEAK = """
import torch
from pathlib import Path
from torch import nn
from prunegraph.graph import analyse

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

torch.set_num_threads(1)
model = nn.Sequential(*(nn.Linear(768, 768) for _ in range(24))).eval()
weights = sum(p.nbytes for p in model.parameters())
analyse(nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 4)), torch.randn(2, 4))
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
graph = analyse(model.to(getattr(torch, "DTYPE")), torch.randn(2, 768).to(getattr(torch, "DTYPE")))
print((resident("VmHWM") - before) / weights, int(graph.free.sum()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_proof_needs_less_than_half_of_the_weights_once_more(dtype: str) -> None:
    command = [sys.executable, "-c", PEAK.replace("DTYPE", dtype)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, free = done.stdout.split()
    assert float(peak) < 0.5
    assert int(free) == 23 * 768


class Branching(nn.Module):
    """Does something else with small images, or not."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 6, 3, 2)
        self.head, self.least = nn.Linear(6, 4), least
        self.sides: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sides.append(x.shape[-1])
        x = self.second(self.first(x).relu())
        if x.shape[-1] < self.least:
            x = x.sigmoid()
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def test_smaller_images_take_the_same_steps_or_are_not_used() -> None:
    example = torch.randn(1, 3, 200, 200)
    for least, same in ((0, [True, True]), (20, [False, True]), (40, [False, False])):
        model = Branching(least).eval()
        recorder = StepRecorder(RULES)
        with torch.no_grad():
            with recorder:
                model(example)
            inputs = [*smaller_images(model, example)]
            found = [recorder.takes_same_steps(partial(call_forward, model, x)) for x in inputs]
        assert found == same
        assert [x.shape[-1] for x in inputs] == [64, 128]


def test_the_choice_of_inputs_leaves_nothing_in_the_network() -> None:
    torch.manual_seed(0)
    model = Branching(40).eval()
    analyse(model, torch.randn(1, 3, 200, 200))
    assert model.sides == []
