import time

import numpy as np
import pytest
import torch
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError, MaskError
from prunegraph.graph import StructureGraph, analyse
from prunegraph.models import build_model

SPECS = {
    "resnet20": (3, 32, 32),
    "resnet32": (3, 32, 32),
    "resnet44": (3, 32, 32),
    "resnet56": (3, 32, 32),
    "resnet110": (3, 32, 32),
    "vgg16_bn": (3, 32, 32),
    "mobilenetv2": (3, 32, 32),
    "digits_resnet": (1, 8, 8),
}
MANY_CLASSES = {"resnet110", "vgg16_bn", "mobilenetv2"}


def graph_of(spec: str) -> StructureGraph:
    model = build_model(spec, num_classes=10, image_shape=SPECS[spec])
    return analyse(model, torch.randn(1, *SPECS[spec]))


def cheapest_addition(graph: StructureGraph, keep: np.ndarray, metric: int) -> float:
    added = graph.cost_model.added_by_each(keep)[metric]
    return float(added[~keep].min()) if (~keep).any() else np.inf


@pytest.mark.parametrize(
    "spec",
    [pytest.param(s, marks=pytest.mark.slow if s in MANY_CLASSES else ()) for s in SPECS],
)
def test_projection_meets_the_budget_for_200_random_scores(spec: str) -> None:
    graph = graph_of(spec)
    rng = np.random.default_rng(0)
    for trial in range(200):
        share = float(rng.uniform(0.2, 0.95))
        budget = Budget(keep_params=share) if trial % 2 else Budget(keep_macs=share)
        metric = trial % 2
        limit = float(graph.limits(budget)[metric])
        mask = graph.project(rng.normal(size=graph.num_units).astype(np.float32), budget)
        cost = graph.cost(mask)
        repaired = (cost.macs, cost.params)[metric]
        assert repaired <= limit
        assert repaired >= 0.995 * limit or limit - repaired < cheapest_addition(
            graph, mask.keep, metric
        )


def test_projection_keeps_the_best_scores_and_breaks_ties_by_index() -> None:
    graph = analyse(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), torch.randn(1, 4))
    free = np.flatnonzero(graph.free)
    scores = np.zeros(graph.num_units, dtype=np.float32)
    scores[free[4]] = 1.0
    mask = graph.project(scores, Budget(keep_macs=0.5))
    assert np.flatnonzero(mask.keep & graph.free).tolist() == [free[0], free[1], free[4]]


def test_two_budgets_at_once_the_tightest_counts() -> None:
    graph = graph_of("resnet20")
    scores = np.random.default_rng(0).normal(size=graph.num_units).astype(np.float32)
    cost = graph.cost(graph.project(scores, Budget(keep_macs=0.6, keep_params=0.3)))
    assert cost.params <= 0.3 * graph.dense_cost.params
    assert cost.macs < 0.55 * graph.dense_cost.macs


def test_a_number_is_no_budget() -> None:
    graph = graph_of("resnet20")
    scores = np.zeros(graph.num_units, dtype=np.float32)
    message = r"0\.5 is no budget: give prunegraph\.Budget, such as Budget\(keep_macs=0\.5\)"
    with pytest.raises(BudgetError, match=message):
        graph.project(scores, 0.5)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match=message):
        graph.repair(scores > 0, 0.5, np.random.default_rng(0))  # type: ignore[arg-type]


def test_an_impossible_budget_says_the_least_that_can() -> None:
    graph = graph_of("resnet20")
    scores = np.zeros(graph.num_units, dtype=np.float32)
    with pytest.raises(BudgetError, match=r"keep_macs=1e-06 cannot be met: the least that can is"):
        graph.project(scores, Budget(keep_macs=1e-6))


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.5, float("nan")])
def test_budgets_out_of_range_are_refused(keep: float) -> None:
    with pytest.raises(BudgetError, match=r"\(0, 1\]"):
        Budget(keep_macs=keep)


@pytest.mark.parametrize("name", ["keep_macs", "max_memory", "max_latency"])
@pytest.mark.parametrize("value", ["0.5", True, torch.tensor(1.0)])
def test_budgets_that_are_no_numbers_are_refused(name: str, value: object) -> None:
    with pytest.raises(BudgetError, match=f"{name}=.* must be a number, not of type"):
        Budget(**{name: value})


def test_illegal_masks_are_refused() -> None:
    graph = graph_of("digits_resnet")
    with pytest.raises(MaskError, match="needs"):
        graph.mask(np.ones(3, dtype=bool))
    keep = np.ones(graph.num_units, dtype=bool)
    keep[np.flatnonzero(graph.frozen)[0]] = False
    with pytest.raises(MaskError, match="is frozen"):
        graph.mask(keep)
    keep = np.ones(graph.num_units, dtype=bool)
    keep[graph.groups[0].units] = False
    with pytest.raises(MaskError, match="at least 1 must stay"):
        graph.mask(keep)
    with pytest.raises(MaskError, match="NaN"):
        graph.project(np.full(graph.num_units, np.nan, dtype=np.float32), Budget(keep_macs=0.5))


def test_repair_flips_in_random_order_and_only_what_it_must() -> None:
    graph = graph_of("digits_resnet")
    budget = Budget(keep_macs=0.5)
    legal = graph.project(np.random.default_rng(1).normal(size=graph.num_units), budget)
    again, flipped = graph.repair(legal.keep, budget, np.random.default_rng(2))
    assert again == legal
    assert flipped == 0.0
    everything = np.ones(graph.num_units, dtype=bool)
    masks = [
        graph.repair(everything, budget, np.random.default_rng(seed))[0] for seed in range(200)
    ]
    kept = np.mean([mask.keep[graph.free] for mask in masks], axis=0)
    assert kept.std() < 0.08
    assert len({mask.digest() for mask in masks}) == 200


def test_marginal_costs_equal_differences_of_costs() -> None:
    graph = graph_of("resnet20")
    keep = graph.project(
        np.random.default_rng(0).normal(size=graph.num_units), Budget(keep_macs=0.5)
    ).keep.copy()
    added = graph.cost_model.added_by_each(keep)
    for index in np.flatnonzero(~keep)[::20]:
        more = keep.copy()
        more[index] = True
        assert graph.cost(more).macs - graph.cost(keep).macs == round(added[0, index])
        assert graph.cost(more).params - graph.cost(keep).params == round(added[1, index])


def test_slopes_equal_differences_of_expected_costs() -> None:
    graph = graph_of("resnet20")  # its residual groups lie on both axes of some convolutions
    rng = np.random.default_rng(0)
    rows = rng.random((2, graph.num_units))
    model, probabilities = graph.cost_model, rows[1]
    slopes = model.slopes(rows)[1]
    assert model.expected(rows)[1] == pytest.approx(model.totals(probabilities), rel=1e-12)
    for index in rng.choice(graph.num_units, 20, replace=False):
        step = np.zeros(graph.num_units)
        step[index] = 1e-3
        above = np.array(model.totals(probabilities + step))
        below = np.array(model.totals(probabilities - step))
        assert slopes[:, index] == pytest.approx((above - below) / 2e-3, rel=1e-6)


def test_a_cost_takes_less_than_a_millisecond() -> None:
    graph = graph_of("resnet56")
    mask = graph.dense_mask()
    start = time.perf_counter()
    for _ in range(200):
        graph.cost(mask)
    assert (time.perf_counter() - start) / 200 < 1e-3


class Standardised(torch.nn.Module):
    """A convolution whose weight is computed in the forward, or not."""

    def __init__(self, computed: bool) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 16, 3, stride=2)
        self.head, self.out = torch.nn.Linear(16, 32), torch.nn.Linear(32, 4)
        self.computed = computed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.two.weight
        if self.computed:
            weight = weight - weight.mean((1, 2, 3), keepdim=True)
        y = torch.nn.functional.conv2d(self.one(x).relu(), weight, self.two.bias, stride=2)
        return self.out(self.head(y.mean((2, 3))).relu())


def test_convolutions_with_a_computed_weight_cost_what_they_cost() -> None:
    costs = [analyse(Standardised(flag), torch.randn(1, 3, 16, 16)).dense_cost for flag in (0, 1)]
    assert costs[0] == costs[1]
