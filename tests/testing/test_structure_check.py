import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import MaskError
from prunegraph.core.masks import ChannelMask, FloatArray
from prunegraph.graph import StructureGraph, analyse
from prunegraph.testing import structure_check
from prunegraph.testing.structure_check import (
    HALF,
    assert_budget_met,
    can_reach,
    check_structure,
    precision,
    random_scores,
)

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.conv(self.stem(x).sigmoid()).sigmoid().mean((2, 3)))
        return out


class Counting(Small):
    """Changes a parameter in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.data += 1
        return super().forward(x)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small()


def kinds(model: nn.Module) -> set[str]:
    return {failure.kind for failure in check_structure(model, EXAMPLE, seed=0).failures}


def broken(change: Callable[[StructureGraph], StructureGraph]) -> Callable[..., StructureGraph]:
    def analyse_wrongly(*args: Any, **kwargs: Any) -> StructureGraph:
        return change(analyse(*args, **kwargs))

    return analyse_wrongly


def swapped(graph: StructureGraph) -> StructureGraph:
    classes = {name: dict(axes) for name, axes in graph.param_units.items()}
    classes["conv.weight"][1] = np.roll(classes["conv.weight"][1], 1)
    return dataclasses.replace(graph, param_units=classes)


def test_a_sound_network_has_no_findings(model: nn.Module) -> None:
    found = check_structure(model, EXAMPLE, seed=0)
    assert found.failures == []
    assert found.num_compared == 3
    assert found.reaches_half
    assert found.frozen_reasons == frozenset()


def test_a_wrong_index_is_found(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure_check, "analyse", broken(swapped))
    assert kinds(model) == {"masked = pruned"}


def test_a_wrong_index_in_the_second_analysis_is_found(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(graph: StructureGraph) -> StructureGraph:
        return graph if graph.param_units["stem.weight"][0].size == 8 else swapped(graph)

    monkeypatch.setattr(structure_check, "analyse", broken(second))
    assert kinds(model) == {"surgery of surgery"}


def test_a_wrong_budget_is_found(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(StructureGraph):
        def project(self, scores: FloatArray, budget: Budget) -> ChannelMask:
            assert budget.keep_macs is not None
            return super().project(scores, Budget(keep_macs=budget.keep_macs * 0.5))

    def careless(graph: StructureGraph) -> StructureGraph:
        return Careless(**{f.name: getattr(graph, f.name) for f in dataclasses.fields(graph)})

    monkeypatch.setattr(structure_check, "analyse", broken(careless))
    assert "budget" in kinds(model)


def test_outputs_that_ignore_the_inputs_are_not_counted(model: nn.Module) -> None:
    nn.init.zeros_(model.get_parameter("head.weight"))
    found = check_structure(model, EXAMPLE, seed=0)
    assert (found.failures, found.num_compared) == ([], 0)


def test_what_raises_is_a_failure_too() -> None:
    assert kinds(nn.Linear(4, 2)) == {"analysis"}


class Single(nn.Module):
    """Casts its input to float32, as kernels that know no other type need it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x.float()).relu())


def test_a_network_of_float32_alone_is_compared_in_it() -> None:
    net, x = Single(), torch.randn(2, 4)
    assert precision(net, x) == (torch.float32, 1e-3)
    found = check_structure(net, x, seed=0)
    assert found.failures == []
    assert found.num_compared == 3


def test_side_effects_are_found() -> None:
    torch.manual_seed(0)
    assert kinds(Counting()) == {"side effects"}


def test_budgets_are_met_from_below_without_room_left(model: nn.Module) -> None:
    graph = analyse(model, EXAMPLE)
    mask = graph.project(random_scores(graph, np.random.default_rng(0)), HALF)
    assert_budget_met(graph, mask, HALF)
    with pytest.raises(AssertionError, match="exceeds the limits"):
        assert_budget_met(graph, graph.dense_mask(), HALF)
    with pytest.raises(AssertionError, match="would still fit"):
        assert_budget_met(graph, mask, Budget(keep_macs=0.9))
    with pytest.raises(MaskError):
        assert_budget_met(graph, ChannelMask(np.zeros(graph.num_units, dtype=bool)), HALF)


def test_reach_is_what_must_stay(model: nn.Module) -> None:
    graph = analyse(model, EXAMPLE)
    assert can_reach(graph, HALF)
    assert not can_reach(graph, Budget(keep_macs=0.01))
