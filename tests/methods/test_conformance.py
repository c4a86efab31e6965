"""What every method does: each registered one on three toy tasks.

A new method gets a row in ``ROWS``; heuristics have theirs by their criteria and allocations.
"""

from collections.abc import Mapping
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from prunegraph.core.budget import Budget
from prunegraph.core.splits import SearchSplit, TrainSplit
from prunegraph.core.task import Task
from prunegraph.data import load_dataset
from prunegraph.graph import analyse
from prunegraph.methods.allocation import ALLOCATIONS
from prunegraph.methods.context import Context
from prunegraph.methods.controls import WidthsControl
from prunegraph.methods.criteria.registry import CRITERIA
from prunegraph.methods.custom import CustomMethod
from prunegraph.methods.maskprune.method import MaskPrune
from prunegraph.methods.method import Method, Problem, Result
from prunegraph.methods.registry import (
    heuristics,
    make_method,
    method_names,
    torch_pruning,
)
from prunegraph.testing import MethodConformance
from support.tasks import image_task, language_task

TASKS = ("cnn", "transformer", "language model")

BUDGETS: Mapping[str, Budget] = {
    "cnn": Budget(keep_macs=0.4),
    "transformer": Budget(keep_params=0.6),
    "language model": Budget(keep_macs=0.6),
}

ROWS: Mapping[str, tuple[str, ...]] = {
    "random_search": TASKS,
    "cem": TASKS,
    "netadapt": TASKS,
    "amc": TASKS,
    "agent": TASKS,
    "sampler": TASKS,
    "prior": TASKS,
    "maskprune": TASKS,
    "struprune": ("language model",),
    **dict.fromkeys(torch_pruning(), ("cnn",)),
    **dict.fromkeys(heuristics(), ("cnn",)),
    **dict.fromkeys((f"{criterion}/uniform" for criterion in CRITERIA), TASKS),
    **dict.fromkeys((f"taylor/{allocation}" for allocation in ALLOCATIONS), TASKS),
}
"""Method -> the tasks that it serves; for those of single weights see ``obs``."""

NETWORKS = {"agent": 48, "sampler": 48}
"""Networks of methods that cannot do with fewer."""

QUICK: Mapping[str, Method] = {"maskprune": MaskPrune(steps=20)}
"""Methods that take long with the options that they have by themselves."""


class Patches(nn.Module):
    """A block of a transformer over the patches of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 16, 4, stride=4)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        logits: Tensor = self.head((x + self.down(self.up(x).relu())).mean(1))
        return logits


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip


def images(model: nn.Module) -> Task:
    data = load_dataset("digits")
    train = TrainSplit(data.train.source, data.train.index[:192])
    return image_task(model.eval(), train, SearchSplit(data.search.source, data.search.index[:96]))


@cache
def context(name: str) -> Context:
    torch.manual_seed(0)
    if name == "language model":
        task: Task = language_task()
    else:
        task = images(cnn() if name == "cnn" else Patches())
    graph = analyse(task.model, task.example_inputs)
    return Context(
        task=task,
        structure=graph,
        num_calibration=64,
        reconstruct=name == "cnn",
        layer_by_layer=False,
        subset_size=64,
    )


class OnToys(MethodConformance):
    task = "cnn"

    def make_problem(self, seed: int, max_networks: int) -> Problem:
        return context(self.task).problem(BUDGETS[self.task], seed=seed, max_networks=max_networks)


@pytest.mark.filterwarnings("ignore:the calibration data have")  # toys have few
class TestMethods(OnToys):
    @pytest.fixture(
        autouse=True,
        params=[(name, task) for name, tasks in ROWS.items() for task in tasks],
        ids="-".join,
    )
    def _choose(self, request: pytest.FixtureRequest) -> None:
        self.chosen, self.task = request.param
        self.max_networks = NETWORKS.get(self.chosen, self.max_networks)
        if self.chosen in torch_pruning():
            pytest.importorskip("torch_pruning")

    def make_method(self) -> Method:
        return QUICK.get(self.chosen) or make_method(self.chosen)

    def test_its_name_is_the_registry_s(self) -> None:
        assert self.make_method().name == self.chosen


class TestAppliedPolicy(OnToys):
    def make_method(self) -> Method:
        return make_method("policy:resnet-cifar")


def test_every_registered_method_has_a_row() -> None:
    weights = {name for name in method_names() if make_method(name).kind == "weights"}
    assert {*ROWS} == {*method_names()} - weights


class TestGivenWidths(OnToys):
    @pytest.fixture(autouse=True, params=["l1", "random"])
    def _choose(self, request: pytest.FixtureRequest) -> None:
        self.criterion = request.param

    def make_method(self) -> Method:
        problem = self.make_problem(0, 0)
        mask = make_method("taylor/per_mac").prune(problem).channels
        return WidthsControl(self.criterion, problem.graph.group_widths(mask))


class KeepFirst:
    """A user's method: it declares nothing but what it does."""

    def prune(self, problem: Problem) -> Result:
        scores = torch.arange(problem.graph.num_units, 0, -1).float().numpy()
        mask = problem.project(scores)
        problem.evaluator.evaluate(mask)
        return Result(mask=mask)


class TestUsersMethod(OnToys):
    def make_method(self) -> Method:
        return CustomMethod("own.module:KeepFirst", KeepFirst())


class Overspender:
    name, role, kind = "overspender", "baseline", "channels"
    searches, per_seed = False, True

    def check(self, problem: Problem) -> None:
        problem.evaluator.evaluate(problem.graph.dense_mask())

    def prune(self, problem: Problem) -> Result:
        problem.evaluator.evaluate(problem.graph.dense_mask())
        problem.task.model.register_buffer("mark", torch.zeros(1))
        next(iter(problem.task.model.parameters())).data.add_(1.0)
        return Result(mask=problem.graph.dense_mask())


class Cheating(OnToys):
    def make_method(self) -> Method:
        return Overspender()  # type: ignore[return-value]

    def make_problem(self, seed: int, max_networks: int) -> Problem:
        torch.manual_seed(0)
        task = images(cnn())
        graph = analyse(task.model, task.example_inputs)
        place = Context(task=task, structure=graph, num_calibration=64, reconstruct=False)
        return place.problem(Budget(keep_macs=0.5), seed=seed, max_networks=max_networks)


@pytest.mark.parametrize(
    "test",
    [
        "test_a_seed_fixes_a_legal_result_and_the_model_is_left_as_it_was",
        "test_what_it_cannot_serve_is_refused_before_any_work",
    ],
)
def test_a_method_that_cheats_does_not_conform(test: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        getattr(Cheating(), test)()


@pytest.mark.parametrize("check", ["check_budget", "check_mask"])
def test_what_a_method_that_cheats_returns_breaks_each_rule(check: str) -> None:
    problem = Cheating().make_problem(0, 12)
    with pytest.raises(AssertionError):
        getattr(Cheating(), check)(problem, Overspender().prune(problem))
