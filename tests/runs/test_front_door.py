"""What a person meets first in Python: a model and a loader, patterns, steps, a table."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import prunegraph as pg
from prunegraph.core.errors import BudgetError, ConfigError
from prunegraph.data import load_dataset
from prunegraph.methods.registry import make_method
from prunegraph.models import build_model
from prunegraph.runs.gradual import budgets_of
from prunegraph.runs.target import measure_cost

HALF = pg.Budget(keep_macs=0.5)
IMAGE = torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module")
def loader() -> DataLoader[tuple[Tensor, ...]]:
    images, labels = next(load_dataset("digits").train.batches(256))
    return DataLoader(TensorDataset(images, labels), batch_size=32)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model("digits_resnet8_w8", num_classes=10, image_shape=(1, 8, 8)).eval()


@pytest.mark.parametrize("method", ["taylor/uniform", make_method("l1/global")])
def test_a_model_and_a_loader_are_enough(
    method: Any, network: nn.Module, loader: DataLoader[Any]
) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    result = pg.prune(network, method, HALF, data=loader)
    assert result.report["pruned"]["macs"] <= 0.5 * result.report["dense"]["macs"]
    assert sum(p.numel() for p in result.model.parameters()) == result.report["pruned"]["params"]
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    task = result.task
    train, search = set(task.train.index.tolist()), set(task.search.index.tolist())
    assert task.test is None
    assert train
    assert search


def test_scores_are_those_that_the_heuristic_prunes_by(
    network: nn.Module, loader: DataLoader[Any]
) -> None:
    graph = pg.analyse(network, IMAGE)
    found = pg.scores(network, graph, "taylor", loader)
    assert found.shape == (graph.num_units,)
    result = pg.prune(network, "taylor/global", HALF, data=loader)
    assert graph.project(found, HALF) == result.mask
    assert graph.project(pg.scores(network, graph, "l1", loader), HALF) != result.mask


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ConfigError, "comes without data: give data="),
        ({"method": "magnitude", "exclude": ["fc"]}, ConfigError, "magnitude removes no channels"),
        ({"exclude": ["layr"]}, ConfigError, "matches no module"),
        ({"steps": 0}, ConfigError, "steps=0 must be at least 1"),
        ({"steps": 2, "schedule": "square"}, ConfigError, "unknown schedule 'square'"),
    ],
)
def test_bad_input_is_one_sentence(
    given: dict[str, Any],
    error: type[Exception],
    message: str,
    network: nn.Module,
    loader: DataLoader[Any],
) -> None:
    given = {"method": "l1/uniform", **({"data": loader} if given else {}), **given}
    with pytest.raises(error, match=message) as raised:
        pg.prune(network, budget=HALF, **given)
    assert "\n" not in str(raised.value)


def test_a_task_takes_no_other_data(network: nn.Module, loader: DataLoader[Any]) -> None:
    task = pg.tasks.image_classification(network, train=loader)
    with pytest.raises(ConfigError, match="drop data"):
        pg.prune(task, "l1/uniform", HALF, data=loader)


def test_patterns_reach_the_method(network: nn.Module, loader: DataLoader[Any]) -> None:
    result = pg.prune(
        network,
        "l1/global",
        pg.Budget(keep_macs=0.8),
        data=loader,
        exclude=["layer1.*"],
        keep_at_least={"layer3.0.conv1": 0.9},
    )
    assert result.model.layer1[0].conv1.weight.shape == network.layer1[0].conv1.weight.shape
    widths = result.report["pruned"]["widths"]
    assert widths["layer3.0.conv1"] >= 0.9 * network.layer3[0].conv1.out_channels
    assert "layer1.0.conv1" not in widths


@pytest.mark.parametrize("schedule", ["cubic", "linear"])
def test_steps_end_at_the_budget_with_a_mask_of_the_dense_network(
    schedule: Any, network: nn.Module, loader: DataLoader[Any]
) -> None:
    seen: list[tuple[int, int]] = []

    def between(model: nn.Module, step: int) -> None:
        seen.append((step, measure_cost(model, IMAGE).macs))
        with torch.no_grad():
            model.conv1.weight.mul_(1.5)

    budget = pg.Budget(keep_macs=0.4, keep_params=0.6)
    result = pg.prune(
        network,
        "taylor/global",
        budget,
        data=loader,
        steps=3,
        schedule=schedule,
        between=between,
        reconstruct=False,
        keep_at_least={"layer2.0.conv1": 0.5},
    )
    dense = result.report["dense"]["macs"]
    gone = {"cubic": (19 / 27, 26 / 27), "linear": (1 / 3, 2 / 3)}[schedule]
    assert [step for step, _ in seen] == [1, 2]
    for share, (_, macs) in zip(gone, seen, strict=True):
        assert macs <= (1 - 0.6 * share) * dense
    pruned = result.report["pruned"]
    assert pruned["macs"] == measure_cost(result.model, IMAGE).macs <= 0.4 * dense
    assert pruned["params"] <= 0.6 * result.report["dense"]["params"]
    assert result.graph is not None
    assert result.graph.fits(result.mask, budget)
    shape = pg.apply_mask(network, result.graph, result.mask).state_dict()
    assert {n: v.shape for n, v in shape.items()} == {
        n: v.shape for n, v in result.model.state_dict().items()
    }
    kept = pg.apply_mask(network, result.graph, result.mask).conv1.weight
    torch.testing.assert_close(result.model.conv1.weight, 1.5**2 * kept)


def test_the_built_in_fine_tune_runs_between_steps(
    network: nn.Module, loader: DataLoader[Any]
) -> None:
    recipe = pg.FinetuneConfig(epochs=1, peak_lr=0.01)
    given: dict[str, Any] = {"data": loader, "steps": 2, "progress": False}
    tuned = pg.prune(network, "l1/uniform", HALF, between=recipe, **given)
    plain = pg.prune(network, "l1/uniform", HALF, **given)
    assert tuned.report["pruned"]["macs"] == plain.report["pruned"]["macs"]
    assert tuned.report["pruned"]["score"] > plain.report["pruned"]["score"]


@pytest.mark.parametrize(
    ("method", "budget"),
    [("cem", pg.Budget(max_latency=9.0)), ("l1/uniform", pg.Budget(keep_macs=0.5, depth=True))],
)
def test_a_limit_that_one_step_meets_takes_no_steps(
    method: str, budget: pg.Budget, network: nn.Module, loader: DataLoader[Any]
) -> None:
    with pytest.raises(BudgetError, match="is met in one step: leave steps out"):
        pg.prune(network, method, budget, data=loader, steps=2)


@pytest.mark.usefixtures("parameter_clock")
def test_a_latency_falls_step_by_step(network: nn.Module, loader: DataLoader[Any]) -> None:
    graph = pg.analyse(network, IMAGE)
    asked = pg.Budget(max_latency=4.0)
    limits = [item.max_latency for item in budgets_of(graph, asked, 3, "linear", 10.0)]
    assert limits == pytest.approx([8.0, 6.0, 4.0])
    seen: list[int] = []
    result = pg.prune(
        network,
        "l1/uniform",
        pg.Budget(keep_macs=0.5, max_latency=500.0),
        data=loader,
        steps=2,
        between=lambda model, _: seen.append(measure_cost(model, IMAGE).macs),
        reconstruct=False,
    )
    assert seen[0] > result.report["pruned"]["macs"]
    assert result.report["latency_ms"]["pruned"] <= 500.0


def test_depth_leaves_what_has_to_stay(loader: DataLoader[Any]) -> None:
    torch.manual_seed(0)
    model = build_model("digits_resnet20_w8", num_classes=10, image_shape=(1, 8, 8)).eval()
    budget = pg.Budget(keep_macs=0.3, depth=True)
    result = pg.prune(
        model, "random/global", budget, data=loader, keep_at_least={"layer1.1.conv1": 0.75}
    )
    assert result.report["pruned"]["widths"]["layer1.1.conv1"] >= 6


def test_summary_and_plot_show_costs_and_score(
    network: nn.Module, loader: DataLoader[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    result = pg.prune(network, "l1/uniform", HALF, data=loader)
    result.summary()
    told = capsys.readouterr().out
    pruned = result.report["pruned"]
    assert f"{pruned['macs']:,}" in told
    assert "accuracy, search split" in told
    assert "l1/uniform: keep_macs 0.5" in told
    axes = result.plot().axes[0]
    labels = [text.get_text() for text in axes.texts]
    assert len(labels) == len(pruned["widths"])
    assert f"8 → {pruned['widths']['conv1']}" in labels


def test_summary_and_plot_of_single_weights(
    network: nn.Module, loader: DataLoader[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    result = pg.prune(network, "magnitude", pg.Budget(sparsity=0.5), data=loader)
    result.summary()
    assert "50.00 %" in capsys.readouterr().out
    assert len(result.plot().axes[0].texts) == len(result.mask.keep)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_shows_on_a_terminal_unless_it_is_off(
    progress: bool,
    network: nn.Module,
    loader: DataLoader[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    pg.prune(network, "l1/uniform", HALF, data=loader, progress=progress)
    assert ("l1/uniform" in capsys.readouterr().out) == progress


def test_nothing_is_printed_elsewhere(
    network: nn.Module, loader: DataLoader[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    pg.prune(network, "l1/uniform", HALF, data=loader)
    assert capsys.readouterr() == ("", "")
