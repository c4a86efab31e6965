"""FedMap and FedAvg as methods: budgets, bytes, resume, refusals, any task."""

import importlib
import itertools
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ArtefactError, BudgetError, ConfigError
from prunegraph.core.splits import Dataset
from prunegraph.core.weight_mask import WeightMask
from prunegraph.methods.context import Context
from prunegraph.methods.fedmap import rounds
from prunegraph.methods.fedmap.method import FedAvg, Federation, FedMap
from prunegraph.methods.obs.magnitude import Magnitude
from prunegraph.methods.registry import FEDERATED, make_method
from prunegraph.models import build_model
from prunegraph.runs.options import methods as options
from prunegraph.tasks import custom
from support.federation import SMALL, make_task, pose


def test_the_mask_is_nested_in_all_before_it_and_bytes_fall(digits: Dataset) -> None:
    problem = pose(digits)
    found = FedMap(**SMALL, every=1, dirichlet=0.5).prune(problem)
    plain = FedAvg(**SMALL, dirichlet=0.5).prune(problem)
    assert isinstance(found.mask, WeightMask)
    assert isinstance(plain.mask, WeightMask)
    assert found.model is not None
    found.mask.check_zeros(found.model)
    assert (plain.mask.sparsity, round(found.mask.sparsity, 2)) == (0.0, 0.8)
    for name in ("bytes_up", "bytes_down"):
        assert 0 < found.details[name] < 0.8 * plain.details[name]
    clients = found.details["clients"]
    assert sum(clients["samples"]) == 400
    assert clients["min"] <= clients["mean"] <= clients["max"]
    assert found.details["losses"][-1] < found.details["losses"][0]


def test_a_result_is_pruned_further(digits: Dataset) -> None:
    problem = pose(digits)
    found = FedMap(**SMALL).prune(problem)
    assert found.model is not None
    assert isinstance(found.mask, WeightMask)
    again = replace(problem, task=replace(make_task(digits), model=found.model))
    further = Magnitude().prune(replace(again, budget=Budget(sparsity=0.9)))
    assert isinstance(further.mask, WeightMask)
    assert further.mask.nested(found.mask) or further.mask.sparsity > found.mask.sparsity


class Stop(Exception):
    pass


@pytest.mark.parametrize("participants", [None, 2])
def test_a_federation_that_is_stopped_goes_on_to_the_same_result(
    digits: Dataset, tmp_path: Path, participants: int | None
) -> None:
    method = FedMap(**{**SMALL, "rounds": 6}, every=1, participants=participants, dirichlet=0.5)
    whole = method.prune(pose(digits))

    def stop(done: int, _: str) -> None:
        if done == 100 * 4 // 6:
            raise Stop

    with pytest.raises(Stop):
        method.prune(pose(digits, folder=tmp_path, progress=stop))
    percents: list[int] = []
    resumed = method.prune(
        pose(digits, folder=tmp_path, progress=lambda done, _: percents.append(done))
    )
    assert percents == [83, 100]
    assert resumed.mask == whole.mask
    assert resumed.details == whole.details
    assert whole.model is not None
    assert resumed.model is not None
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    for other in (pose(digits, seed=1, folder=tmp_path), pose(digits, folder=tmp_path)):
        changed = method if other.seed else replace(method, lr=0.2)
        with pytest.raises(ArtefactError, match="another federation"):
            changed.prune(other)
    path = tmp_path / "fedmap.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtefactError):
        method.prune(pose(digits, folder=tmp_path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clients": 0}, "clients=0"),
        ({"dirichlet": 0.0}, "dirichlet=0.0"),
        ({"dirichlet": float("nan")}, "dirichlet=nan"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"participants": 11}, "participants=11"),
        ({"participants": 0}, "participants=0"),
        ({"start": "warm"}, "start='warm'"),
    ],
)
def test_options_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    for kind in (FedMap, FedAvg):
        with pytest.raises(ConfigError, match=message) as refused:
            kind(**given)
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="until=0"):
        FedMap(until=0.0)


def test_what_cannot_be_served_is_refused_before_any_work(digits: Dataset) -> None:
    for budget in (
        Budget(keep_macs=0.5),
        Budget(pattern="2:4"),
        Budget(sparsity=0.5, pattern="columns"),
    ):
        with pytest.raises(BudgetError, match="sparsity"):
            FedMap().check(pose(digits, budget=budget))
    with pytest.raises(BudgetError, match=r"leaves none of [\d,]+ weights: give a lower one"):
        FedMap().check(pose(digits, budget=Budget(sparsity=0.99999)))
    with pytest.raises(ConfigError, match="too many"):
        FedMap(clients=300).check(pose(digits))

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    task = make_task(digits)
    odd = replace(task, model=nn.Sequential(task.model, Odd()))
    with pytest.raises(ConfigError, match="start=given"):
        FedMap().check(pose(digits, task=odd))
    FedMap(start="given").check(pose(digits, task=odd))


def test_zeros_of_given_weights_stay_and_are_not_given_back(digits: Dataset) -> None:
    sparse = Magnitude().prune(pose(digits))
    assert isinstance(sparse.mask, WeightMask)
    task = make_task(digits)
    sparse.mask.put_zeros(task.model)
    method = FedMap(**SMALL, every=1, start="given")
    found = method.prune(pose(digits, task=task, budget=Budget(sparsity=0.9)))
    assert isinstance(found.mask, WeightMask)
    assert found.mask.nested(sparse.mask)
    assert round(found.mask.sparsity, 2) == 0.9
    with pytest.raises(BudgetError, match=r"are zero already, sparsity=0\.7 asks") as no:
        method.check(pose(digits, task=task, budget=Budget(sparsity=0.7)))
    assert "\n" not in str(no.value)
    zeros = sparse.mask.size - sparse.mask.num_kept  # a sparsity is a number of weights, rounded
    method.check(pose(digits, task=task, budget=Budget(sparsity=(zeros - 0.4) / sparse.mask.size)))
    plain = replace(FedAvg(**SMALL), start="given").prune(pose(digits, task=task))
    assert plain.mask == sparse.mask


@pytest.mark.slow  # other tests beside it disturb the clock
def test_a_round_costs_little_more_than_its_clients_training(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("digits_resnet8_w8_gn", num_classes=10, image_shape=(1, 8, 8))
    trained, train = [0.0], rounds._train
    marks: list[tuple[float, float]] = []

    def timed(*given: Any) -> float:
        begin = time.process_time()
        loss = train(*given)
        trained[0] += time.process_time() - begin
        return loss

    def mark(*_: Any) -> None:
        marks.append((time.process_time(), trained[0]))

    monkeypatch.setattr(rounds, "_train", timed)
    task = replace(make_task(digits), model=model.eval(), train=digits.train)
    FedMap(rounds=6, every=1).prune(pose(digits, task=task, progress=mark))
    shares = [(b[0] - a[0]) / (b[1] - a[1]) - 1.0 for a, b in itertools.pairwise(marks)]
    assert 0.0 < min(shares) < 0.2  # of a tiny network 0.08 to 0.12


def test_flower_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "prunegraph.methods.fedmap.flower"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    with pytest.raises(ConfigError, match=r"pip install 'prunegraph\[flower\]'") as missing:
        importlib.import_module(module)
    assert "\n" not in str(missing.value)


def test_given_weights_are_where_it_starts(digits: Dataset) -> None:
    task = make_task(digits)
    method = FedAvg(**{**SMALL, "rounds": 1, "lr": 1e-9}, start="given")
    found = method.prune(pose(digits, task=task)).model
    fresh = replace(method, start="fresh").prune(pose(digits, task=task)).model
    assert found is not None
    assert fresh is not None
    weight = task.model.get_parameter("1.weight")
    assert torch.allclose(found.get_parameter("1.weight"), weight, atol=1e-6)
    assert not torch.allclose(fresh.get_parameter("1.weight"), weight, atol=1e-2)


def test_batches_of_any_form_are_trained_on() -> None:
    torch.manual_seed(0)
    truth = torch.randn(6, 2)
    xs = [torch.randn(16, 6) for _ in range(8)]
    batches = [{"x": x, "y": {"target": x @ truth}} for x in xs]

    def loss(net: nn.Module, batch: Any) -> torch.Tensor:
        return (net(batch["x"]) - batch["y"]["target"]).square().mean()

    held = torch.randn(64, 6)
    task = custom(
        nn.Linear(6, 2),
        example_inputs=torch.zeros(1, 6),
        train=batches,
        loss=loss,
        score=lambda net: float((net(held) - held @ truth).square().mean()),
        higher_is_better=False,
    )
    context = Context(task=task, structure=None, seed=0, reconstruct=False)
    problem = context.problem(Budget(sparsity=0.25))
    found = FedMap(clients=3, rounds=12, lr=0.05).prune(problem)
    assert found.model is not None
    assert found.details["clients"] == {"samples": [3, 3, 2]}
    assert task.score(found.model).value < 0.5 * task.score(task.model).value


def test_both_are_registered_and_take_the_options_of_a_federation() -> None:
    assert {*options.SHORT} <= asdict(FedAvg()).keys()
    words = ["--clients", "5", "--dirichlet=0.3", "--fedmap.every", "2", "--sparsity", "0.9"]
    left, given = options.split_words(words, ())
    assert left == ["--sparsity", "0.9"]
    assert options.options_of(given, "fedavg") == {"clients": "5", "dirichlet": "0.3"}
    assert options.options_of(given, "fedmap") == {"clients": "5", "dirichlet": "0.3", "every": "2"}
    assert options.options_of(given, "magnitude") == {}
    options.check_named(given, ["fedmap"])
    with pytest.raises(ConfigError, match="not run here"):
        options.check_named(given, ["magnitude"])
    assert all(isinstance(make_method(name), Federation) for name in FEDERATED)
