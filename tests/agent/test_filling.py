"""Thresholds of a memory: every moment is used, and what is drawn needs little repair."""

import numpy as np
import pytest
import torch

from prunegraph.agent import filling
from prunegraph.agent.filling import MET, fill
from prunegraph.agent.threshold import BudgetThreshold, expected_cost_ratio, solve_threshold
from prunegraph.core.budget import Budget
from prunegraph.core.masks import Float64Array
from prunegraph.graph import StructureGraph, analyse
from prunegraph.models import build_model

TEMPERATURE = 0.3


@pytest.fixture(scope="module")
def graph() -> StructureGraph:
    model = build_model("digits_resnet14_w8", num_classes=10, image_shape=(1, 8, 8)).eval()
    return analyse(model, torch.zeros(1, 1, 8, 8))


def limits_of(graph: StructureGraph, keep_macs: float | None, rows: int) -> Float64Array:
    most = int(0.4 * graph.peak_memory(graph.dense_mask()))
    return np.tile(graph.limits(Budget(keep_macs=keep_macs, max_memory=most)), (rows, 1))


def keep(graph: StructureGraph, scores: Float64Array, thresholds: Float64Array) -> Float64Array:
    return np.where(graph.free, 1.0 / (1.0 + np.exp(-(scores - thresholds) / TEMPERATURE)), 1.0)


def test_the_limit_is_met_and_nothing_more_could_rise(graph: StructureGraph) -> None:
    scores = np.random.default_rng(0).normal(size=(3, graph.num_units))
    limits = limits_of(graph, None, 3)
    found = fill(BudgetThreshold.of(graph), scores, limits, TEMPERATURE)
    kept = keep(graph, scores, found.thresholds)
    assert expected_cost_ratio(graph, kept, limits) == pytest.approx(np.ones(3), abs=1e-3)
    memory = graph.memory_model
    assert memory is not None
    full = memory.alive_in(memory.moments(kept) >= MET * limits[:, [2]])
    assert (full | (kept > 0.999))[:, graph.free].all()
    single = solve_threshold(graph, scores, limits, TEMPERATURE)
    assert (found.thresholds <= single[:, None] + 1e-9).all()
    assert len(np.unique(found.stages)) > 1
    for stage in np.unique(found.stages[0]):
        assert np.ptp(found.thresholds[0, found.stages[0] == stage]) == pytest.approx(0.0, abs=1e-9)


def test_another_limit_that_is_met_stops_the_rise(graph: StructureGraph) -> None:
    scores = np.random.default_rng(0).normal(size=(2, graph.num_units))
    limits = limits_of(graph, 0.05, 2)
    found = fill(BudgetThreshold.of(graph), scores, limits, TEMPERATURE)
    single = solve_threshold(graph, scores, limits, TEMPERATURE)
    assert np.array_equal(found.thresholds, np.repeat(single[:, None], graph.num_units, axis=1))
    limits = limits_of(graph, 0.5, 2)
    kept = keep(
        graph, scores, fill(BudgetThreshold.of(graph), scores, limits, TEMPERATURE).thresholds
    )
    assert expected_cost_ratio(graph, kept, limits) == pytest.approx(np.ones(2), abs=1e-3)


def test_what_is_drawn_needs_a_tenth_of_the_repair(graph: StructureGraph) -> None:
    rng = np.random.default_rng(0)
    scores, limits = rng.normal(size=(1, graph.num_units)), limits_of(graph, None, 1)
    budget = Budget(max_memory=int(limits[0, 2]))
    thresholds = (
        solve_threshold(graph, scores, limits, TEMPERATURE)[:, None],
        fill(BudgetThreshold.of(graph), scores, limits, TEMPERATURE).thresholds,
    )
    flipped = []
    for threshold in thresholds:
        kept = keep(graph, scores, threshold)[0]
        drawn = [rng.random(graph.num_units) < kept for _ in range(20)]
        flipped.append(np.mean([graph.repair(bits, budget, rng)[1] for bits in drawn]))
    assert flipped[1] < 0.1 * flipped[0]


def test_the_slopes_tell_how_scores_move_their_threshold(
    graph: StructureGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "TOLERANCE", 1e-12)
    scores = np.random.default_rng(0).normal(size=(1, graph.num_units))
    limits = limits_of(graph, None, 1)
    found = fill(BudgetThreshold.of(graph), scores, limits, TEMPERATURE)
    kept = keep(graph, scores, found.thresholds)[0]
    weights = found.slopes[0] * kept * (1.0 - kept)
    for stage in np.unique(found.stages[0]):
        members = found.stages[0] == stage
        if kept[members & graph.free].min() > 0.99:
            continue  # all stay: nothing moves their threshold
        channel = int(np.argmax(np.where(members, weights, 0.0)))
        moved = scores.copy()
        moved[0, channel] += 1e-5
        after = fill(BudgetThreshold.of(graph), moved, limits, TEMPERATURE).thresholds
        step = (after - found.thresholds)[0, channel] / 1e-5
        assert step == pytest.approx(weights[channel] / weights[members].sum(), rel=1e-2)
