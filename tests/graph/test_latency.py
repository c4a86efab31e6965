"""Latency budgets: the table never falls, and what is returned was measured and is fast enough."""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError
from prunegraph.core.masks import BoolArray, ChannelMask, FloatArray
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.costs import latency as latency_table
from prunegraph.graph.costs import latency_budget as latency_module
from prunegraph.graph.costs.clock import Latency, measure_latencies, measure_latency
from prunegraph.graph.costs.latency import LatencyTable, measure_latency_table
from prunegraph.graph.costs.latency_budget import project_latency
from prunegraph.graph.surgery import apply_mask
from prunegraph.models import build_model

Case = tuple[nn.Module, StructureGraph, Tensor, LatencyTable]


@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = build_model("resnet20", num_classes=10, image_shape=(3, 32, 32)).train()
    example = torch.randn(1, 3, 32, 32)
    graph = analyse(model, example)
    return model, graph, example, measure_latency_table(model, graph, example, num_runs=5)


def scores_of(graph: StructureGraph, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).random(graph.num_units).astype(np.float32)


def fake_clock(dense: float, num_params: int, calls: list[float]) -> Callable[..., Latency]:
    """Return a clock that reads ``dense`` times the root of the share of parameters that remain."""

    def measure(model: nn.Module, _inputs: object, **_options: object) -> Latency:
        took = dense * (sum(p.numel() for p in model.parameters()) / num_params) ** 0.5
        calls.append(took)
        return Latency(least=took, median=took, p90=took, num_runs=1, ran=1.0)

    return measure


def test_a_forward_is_timed_and_the_model_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2)).train()
    calls: list[bool] = []
    model.register_forward_hook(lambda module, _args, _out: calls.append(module.training))
    latency = measure_latency(model, torch.randn(2, 4), num_runs=7, num_warm_up=2)
    assert calls == [False] * 9
    assert model.training
    assert torch.is_grad_enabled()
    assert latency.num_runs == 7
    assert 0.0 < latency.least <= latency.median <= latency.p90
    assert measure_latency(model, torch.randn(2, 4), max_seconds=0.0).num_runs == 3


def test_networks_have_their_turns_and_the_fastest_run_counts() -> None:
    models = [nn.Linear(4, 8), nn.Linear(4, 2)]
    calls: list[int] = []

    def disturb(number: int) -> None:
        calls.append(number)
        if len(calls) % 3:  # two runs of three meet a busy machine
            time.sleep(0.01)

    for number, model in enumerate(models):
        model.register_forward_hook(lambda *_, number=number: disturb(number))
    found = measure_latencies(models, torch.randn(2, 4), num_runs=7, num_warm_up=1)
    assert calls == [0, 1, *([0] * 3 + [1] * 3) * 2, 0, 1]
    for latency in found:
        assert latency.num_runs == 7
        assert 0.0 < latency.ran <= 1.0
        assert latency.least < 5.0 < 10.0 <= latency.median


def test_a_busy_machine_is_told() -> None:
    model, inputs = nn.Linear(4, 8), torch.randn(2, 4)
    assert measure_latency(model, inputs).disturbed is None
    model.register_forward_hook(lambda *_: time.sleep(0.01))
    said = measure_latency(model, inputs, num_runs=3).disturbed
    assert said is not None
    assert re.fullmatch(r"other processes had the processor for (\d+) % of the fastest run", said)


def test_the_table_meets_both_ends_and_never_falls(case: Case) -> None:
    model, graph, _, table = case
    assert model.training
    assert len(table.times) == sum(op.param is not None for op in graph.ops)
    keep = np.ones(graph.num_units, dtype=bool)
    last = table.milliseconds(keep)
    assert last == pytest.approx(table.dense.least)
    order = np.random.default_rng(0).permutation(np.flatnonzero(graph.free))
    for index in order:
        keep[index] = False
        now = table.milliseconds(keep)
        assert now <= last + 1e-9
        last = now
    assert last < table.dense.least


def test_what_no_layer_tells_is_foretold_by_the_bytes_written(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graph, example, _ = case
    masks: dict[int, BoolArray] = {}
    assert graph.memory_model is not None
    written = graph.memory_model.written

    def cut(model: nn.Module, graph: StructureGraph, mask: ChannelMask) -> nn.Module:
        slim = apply_mask(model, graph, mask)
        masks[id(slim)] = mask.keep
        return slim

    def measure(models: Sequence[nn.Module], *_: object, **__: object) -> list[Latency]:
        found = []
        for each in models:
            keep = masks.get(id(each), np.ones(graph.num_units, dtype=bool))
            took = 1.0 + float(written[keep].sum()) / 1e6
            found.append(Latency(least=took, median=took, p90=took, num_runs=1, ran=1.0))
        return found

    monkeypatch.setattr(latency_table, "apply_mask", cut)
    monkeypatch.setattr(latency_table, "measure_latencies", measure)
    table = measure_latency_table(model, graph, example, budget=Budget(max_latency=1.5))
    assert table.excess == pytest.approx(1.0, abs=1e-6)
    assert table.rates == pytest.approx(written / 1e6, abs=1e-9)
    keep = graph.frozen | (np.random.default_rng(0).random(graph.num_units) < 0.4)
    predicted = table.milliseconds(keep)
    assert predicted == pytest.approx(1.0 + written[keep].sum() / 1e6)
    assert table.slower_by(1.1).milliseconds(keep) == pytest.approx(1.1 * predicted)


@pytest.mark.parametrize("round_to", [None, 8])
def test_layers_are_timed_at_the_widths_that_rounding_allows(
    round_to: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 32, 1)).eval()
    example = torch.randn(1, 3, 4, 4)
    seen: set[int] = set()

    def measure(layer: nn.Module, *_: object, **__: object) -> Latency:
        assert isinstance(layer, nn.Conv2d)
        if layer.out_channels == 64:  # of the dense layer: its weight is cut, no attribute
            seen.add(len(layer.weight))
        return Latency(least=1.0, median=1.0, p90=1.0, num_runs=1, ran=1.0)

    monkeypatch.setattr(latency_table, "measure_latency", measure)
    limits = Budget(max_latency=1.0, round_to=round_to)
    table = measure_latency_table(model, analyse(model, example), example, budget=limits)
    above = set() if round_to else {5, 17, 33, 49}
    assert seen == {4, 16, 32, 48, 64} | above
    assert table.smallest.least > 0.0


def test_a_prediction_has_its_slopes_and_tells_who_still_fits(case: Case) -> None:
    _, graph, _, table = case
    rng = np.random.default_rng(0)
    probabilities = rng.uniform(0.3, 0.9, (3, graph.num_units))
    step = 1e-5 * rng.normal(size=probabilities.shape)
    moved = table.expected(probabilities + step) - table.expected(probabilities)
    assert moved == pytest.approx((table.slopes(probabilities) * step).sum(axis=1), rel=1e-3)
    keep = graph.frozen | (rng.random(graph.num_units) < 0.5)
    keep[[group.units[0] for group in graph.groups]] = True
    limit = table.milliseconds(keep) + 1e-3 * table.scale
    drops, adds = np.flatnonzero(keep & graph.free)[::40], np.flatnonzero(~keep)[::40]
    fits = table.fits_with_each(keep, limit)
    for added in adds:
        bits = keep.copy()
        bits[added] = True
        assert fits[added] == (table.milliseconds(bits) <= limit)
    found = table.swapped(keep, np.append(drops, -1), np.append(adds, -1))
    assert found[-1, -1] == pytest.approx(table.milliseconds(keep))
    slopes = table.slopes(keep[None].astype(float))[0]
    assert found[0, 0] == pytest.approx(found[-1, -1] - slopes[drops[0]] + slopes[adds[0]])


@pytest.mark.parametrize("others", [{}, {"keep_macs": 0.6}, {"round_to": 4}])
def test_a_structure_with_a_prediction_meets_it_to_the_last_class(
    case: Case, others: dict[str, float]
) -> None:
    _, known, _, table = case
    graph = dataclasses.replace(known, latency_model=table)
    asked = (table.dense.least + table.smallest.least) / 2
    budget = Budget(**others, max_latency=asked)  # type: ignore[arg-type]  # types are right
    mask = graph.project(scores_of(graph), budget)
    assert graph.fits(mask, budget)
    assert graph.cost_ratio(mask.keep, budget) <= 1.0 < graph.cost_ratio(graph.free | True, budget)
    assert graph.at_stake(budget).any()
    assert not graph.at_stake(Budget(max_latency=2 * table.dense.least)).any()
    if "round_to" not in others:
        for removed in np.flatnonzero(~mask.keep):
            more = mask.keep.copy()
            more[removed] = True
            assert not graph.fits(more, budget)
    with pytest.raises(
        BudgetError, match=r"max_latency=1e-06 ms cannot be met: the least is predicted"
    ):
        graph.project(scores_of(graph), Budget(max_latency=1e-6))


def test_every_kind_of_layer_is_timed() -> None:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 32, 1),
        nn.Conv2d(32, 32, 3, padding=1, groups=4, bias=False),
        nn.ConvTranspose2d(32, 8, 2, stride=2),
        nn.Flatten(),
        nn.Linear(8 * 64, 12),
        nn.Linear(12, 3),
    ]
    model, example = nn.Sequential(*layers).eval(), torch.randn(1, 3, 4, 4)
    graph = analyse(model, example)
    table = measure_latency_table(model, graph, example, num_runs=5)
    assert len(table.times) == 7
    assert (table.times > 0).all()
    assert (np.diff(table.widths, axis=-1) >= 0).all()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_is_called_by_keyword_is_timed() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(input=self.one(x))
            return out

    model, example = Keyword().eval(), torch.randn(1, 3, 4, 4)
    table = measure_latency_table(model, analyse(model, example), example, num_runs=5)
    assert len(table.times) == 2


@pytest.mark.parametrize("others", [{}, {"keep_macs": 0.7, "round_to": 4}])
def test_the_pruned_network_is_as_fast_as_was_asked(case: Case, others: dict[str, float]) -> None:
    model, graph, example, table = case
    for left in (3, 2, 1, 0):
        asked = (table.dense.least + table.smallest.least) / 2
        budget = Budget(**others, max_latency=asked)  # type: ignore[arg-type]  # types are right
        try:
            result = project_latency(model, graph, scores_of(graph), budget, example, table=table)
        except BudgetError:  # another process may have slowed the machine since the table
            if not left:
                raise
            table = measure_latency_table(model, graph, example, num_runs=15)
        else:
            break
    assert result.latency.least <= 1.05 * asked
    assert result.latency.num_runs == 50
    assert graph.fits(result.mask, budget)
    assert 1 <= result.num_measured <= 4


def test_a_slow_network_is_cut_further(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, example, table = case
    calls: list[float] = []
    clock = fake_clock(2 * table.dense.least, graph.dense_cost.params, calls)
    monkeypatch.setattr(latency_module, "measure_latency", clock)
    asked = 0.6 * table.dense.least
    result = project_latency(
        model, graph, scores_of(graph), Budget(max_latency=asked), example, table=table
    )
    assert len(calls) == result.num_measured > 1
    assert calls[0] > 1.05 * asked >= calls[-1]
    assert calls == sorted(calls, reverse=True)


def test_three_tightenings_and_no_more(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, example, table = case
    calls: list[float] = []

    def stuck(_model: nn.Module, _inputs: object, **_options: object) -> Latency:
        calls.append(1.06 * table.dense.least)
        return Latency(least=calls[-1], median=calls[-1], p90=calls[-1], num_runs=1, ran=0.5)

    monkeypatch.setattr(latency_module, "measure_latency", stuck)
    budget = Budget(max_latency=table.dense.least)
    with pytest.raises(
        BudgetError, match=r"the CPU with 1 thread: the least .*had the processor for 50 %"
    ):
        project_latency(model, graph, scores_of(graph), budget, example, table=table)
    assert len(calls) == 4


def test_an_impossible_latency_says_the_least_and_what_is_frozen(case: Case) -> None:
    model, graph, example, table = case
    budget = Budget(max_latency=1e-4)
    with pytest.raises(BudgetError, match=r"max_latency=0\.0001 ms cannot be met") as error:
        project_latency(model, graph, scores_of(graph), budget, example, table=table)
    assert "frozen: model input; model output" in str(error.value)
    assert "\n" not in str(error.value)


def test_other_limits_are_checked_before_anything_is_timed(case: Case) -> None:
    model, graph, example, _ = case
    budget = Budget(keep_macs=1e-6, max_latency=5.0)
    with pytest.raises(BudgetError, match="keep_macs=1e-06 cannot be met"):
        project_latency(model, graph, scores_of(graph), budget, example, table=None)


def test_only_a_clock_can_meet_a_latency(case: Case) -> None:
    model, graph, example, table = case
    with pytest.raises(BudgetError, match=r"use prunegraph\.graph\.costs\.latency_budget\.project"):
        graph.project(scores_of(graph), Budget(max_latency=1.0))
    with pytest.raises(BudgetError, match=r"use graph\.project"):
        project_latency(model, graph, scores_of(graph), Budget(keep_macs=0.5), example, table=table)
    assert Budget(max_latency=1.0, round_to=8).without_latency() == Budget(
        keep_macs=1.0, round_to=8
    )


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_latency_is_above_zero(value: float) -> None:
    with pytest.raises(BudgetError, match="milliseconds above 0"):
        Budget(max_latency=value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_latency_is_met_on_a_gpu() -> None:
    torch.manual_seed(0)
    model = build_model("torchvision:vgg16_bn", num_classes=10, image_shape=(3, 64, 64)).cuda()
    example = torch.randn(64, 3, 64, 64, device="cuda")
    graph = analyse(model, example)
    table = measure_latency_table(model, graph, example)
    asked = 0.6 * table.dense.least
    budget = Budget(max_latency=asked)
    result = project_latency(model, graph, scores_of(graph), budget, example, table=table)
    assert result.latency.least <= 1.05 * asked
