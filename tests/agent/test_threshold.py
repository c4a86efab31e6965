import numpy as np
import pytest
import torch

from prunegraph.agent.threshold import (
    BudgetThreshold,
    expected_cost_ratio,
    join,
    solve_threshold,
    with_features,
)
from prunegraph.core.budget import Budget
from prunegraph.graph import analyse
from prunegraph.models import build_model
from support.toy_env import toy_graph, toy_graphs

GRAPHS = toy_graphs()


@pytest.mark.parametrize("graph", GRAPHS)
def test_expected_cost_of_certain_bits_is_the_cost(graph) -> None:
    rng = np.random.default_rng(0)
    keep = (rng.random((5, graph.num_units)) < 0.5) | graph.frozen
    limits = np.array([[100.0, 50.0, np.inf, np.inf]] * 5)
    ratios = expected_cost_ratio(graph, keep.astype(float), limits)
    costs = [graph.cost(row) for row in keep]
    assert ratios == pytest.approx([max(c.macs / 100.0, c.params / 50.0) for c in costs])


def test_expected_cost_of_probabilities_is_the_mean_over_masks() -> None:
    graph = toy_graph((8, 8), (4, 2, 1))  # no class lies on both axes of an operation
    rng = np.random.default_rng(0)
    probabilities = np.where(graph.frozen, 1.0, rng.random(graph.num_units))
    limits = np.array([[1.0, np.inf, np.inf, np.inf]])
    masks = rng.random((20_000, graph.num_units)) < probabilities
    sampled = np.mean([graph.cost_model.totals(mask.astype(float))[0] for mask in masks])
    expected = expected_cost_ratio(graph, probabilities[None], limits)[0]
    assert expected == pytest.approx(sampled, rel=0.01)


@pytest.mark.parametrize("budget", [Budget(keep_macs=0.4), Budget(keep_macs=0.9, keep_params=0.3)])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_threshold_meets_the_tightest_budget(budget: Budget, temperature: float) -> None:
    graph = GRAPHS[2]
    scores = np.random.default_rng(0).normal(size=(4, graph.num_units))
    limits = np.tile(graph.limits(budget), (4, 1))
    threshold = solve_threshold(graph, scores, limits, temperature)
    probabilities = 1.0 / (1.0 + np.exp(-(scores - threshold[:, None]) / temperature))
    probabilities[:, graph.frozen] = 1.0
    assert expected_cost_ratio(graph, probabilities, limits) == pytest.approx(np.ones(4))


@pytest.mark.parametrize("keep_macs", [None, 0.1])
def test_threshold_meets_a_memory(keep_macs: float | None) -> None:
    model = build_model("digits_resnet8_w8", num_classes=10, image_shape=(1, 8, 8)).eval()
    graph = analyse(model, torch.zeros(1, 1, 8, 8))
    most = graph.peak_memory(graph.dense_mask()) // 2
    limits = np.tile(graph.limits(Budget(keep_macs=keep_macs, max_memory=most)), (4, 1))
    scores = np.random.default_rng(0).normal(size=(4, graph.num_units))
    threshold = solve_threshold(graph, scores, limits, 0.3)
    probabilities = 1.0 / (1.0 + np.exp(-(scores - threshold[:, None]) / 0.3))
    probabilities[:, graph.frozen] = 1.0
    assert expected_cost_ratio(graph, probabilities, limits) == pytest.approx(np.ones(4))
    slopes = BudgetThreshold.of(graph, most).cost_slopes(probabilities, limits)
    assert graph.memory_model is not None
    nearest = graph.memory_model.slopes(probabilities)
    if keep_macs is not None:
        nearest = graph.cost_model.slopes(probabilities)[:, 0]
    assert slopes == pytest.approx(np.where(graph.free, nearest, 0.0))


def test_threshold_keeps_all_where_all_fits() -> None:
    graph = GRAPHS[0]
    scores = np.random.default_rng(0).normal(size=(1, graph.num_units))
    threshold = solve_threshold(graph, scores, np.array([[np.inf, 1e9, np.inf, np.inf]]), 0.3)
    assert (scores[0][graph.free] - threshold > 5.9).all()


def test_threshold_keeps_nothing_where_nothing_fits() -> None:
    graph = GRAPHS[0]
    scores = np.random.default_rng(0).normal(size=(2, graph.num_units))
    limits = np.array([[1e-30, *[np.inf] * 3], [np.inf, 1e9, np.inf, np.inf]])
    threshold = solve_threshold(graph, scores, limits, 0.3)
    assert (scores[0][graph.free] - threshold[0] < -5.9).all()
    assert (scores[1][graph.free] - threshold[1] > 5.9).all()


def test_join_keeps_graphs_apart() -> None:
    datas = [
        with_features(BudgetThreshold.of(graph).data, torch.randn(graph.num_units, 4))
        for graph in GRAPHS
    ]
    joined = join(datas)
    assert joined.num_channels == sum(graph.num_units for graph in GRAPHS)
    assert joined.num_ops == sum(len(graph.ops) for graph in GRAPHS)
    graph_of_op = np.repeat(np.arange(3), [len(graph.ops) for graph in GRAPHS])
    graph_of_node = torch.cat([joined.channel_graph, torch.from_numpy(graph_of_op)])
    source, target = joined.edge_index
    assert torch.equal(graph_of_node[source], graph_of_node[target])
    assert ((source < joined.num_channels) != (target < joined.num_channels)).all()
    graph_of_group = [set(joined.channel_graph[joined.group_of == g].tolist()) for g in range(20)]
    assert all(len(graphs) <= 1 for graphs in graph_of_group)
    assert len(joined.group_of.unique()) == sum(len(graph.groups) for graph in GRAPHS)


def test_join_of_one_is_itself() -> None:
    data = with_features(BudgetThreshold.of(GRAPHS[1]).data, torch.randn(GRAPHS[1].num_units, 4))
    joined = join([data])
    for name in ("x", "op_x", "edge_index", "edge_attr", "group_of"):
        assert torch.equal(joined[name], data[name]), name
    assert (joined.channel_graph == 0).all()


def test_the_slopes_are_those_of_the_nearest_limit() -> None:
    graph = toy_graph((8, 8, 4), (16, 4, 4, 1))
    half = np.where(graph.free, 0.5, 1.0)
    macs, params = np.where(graph.free, graph.cost_model.slopes(half[None])[0], 0.0)
    dense = graph.dense_cost
    assert not np.allclose(macs / dense.macs, params / dense.params)
    limits = [
        (0.5 * dense.macs, np.inf, np.inf, np.inf),
        (np.inf, 0.5 * dense.params, np.inf, np.inf),
        (0.1 * dense.macs, 0.9 * dense.params, np.inf, np.inf),
        (0.9 * dense.macs, 0.1 * dense.params, np.inf, np.inf),
    ]
    whatever_is_frozen = np.full((len(limits), graph.num_units), 0.5)
    slopes = BudgetThreshold.of(graph).cost_slopes(whatever_is_frozen, np.array(limits))
    assert slopes == pytest.approx(np.stack([macs, params, macs, params]))
