"""Width rounding: multiples inside the budget, as many as fit."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError
from prunegraph.core.masks import BoolArray
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.rounding import misfit
from prunegraph.models import build_model

SPECS = {
    "resnet20": (3, 32, 32),
    "mobilenetv2": (3, 32, 32),
    "digits_resnet": (1, 8, 8),
}


def graph_of(spec: str) -> StructureGraph:
    model = build_model(spec, num_classes=10, image_shape=SPECS[spec])
    return analyse(model, torch.randn(1, *SPECS[spec]))


def odd_network() -> StructureGraph:
    """Widths that are no multiples of 8: 20, 6 and 13."""
    layers = [nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 6), nn.Linear(6, 13), nn.Linear(13, 2)]
    return analyse(nn.Sequential(*layers), torch.randn(1, 5))


def legal_widths(size: int, least: int, multiple: int) -> list[int]:
    if size < multiple:
        return sorted({least, size})
    return [w for w in range(multiple, size, multiple) if w >= least] + [size]


def assert_rounded_and_full(graph: StructureGraph, keep: BoolArray, budget: Budget) -> None:
    """Every width is allowed, the budget is met, and no group's next width fits."""
    assert budget.round_to is not None
    limits = graph.limits(budget)
    cost = graph.cost(keep)
    assert cost.macs <= limits[0]
    assert cost.params <= limits[1]
    for group in graph.groups:
        if group.frozen is not None:
            continue
        widths = legal_widths(len(group.units), group.min_keep, budget.round_to)
        width = int(keep[group.units].sum())
        assert width in widths, (group.name, width, widths)
        if width < len(group.units):
            more = keep.copy()
            removed = group.units[~keep[group.units]]
            more[removed[: widths[widths.index(width) + 1] - width]] = True
            assert graph.cost(more).macs > limits[0] or graph.cost(more).params > limits[1]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("round_to", [4, 8, 16])
def test_widths_are_multiples_and_the_budget_is_used_up(spec: str, round_to: int) -> None:
    graph = graph_of(spec)
    rng = np.random.default_rng(round_to)
    for trial in range(15):
        share = float(rng.uniform(0.6, 0.95))
        limits = {"keep_params": share} if trial % 2 else {"keep_macs": share}
        budget = Budget(**limits, round_to=round_to)
        scores = rng.normal(size=graph.num_units).astype(np.float32)
        mask = graph.project(scores, budget)
        assert_rounded_and_full(graph, mask.keep, budget)
        assert graph.fits(mask, budget)


def test_widths_that_are_no_multiples_stay_whole_or_at_the_minimum() -> None:
    graph = odd_network()
    rng = np.random.default_rng(0)
    seen = set()
    for share in np.linspace(0.25, 1.0, 40):
        budget = Budget(keep_macs=float(share), round_to=8)
        mask = graph.project(rng.normal(size=graph.num_units).astype(np.float32), budget)
        assert_rounded_and_full(graph, mask.keep, budget)
        seen.add(tuple(graph.group_widths(mask).values()))
    assert {width for widths in seen for width in widths} == {8, 16, 20, 1, 6, 13}


def test_the_best_block_comes_first_and_ties_go_by_index() -> None:
    graph = analyse(nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 3)), torch.randn(1, 4))
    free = np.flatnonzero(graph.free)
    scores = np.full(graph.num_units, 0.1, dtype=np.float32)
    scores[free[9]] = 1.0
    mask = graph.project(scores, Budget(keep_macs=0.7, round_to=4))
    expected = [*free[:7], free[9]]
    assert np.flatnonzero(mask.keep & graph.free).tolist() == expected


def test_equal_scores_never_take_a_later_block_first() -> None:
    graph = odd_network()
    for share in np.linspace(0.3, 1.0, 20):
        scores = np.full(graph.num_units, 0.1, dtype=np.float32)
        mask = graph.project(scores, Budget(keep_params=float(share), round_to=8))
        assert graph.fits(mask, Budget(keep_params=float(share), round_to=8))


def test_rounding_to_one_changes_nothing() -> None:
    graph = graph_of("resnet20")
    rng = np.random.default_rng(1)
    for share in (0.3, 0.5, 0.8):
        scores = rng.normal(size=graph.num_units).astype(np.float32)
        rounded = graph.project(scores, Budget(keep_macs=share, round_to=1))
        assert rounded == graph.project(scores, Budget(keep_macs=share))


def test_repair_rounds_and_counts_only_what_rounding_does_not_need() -> None:
    graph = graph_of("resnet20")
    budget = Budget(keep_macs=0.5, round_to=8)
    rng = np.random.default_rng(2)
    legal = graph.project(rng.normal(size=graph.num_units).astype(np.float32), budget)
    again, flipped = graph.repair(legal.keep, budget, rng)
    assert again == legal
    assert flipped == 0.0
    for seed in range(10):
        raw = np.random.default_rng(seed).random(graph.num_units) < 0.7
        mask, flipped = graph.repair(raw, budget, np.random.default_rng(seed))
        assert_rounded_and_full(graph, mask.keep, budget)
        assert 0.0 <= flipped <= 1.0
    one_more = legal.keep.copy()
    one_more[np.flatnonzero(~legal.keep)[0]] = True
    assert misfit(graph, one_more, budget).sum() == 1
    assert not graph.fits(one_more, budget)


def test_a_grouped_convolution_counts_the_channels_of_all_its_groups() -> None:
    layers = [nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, groups=4), nn.Conv2d(32, 8, 1)]
    graph = analyse(nn.Sequential(*layers), torch.randn(1, 3, 8, 8))
    slim = graph.project(
        np.random.default_rng(0).normal(size=graph.num_units).astype(np.float32),
        Budget(keep_macs=0.6, round_to=8),
    )
    for group, per_unit in zip(graph.groups, graph.channels_per_unit, strict=True):
        if group.frozen is None:
            assert int(slim.keep[group.units].sum()) * per_unit % 8 == 0
    assert 4 in graph.channels_per_unit


def test_a_budget_below_the_rounded_minimum_says_the_least() -> None:
    graph = graph_of("resnet20")
    scores = np.zeros(graph.num_units, dtype=np.float32)
    with pytest.raises(BudgetError, match=r"keep_macs=0\.1 .* 0.*keeps its least multiple of 16"):
        graph.project(scores, Budget(keep_macs=0.1, round_to=16))
    graph.project(scores, Budget(keep_macs=0.1))


@pytest.mark.parametrize("round_to", [0, -8, 2.5])
def test_a_multiple_must_be_a_whole_number(round_to: float) -> None:
    with pytest.raises(BudgetError, match="whole number of channels"):
        Budget(keep_macs=0.5, round_to=round_to)  # type: ignore[arg-type]  # the point of the test


def test_a_multiple_alone_is_no_budget_and_survives_a_dict() -> None:
    with pytest.raises(BudgetError, match="at least one of"):
        Budget(round_to=8)
    budget = Budget(keep_macs=0.5, round_to=8)
    assert Budget(**budget.as_dict()) == budget


@pytest.mark.slow
def test_torchvision_networks_round() -> None:
    model = torchvision.models.resnet50()
    graph = analyse(model, torch.randn(1, 3, 64, 64))
    scores = np.random.default_rng(0).normal(size=graph.num_units).astype(np.float32)
    budget = Budget(keep_macs=0.5, round_to=16)
    assert_rounded_and_full(graph, graph.project(scores, budget).keep, budget)


class Blocks(nn.Module):
    """Three blocks with a residual stream of 12, and one of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 12))
            for width in (20, 20, 20, 7)
        )
        self.head = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        logits: torch.Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("round_to", [None, 4])
def test_layers_of_a_kind_keep_equally_many_units_and_the_budget_is_used_up(
    round_to: int | None,
) -> None:
    graph = analyse(Blocks(), torch.randn(2, 12))
    names = [group.name for group in graph.groups]
    inner = [names.index(f"blocks.{number}.0") for number in range(4)]
    assert len({*graph.kinds[inner[:3]]}) == 1
    assert graph.kinds[inner[3]] != graph.kinds[inner[0]]
    rng, seen = np.random.default_rng(0), set()
    for share in np.linspace(0.3, 0.95, 12):
        budget = Budget(keep_macs=float(share), round_to=round_to, uniform=True)
        scores = rng.normal(size=graph.num_units).astype(np.float32)
        masks = [graph.project(scores, budget), graph.repair(scores > 0, budget, rng)[0]]
        for mask in masks:
            widths = [int(mask.keep[graph.groups[number].units].sum()) for number in inner]
            assert len({*widths[:3]}) == 1
            assert round_to is None or all(width % 4 == 0 for width in widths[:3])
            assert graph.fits(mask, budget)
            again, flipped = graph.repair(mask.keep, budget, rng)
            assert (again, flipped) == (mask, 0.0)
            if widths[0] < 20:  # one step more for all three does not fit
                more = mask.keep.copy()
                for number in inner[:3]:
                    units = graph.groups[number].units
                    more[units[~mask.keep[units]][: round_to or 1]] = True
                assert graph.cost(more).macs > share * graph.dense_cost.macs
            seen.add(widths[0])
        odd = masks[0].keep.copy()
        spare = graph.groups[inner[0]].units
        odd[spare[masks[0].keep[spare]][0]] = False
        assert misfit(graph, odd, budget).sum() == 1
        assert not graph.fits(odd, budget)
    assert len(seen) > 3
