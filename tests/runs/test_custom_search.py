"""The agent's search for networks of any task, by functions of their owner."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunegraph as pg
from prunegraph.core.errors import ArtefactError, BudgetError, ConfigError, DataError, ModelError
from prunegraph.data import load_dataset
from prunegraph.evaluation.log import WRITE_EVERY
from prunegraph.graph.costs.clock import Latency
from prunegraph.models import build_model
from prunegraph.tasks.classification import evaluate
from prunegraph.tasks.custom import cross_entropy
from prunegraph.tasks.image_classification import training_task
from prunegraph.training.loop import FinetuneConfig, finetune

SHORT: dict[str, Any] = {"keep_macs": 0.5, "networks": 64, "num_batches": 2}


class Regressor(nn.Module):
    """Two inputs, two outputs, no classes and no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 16), nn.Linear(5, 16)
        self.hidden, self.norm = nn.Linear(32, 24), nn.LayerNorm(24)
        self.mean, self.spread = nn.Linear(24, 1), nn.Linear(24, 1)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        both = torch.cat([self.left(left).relu(), self.right(right).relu()], dim=1)
        hidden = self.norm(self.hidden(both)).relu()
        return {"mean": self.mean(hidden), "spread": self.spread(hidden).exp()}


def regression_loss(network: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    left, right, target = batch
    found = network(left, right)
    return ((found["mean"][:, 0] - target) ** 2).sum()


@pytest.fixture(scope="module")
def task() -> tuple[Regressor, list[tuple[Tensor, Tensor, Tensor]]]:
    torch.manual_seed(0)
    left, right = torch.randn(256, 3), torch.randn(256, 5)
    target = left[:, 0] * right[:, 1]
    model = Regressor()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        (regression_loss(model, (left, right, target)) / 256).backward()
        optimizer.step()
    split = zip(left.split(64), right.split(64), target.split(64), strict=True)
    return model.eval(), list(split)


def score(batch: tuple[Tensor, Tensor, Tensor], network: nn.Module) -> float:
    """Return R^2, not below 0."""
    with torch.no_grad():
        error = regression_loss(network, batch) / len(batch[2])
    return max(0.0, 1.0 - float(error / batch[2].var()))


def test_a_network_of_two_inputs_and_no_classes_is_searched(task: Any) -> None:
    model, batches = task
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []

    def good(network: nn.Module) -> float:
        calls.append(network)
        return score(batches[-1], network)

    example = (batches[0][0][:1], batches[0][1][:1])
    result = pg.search(
        model,
        example,
        evaluate=good,
        loss=regression_loss,
        calibration_data=batches,
        progress=(records := []).append,
        **SHORT,
    )
    report = result.report
    assert report["pruned"]["macs"] <= 0.5 * report["dense"]["macs"]
    assert len(calls) - 2 <= report["networks_evaluated"] <= 64
    assert report["pruned"]["score"] == max(score(batches[-1], net) for net in calls[1:])
    assert report["dense"]["score"] == score(batches[-1], model)
    assert {"mean", "spread"} == result.model(*example).keys()
    assert records[-1]["networks"] > records[0]["networks"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("size", [64, 256])
def test_the_network_is_fitted_layer_by_layer_where_it_is_better_then(task: Any, size: int) -> None:
    model, batches = task
    example = (batches[0][0][:1], batches[0][1][:1])
    sizes: list[int] = []

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        if len(batch[2]) > size:
            msg = "a forward of another size"
            raise RuntimeError(msg)
        sizes.append(len(batch[2]))
        return regression_loss(network, batch)

    options = {"loss": loss, "calibration_data": batches, **SHORT, "num_batches": 4}
    result = pg.search(model, example, evaluate=partial(score, batches[-1]), **options)
    assert max(sizes) == size
    at_once = pg.Reconstruction(model, result.graph, lambda net: [loss(net, x) for x in batches])
    pruned = pg.apply_mask(model, result.graph, result.mask)
    at_once.apply(pruned, result.mask)
    assert result.report["pruned"]["score"] == score(batches[-1], result.model)
    gain = score(batches[-1], result.model) - score(batches[-1], pruned)
    assert gain > 0.0 if size == 256 else gain >= 0.0


def test_a_search_survives_a_fit_that_fails_at_its_end(task: Any) -> None:
    model, batches = task
    at_end: list[int] = []

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        if at_end:
            msg = "out of memory"
            raise RuntimeError(msg)
        return regression_loss(network, batch)

    def last(record: Any) -> None:
        if record["networks"] > 16:
            at_end.append(1)

    example = (batches[0][0][:1], batches[0][1][:1])
    options = {"loss": loss, "calibration_data": batches, "progress": last, **SHORT}
    with pytest.warns(UserWarning, match="not reconstructed layer by layer: .*out of memory"):
        result = pg.search(model, example, evaluate=partial(score, batches[-1]), **options)
    assert result.report["pruned"]["score"] == score(batches[-1], result.model)


def test_a_latency_is_searched_within_by_layer_times_that_are_kept(
    task: Any, tmp_path: Path, parameter_clock: Callable[..., Latency]
) -> None:
    model, batches = task
    dense = parameter_clock(model).least
    options = {
        "evaluate": lambda network: score(batches[-1], network),
        "loss": regression_loss,
        "calibration_data": batches,
        "checkpoint": tmp_path / "search.safetensors",
        **SHORT,
        "keep_macs": None,
        "max_latency": 0.6 * dense,
    }
    example = (batches[0][0][:1], batches[0][1][:1])
    result = pg.search(model, example, **options)
    found = result.report["latency_ms"]
    assert found["dense"] == pytest.approx(dense, abs=1e-3)
    assert found["pruned"] <= 0.65 * dense
    table = result.graph.latency_model
    assert table is not None
    prediction = table.expected(result.mask.keep[None].astype(float))
    assert float(prediction[0]) <= 0.6 * dense
    (tmp_path / "search.latency.json").write_text("{}")
    with pytest.raises(ArtefactError, match=r"latency\.json"):
        pg.search(model, example, **options)
    with pytest.raises(BudgetError, match="which meets max_latency=1000: give fewer"):
        pg.search(model, example, **{**options, "checkpoint": None, "max_latency": 1000.0})


@pytest.mark.slow
def test_a_search_that_was_interrupted_goes_on(task: Any, tmp_path: Path) -> None:
    model, batches = task
    options = {
        "evaluate": lambda network: score(batches[-1], network),
        "loss": regression_loss,
        "calibration_data": batches,
        **SHORT,
    }
    example = (batches[0][0][:1], batches[0][1][:1])
    whole = pg.search(model, example, **options)

    def stop(record: Any) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "search.safetensors"
    with pytest.raises(KeyboardInterrupt):
        pg.search(model, example, checkpoint=path, progress=stop, **options)
    again = pg.search(model, example, checkpoint=path, **options)
    assert again.mask == whole.mask
    assert again.report == whole.report
    with pytest.raises(ArtefactError, match="of a search with reconstruct True, not False"):
        pg.search(model, example, checkpoint=path, reconstruct=False, **options)
    with pytest.raises(ArtefactError, match="of a search with calibration_data"):
        pg.search(model, example, checkpoint=path, **{**options, "calibration_data": batches[::-1]})
    with pytest.raises(ArtefactError, match="of a search with policy None"):
        pg.search(model, example, checkpoint=path, policy="resnet-cifar", **options)
    with pytest.raises(ArtefactError, match="of a search with budget"):
        pg.search(model, example, checkpoint=path, **{**options, "keep_macs": 0.6})
    scores = path.with_suffix(".json").read_text()
    path.with_suffix(".json").unlink()
    with pytest.raises(ArtefactError, match="has lost search"):
        pg.search(model, example, checkpoint=path, **options)
    path.with_suffix(".json").write_text(scores)
    with torch.no_grad():
        next(model.parameters()).mul_(2.0)
    with pytest.raises(ArtefactError, match="of a search with network"):
        pg.search(model, example, checkpoint=path, **options)


@pytest.mark.parametrize(
    "share",
    [
        pytest.param(0.05, marks=pytest.mark.slow),
        0.5,
        pytest.param(0.9, marks=pytest.mark.slow),
    ],
)
def test_a_search_that_is_killed_between_two_networks_runs_none_again(
    task: Any, tmp_path: Path, share: float
) -> None:
    model, batches = task
    runs: list[bool] = []

    def counted(network: nn.Module) -> float:
        runs.append(network.training)
        if len(runs) == stop_at:
            raise KeyboardInterrupt
        return score(batches[-1], network)

    options = {"evaluate": counted, "loss": regression_loss, "calibration_data": batches, **SHORT}
    example, stop_at = (batches[0][0][:1], batches[0][1][:1]), 0
    whole = pg.search(model, example, **options)
    total, stop_at = len(runs), max(2, int(share * len(runs)))
    runs.clear()
    path = tmp_path / "search.safetensors"
    with pytest.raises(KeyboardInterrupt):
        pg.search(model, example, checkpoint=path, **options)
    again = pg.search(model, example, checkpoint=path, **options)
    assert again.report == whole.report
    assert again.mask == whole.mask
    assert len(runs) <= total + 1 + WRITE_EVERY  # the whole network, and what was not written


@pytest.mark.slow
def test_a_search_ends_where_there_are_no_more_masks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    images = torch.randn(60, 6)
    result = pg.search(
        model,
        images[:1],
        evaluate=lambda network: -network(images).square().mean().item(),
        loss=lambda network, batch: network(batch).square().sum(),
        calibration_data=[images],
        keep_macs=0.5,
        networks=80,
    )
    assert result.report["networks_evaluated"] < 40


def test_a_network_in_double_precision_is_searched_without_forwards_for_norms() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 4)).double()
    images = torch.randn(60, 6).double()
    answers = model(images).detach()
    losses: list[Tensor] = []

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses.append((network(batch[0]) - batch[1]).square().sum())
        return losses[-1]

    result = pg.search(
        model,
        images[:1],
        evaluate=lambda network: 1.0 - (network(images) - answers).square().mean().item(),
        loss=loss,
        calibration_data=[(images, answers)],
        keep_macs=0.5,
        networks=40,
    )
    assert result.report["pruned"]["score"] > 0.9
    assert len(losses) == 2 + 3  # gradients, a fit at once, one layer by layer: no batch norm


def test_classes_need_no_loss_and_beat_the_policy_that_it_starts_from() -> None:
    digits = load_dataset("digits")
    torch.manual_seed(0)
    model = build_model("digits_resnet8_w8", num_classes=10, image_shape=(1, 8, 8))
    finetune(
        model, training_task(model, digits.train), FinetuneConfig(epochs=4, peak_lr=0.1), seed=0
    )
    batches = list(digits.train.batches(64, shuffle=torch.Generator().manual_seed(0)))
    images = digits.search.take(torch.arange(len(digits.search)))

    def accuracy(network: nn.Module) -> float:
        return evaluate(network, images).accuracy

    example = batches[0][0][:1]
    start = pg.prune(model, example, policy="resnet-cifar", calibration_data=batches, keep_macs=0.5)
    found = pg.search(
        model,
        example,
        evaluate=accuracy,
        calibration_data=batches,
        policy="resnet-cifar",
        **SHORT,
    )
    assert found.report["pruned"]["score"] > accuracy(start.model)
    assert cross_entropy(model, batches[0]).dim() == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"networks": 28}, ConfigError, "give at least 29"),
        ({"networks": 27, "reconstruct": False}, ConfigError, "give at least 28"),
        ({"calibration_data": []}, DataError, "holds no batches"),
        ({"evaluate": lambda _: float("nan")}, ModelError, "score of the whole network is nan"),
        ({"evaluate": lambda _: None}, ModelError, "the score is None"),
        ({"checkpoint": "c.json"}, ConfigError, r"must end in \.safetensors"),
        (
            {"loss": lambda n, b: n(b[0], b[1])["mean"]},
            ModelError,
            r"returns shape \[64, 1\], not one number",
        ),
        ({"loss": lambda n, b: regression_loss(n, b).detach()}, ModelError, "leave detach"),
    ],
)
def test_what_cannot_be_is_one_line(
    options: dict[str, Any], error: type[Exception], message: str, task: Any
) -> None:
    model, batches = task
    given: dict[str, Any] = {
        "evaluate": lambda _: 0.5,
        "loss": regression_loss,
        "calibration_data": batches,
        **SHORT,
    }
    with pytest.raises(error, match=message):
        pg.search(model, (batches[0][0][:1], batches[0][1][:1]), **{**given, **options})
