import numpy as np
import pytest
import torch
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.masks import FloatArray
from prunegraph.data import load_dataset
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.features import (
    FEATURE_DOCS,
    FEATURE_NAMES,
    OP_FEATURE_NAMES,
    in_stream,
    node_features,
    num_producers,
    op_features,
    prior_scores,
    rank_in_group,
    unit_cost,
)
from prunegraph.methods.criteria.taylor import measure
from prunegraph.models import build_model
from support.tasks import image_task


@pytest.fixture(scope="module")
def graph() -> StructureGraph:
    torch.manual_seed(0)
    model = build_model("digits_resnet", num_classes=10, image_shape=(1, 8, 8))
    return analyse(model, torch.zeros(1, 1, 8, 8))


@pytest.fixture(scope="module")
def statistics(graph: StructureGraph) -> dict[str, FloatArray]:
    torch.manual_seed(0)
    model = build_model("digits_resnet", num_classes=10, image_shape=(1, 8, 8))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
    return dict(measure(image_task(model, load_dataset("digits").train), graph, num_samples=64))


def column(features: FloatArray, name: str) -> FloatArray:
    return features[:, FEATURE_NAMES.index(name)]


def test_features_are_bounded_deterministic_and_none_is_constant(
    graph: StructureGraph, statistics: dict[str, FloatArray]
) -> None:
    features = node_features(graph, statistics)
    assert features.shape == (graph.num_units, len(FEATURE_NAMES))
    assert features.dtype == np.float32
    assert np.abs(features).max() <= 5.0
    constant = [name for name in FEATURE_NAMES if np.ptp(column(features, name)[graph.free]) == 0]
    assert constant == ["free"]  # which tells free from frozen classes
    assert np.ptp(column(features, "free")) == 1
    np.testing.assert_array_equal(features, node_features(graph, statistics))
    assert all(FEATURE_DOCS.values())


def test_frozen_classes_show_nothing(
    graph: StructureGraph, statistics: dict[str, FloatArray]
) -> None:
    assert graph.frozen.any()
    assert not node_features(graph, statistics)[graph.frozen].any()


def test_features_do_not_depend_on_how_much_may_remain(
    graph: StructureGraph, statistics: dict[str, FloatArray]
) -> None:
    tight, loose, params = (
        node_features(graph, statistics, budget)
        for budget in (Budget(keep_macs=0.3), Budget(keep_macs=0.7), Budget(keep_params=0.5))
    )
    np.testing.assert_array_equal(tight, loose)
    changed = [
        name
        for name in FEATURE_NAMES
        if not np.array_equal(column(tight, name), column(params, name))
    ]
    assert changed == ["start", "prior", "mean_prior"]


def test_the_prior_is_the_standardised_log_of_taylor_per_mac(
    graph: StructureGraph, statistics: dict[str, FloatArray]
) -> None:
    prior = prior_scores(graph, statistics)
    free = graph.free
    raw = np.log(statistics["taylor"][free]) - np.log(graph.class_costs()[0][free])
    expected = (raw - raw.mean()) / raw.std()
    np.testing.assert_allclose(prior[free], expected, atol=0.02)  # the logarithm has a floor
    np.testing.assert_array_equal(prior, column(node_features(graph, statistics), "prior"))


def test_dead_channels_do_not_dwarf_the_rest(
    graph: StructureGraph, statistics: dict[str, FloatArray]
) -> None:
    taylor = statistics["taylor"].copy()
    dead = graph.groups[0].units[:2]
    taylor[dead] = 0.0
    prior = prior_scores(graph, {**statistics, "taylor": taylor})
    alive = np.setdiff1d(np.flatnonzero(graph.free), dead)
    assert prior[dead].max() < prior[alive].min()
    assert prior[alive].std() > 0.5


def test_ranks_run_through_each_group_and_ties_go_by_index(graph: StructureGraph) -> None:
    values = np.random.default_rng(0).random(graph.num_units)
    ranks = rank_in_group(graph, values)
    for group in graph.groups:
        size = len(group.units)
        np.testing.assert_allclose(np.sort(ranks[group.units]), (np.arange(size) + 0.5) / size)
        by_value = group.units[np.argsort(values[group.units])]
        assert (np.diff(ranks[by_value]) > 0).all()
    tied = rank_in_group(graph, np.zeros(graph.num_units))
    assert all(
        (np.diff(tied[group.units]) < 0).all() for group in graph.groups if group.frozen is None
    )


def test_residual_streams_are_those_that_several_ops_write(graph: StructureGraph) -> None:
    stream = in_stream(graph)
    names = {group.name for group in graph.groups if stream[group.units].all()}
    assert names == {"conv1"}


class Gated(nn.Module):
    """A residual block whose inner channels a squeeze-and-excitation gates."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = (
            nn.Conv2d(i, o, 1) for i, o in ((3, 8), (8, 16), (16, 8))
        )
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.out = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        inner = self.inner(x).relu()
        gate = self.excite(self.squeeze(inner.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.out((x + self.back(inner * gate)).mean((2, 3)))


def test_what_a_gate_multiplies_is_no_residual_stream() -> None:
    graph = analyse(Gated(), torch.randn(1, 3, 4, 4))
    stream = in_stream(graph)
    found = {group.name: bool(stream[group.units].all()) for group in graph.groups}
    assert found["stem"]
    assert not found["inner"]
    assert num_producers(graph).max() == 2


def test_the_unit_of_cost_is_what_the_budget_limits(graph: StructureGraph) -> None:
    macs, params = graph.class_costs()
    free = graph.free
    for budget, cost in (
        (None, macs),
        (Budget(keep_macs=0.5), macs),
        (Budget(keep_macs=0.5, keep_params=0.5), macs),
        (Budget(keep_params=0.5), params),
    ):
        np.testing.assert_array_equal(unit_cost(graph, budget)[free], cost[free])


def test_op_features_follow_their_schema(graph: StructureGraph) -> None:
    features = op_features(graph)
    assert features.shape == (len(graph.ops), len(OP_FEATURE_NAMES))
    linear = features[:, OP_FEATURE_NAMES.index("is_linear")]
    assert [op.name for op, flag in zip(graph.ops, linear, strict=True) if flag] == ["fc"]
    stride = features[:, OP_FEATURE_NAMES.index("stride")]
    assert {op.stride for op, value in zip(graph.ops, stride, strict=True) if value > 0} == {2}


class SharedHead(nn.Module):
    """A layer that is called twice, as heads of detectors are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.out = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = self.stem(x).relu(), self.stem(2 * x).relu()
        return self.out(self.shared(first)), self.out(self.shared(second))


def test_a_layer_that_is_called_twice_is_no_residual_stream() -> None:
    graph = analyse(SharedHead(), torch.randn(3, 4))
    assert num_producers(graph).max() == 1
