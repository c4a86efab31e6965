"""Masks improved by swaps: better by what is predicted, within the limits, near the old."""

import numpy as np
import pytest
import torch
from torch import nn

from prunegraph.agent.local_search import FINEST, plan
from prunegraph.core.budget import Budget
from prunegraph.core.masks import BoolArray, Float64Array
from prunegraph.graph import StructureGraph, analyse
from prunegraph.models import build_model
from support.toy_env import toy_graphs

GRAPHS = toy_graphs()


def worths(graph: StructureGraph, seed: int) -> torch.Tensor:
    return torch.rand(
        graph.num_units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def limits_of(graph: StructureGraph, share: float) -> Float64Array:
    return np.array([share * graph.dense_cost.macs, np.inf, np.inf, np.inf])


def is_legal(graph: StructureGraph, keep: BoolArray, limits: Float64Array) -> bool:
    graph.mask(keep)  # raises where a group keeps too few, or a frozen class is gone
    return graph.cost(keep).macs <= limits[0]


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("seed", range(5))
def test_a_plan_is_legal_and_better(graph: StructureGraph, seed: int) -> None:
    worth, limits = worths(graph, seed), limits_of(graph, 0.5)
    start = graph.project(
        -worth.numpy().astype(np.float32), Budget(keep_macs=0.5)
    ).keep  # the worst ones
    planned = plan(lambda bits: bits @ worth, graph, start, limits, most=100)
    assert is_legal(graph, planned, limits)
    gain = planned.astype(np.float64) - start
    assert worth.numpy() @ gain > 0.0


@pytest.mark.parametrize("keep_macs", [None, 0.6])
def test_a_plan_keeps_within_a_memory_and_uses_it(keep_macs: float | None) -> None:
    model = build_model("digits_resnet8_w8", num_classes=10, image_shape=(1, 8, 8)).eval()
    graph = analyse(model, torch.zeros(1, 1, 8, 8))
    worth = worths(graph, 0)
    budget = Budget(
        keep_macs=keep_macs, max_memory=int(0.6 * graph.peak_memory(graph.dense_mask()))
    )
    limits = graph.limits(budget)
    worst = graph.project(-worth.numpy().astype(np.float32), budget).keep
    for start in (worst, graph.dense_mask().keep):
        planned = plan(lambda bits: bits @ worth, graph, start, limits, most=100)
        assert graph.fits(graph.mask(planned), budget)
        assert worth.numpy() @ planned > worth.numpy() @ worst
        assert graph.cost_ratio(planned, budget) > 0.9


@pytest.mark.parametrize("graph", GRAPHS)
def test_so_many_swaps_at_the_most(graph: StructureGraph) -> None:
    worth, limits = worths(graph, 0), limits_of(graph, 0.5)
    start = graph.project(-worth.numpy().astype(np.float32), Budget(keep_macs=0.5)).keep
    flips = [
        int((plan(lambda bits: bits @ worth, graph, start, limits, most=most) != start).sum())
        for most in (0, 1, 3)
    ]
    assert flips[0] == 0
    assert 1 <= flips[1] <= 2
    assert flips[1] <= flips[2] <= 6


def test_swaps_of_a_wide_group_move_many_units_and_stay_within_the_limits() -> None:
    model = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 20), nn.Linear(20, 3))
    graph = analyse(model.eval(), torch.rand(2, 4))
    worth, limits = worths(graph, 0), limits_of(graph, 0.5)
    start = graph.project(-worth.numpy().astype(np.float32), Budget(keep_macs=0.5)).keep
    group_of = graph.group_of[start != plan(lambda x: x @ worth, graph, start, limits, most=1)]
    counts = np.bincount(group_of)[np.unique(group_of)]
    assert counts.max() == 300 // FINEST * 2  # some leave, and as many join
    planned = plan(lambda bits: bits @ worth, graph, start, limits, most=40)
    assert is_legal(graph, planned, limits)


@pytest.mark.parametrize("graph", GRAPHS)
def test_what_does_not_fit_is_dropped_first(graph: StructureGraph) -> None:
    worth, limits = worths(graph, 1), limits_of(graph, 0.4)
    dense = graph.dense_mask().keep
    planned = plan(lambda bits: bits @ worth, graph, dense, limits, most=0)
    assert is_legal(graph, planned, limits)
    assert dense.all()  # not changed in place
    free = graph.free
    assert worth[planned & free].mean() > worth[free].mean()


def test_no_swap_is_made_that_is_predicted_to_be_worse() -> None:
    graph = GRAPHS[0]
    limits = limits_of(graph, 0.5)
    start = graph.project(np.arange(graph.num_units, dtype=np.float32), Budget(keep_macs=0.5)).keep
    here = torch.from_numpy(start.astype(np.float64))
    planned = plan(lambda bits: -(bits - here).square().sum(dim=1), graph, start, limits, most=9)
    assert np.array_equal(planned, start)


def test_limits_that_nothing_meets_leave_the_least() -> None:
    graph = GRAPHS[0]
    planned = plan(
        lambda bits: bits.sum(dim=1),
        graph,
        graph.dense_mask().keep,
        np.array([1.0, np.inf, np.inf, np.inf]),
        most=3,
    )
    kept = np.bincount(graph.group_of[planned], minlength=len(graph.groups))
    least = np.maximum(
        graph.min_keep, np.bincount(graph.group_of[graph.frozen], minlength=len(kept))
    )
    assert np.array_equal(kept, least)
