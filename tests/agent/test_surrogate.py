"""What is predicted of masks: the same for equal costs, by network."""

import numpy as np
import pytest
import torch

from prunegraph.agent.surrogate import Surrogate, cost_slope
from prunegraph.agent.threshold import BudgetThreshold
from prunegraph.core.masks import pack_bits
from prunegraph.rewards import Episode
from support.toy_env import toy_graphs

GRAPHS = toy_graphs()[:2]
SIZE = max(graph.num_units for graph in GRAPHS)
LIMITS = np.array([[0.5 * graph.dense_cost.macs, np.inf, np.inf, np.inf] for graph in GRAPHS])


def draw_bits(graph_id: int, count: int, seed: int) -> torch.Tensor:
    graph = GRAPHS[graph_id]
    keep = torch.rand(count, SIZE, generator=torch.Generator().manual_seed(seed)) < 0.5
    keep[:, : graph.num_units] |= torch.from_numpy(graph.frozen)
    return keep.float()


def episode(graph_id: int, bits: torch.Tensor, accuracy: float) -> Episode:
    graph = GRAPHS[graph_id]
    return Episode(
        pair=f"toy{graph_id}",
        accuracy=accuracy,
        kl=None,
        cost_ratio=1.0,
        raw_cost_ratio=1.0,
        bits=pack_bits(bits[: graph.num_units].bool().numpy()),
    )


@pytest.fixture
def surrogate() -> Surrogate:
    """Return one that has seen the second free channel of each network decide the accuracy."""
    thresholds = {index: BudgetThreshold.of(graph) for index, graph in enumerate(GRAPHS)}
    result = Surrogate(thresholds, lambda features: features[:, 0])
    episodes, ids = [], []
    for graph_id in (0, 1):
        channel = np.flatnonzero(GRAPHS[graph_id].free)[1]
        for bits in draw_bits(graph_id, 60, seed=graph_id):
            episodes.append(episode(graph_id, bits, 0.5 + 0.1 * float(bits[channel])))
            ids.append(graph_id)
    features = torch.zeros(len(ids), SIZE, 3)
    result.remember(episodes, ids, features, metric="accuracy", update=1)
    return result


def predict(surrogate: Surrogate, ids: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    return surrogate.rewards(ids, bits, LIMITS[ids.numpy()], ids)


def test_each_network_has_its_own_model(surrogate: Surrogate) -> None:
    ids = torch.tensor([0, 1]).repeat(40)
    bits = torch.stack([draw_bits(0, 40, 7), draw_bits(1, 40, 8)], dim=1).reshape(80, SIZE)
    predicted = predict(surrogate, ids, bits)
    for graph_id in (0, 1):
        rows, channel = ids == graph_id, np.flatnonzero(GRAPHS[graph_id].free)[1]
        kept = bits[rows, channel] > 0.5
        gap = predicted[rows][kept].mean() - predicted[rows][~kept].mean()
        assert float(gap) == pytest.approx(0.1, abs=0.03)


def test_doubt_lowers_what_is_predicted(surrogate: Surrogate) -> None:
    ids, bits = torch.zeros(20, dtype=torch.long), draw_bits(0, 20, 5)
    pairs = torch.arange(20)  # one mask a pair: nothing is explained by cost
    limits = LIMITS[ids.numpy()]
    bold = surrogate.rewards(ids, bits, limits, pairs)
    careful = surrogate.rewards(ids, bits, limits, pairs, caution=1.0)
    assert bool((careful < bold).all())


def test_what_costs_more_does_not_look_better() -> None:
    generator = torch.Generator().manual_seed(0)
    costs = torch.randn(400, generator=generator).double()
    signal = torch.randn(400, generator=generator).double()
    metrics = signal + 3.0 * costs
    slope = cost_slope(metrics, costs)
    assert slope == pytest.approx(3.0, abs=0.2)
    assert abs(np.corrcoef(metrics - slope * costs, costs)[0, 1]) < 1e-3
    assert cost_slope(metrics[:1], costs[:1]) == 0.0


def test_promising_masks_are_run_ones_within_the_limit(surrogate: Surrogate) -> None:
    graph = GRAPHS[0]
    run = np.stack(surrogate.models[0].bits)
    costs = np.array([graph.cost(bits).macs for bits in run])
    most = float(np.sort(costs)[len(costs) // 2])
    within = costs <= most
    found = surrogate.promising(0, np.array([most, np.inf, np.inf, np.inf]), 100)
    assert 0 < within.sum() < len(run)
    assert {bits.tobytes() for bits in found} == {bits.tobytes() for bits in run[within]}
    channel = np.flatnonzero(graph.free)[1]
    assert found[0][channel]
    assert len(surrogate.promising(0, np.array([most, np.inf, np.inf, np.inf]), 1)) == 1
    assert surrogate.promising(5, LIMITS[0], 3) == []
