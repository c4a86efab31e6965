"""What every method of single weights does: add a row for a new one."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import MaskError
from prunegraph.core.pattern import Pattern
from prunegraph.core.splits import Dataset
from prunegraph.core.weight_mask import WeightMask
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.graph import analyse
from prunegraph.layerwise.weights import prunable_weights
from prunegraph.methods.fedmap.method import FedAvg, FedMap
from prunegraph.methods.method import Method, Problem, Result
from prunegraph.methods.registry import RANDOMIZED, WEIGHT_METHODS, make_method
from prunegraph.runs.options.fields import with_options
from prunegraph.tasks.image_classification import ImageClassification
from prunegraph.testing import WeightMethodConformance

ROWS = [
    (method, budget)
    for method in WEIGHT_METHODS
    for budget in (Budget(sparsity=0.7), Budget(pattern="2:4"))
]
"""Methods, each with the budgets that it serves."""


def pose(digits: Dataset, budget: Budget) -> Problem:
    """Return the problem of a small network whose layers read multiples of 4 inputs."""
    torch.manual_seed(0)
    widths = (64, 24, 16)
    layers = [nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in itertools.pairwise(widths)]
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(16, 10))
    example = torch.zeros(1, *digits.image_shape)
    task = ImageClassification(
        model=model,
        example_inputs=example,
        train=digits.train,
        search=digits.search,
        test=digits.test,
    )
    graph = analyse(model, example)
    return Problem(
        task=task,
        structure=graph,
        budget=budget,
        statistics={},
        make_evaluator=lambda _: Evaluator(task, graph, num_calibration=64),
        make_unlabelled=lambda: Evaluator(task, graph, num_calibration=64),
        num_calibration=64,
    )


class TestWeightMethods(WeightMethodConformance):
    @pytest.fixture(autouse=True, params=ROWS, ids=lambda row: f"{row[0]}-{row[1].as_dict()}")
    def _choose(self, request: pytest.FixtureRequest, digits: Dataset) -> None:
        self.name, self.budget = request.param
        self.digits = digits

    def make_method(self) -> Method:
        return make_method(self.name)

    def make_problem(self, seed: int, max_networks: int) -> Problem:
        del seed, max_networks  # no row runs networks, or draws more than the calibration data
        return pose(self.digits, self.budget)

    def test_it_says_that_it_chooses_weights(self) -> None:
        assert self.make_method().kind == "weights"


class TestFedMap(WeightMethodConformance):
    def make_method(self) -> Method:
        return FedMap(clients=3, rounds=4, epochs=1, batch_size=64)

    def make_problem(self, seed: int, max_networks: int) -> Problem:
        del max_networks
        return replace(pose(self.digits, Budget(sparsity=0.7)), seed=seed)

    @pytest.fixture(autouse=True)
    def _choose(self, digits: Dataset) -> None:
        self.digits = digits


class TestFedAvg(TestFedMap):
    def make_method(self) -> Method:
        return FedAvg(clients=3, rounds=2, epochs=1, batch_size=64)

    def check_budget(self, problem: Problem, result: Result) -> None:
        del problem  # a control: it prunes nothing, and says so
        assert isinstance(result.mask, WeightMask)
        assert result.mask.sparsity == 0.0
        assert self.make_method().role == "control"


class TestRandomized(WeightMethodConformance):
    @pytest.fixture(autouse=True, params=RANDOMIZED)
    def _choose(self, request: pytest.FixtureRequest, digits: Dataset) -> None:
        self.name, self.digits = request.param, digits

    def make_method(self) -> Method:
        options = {"candidates": "2", "early": "2", "steps": "3"}
        return with_options(make_method(self.name), options)

    def make_problem(self, seed: int, max_networks: int) -> Problem:
        del max_networks
        return replace(pose(self.digits, Budget(sparsity=0.7)), seed=seed)


class Careless:
    """Zeroes another number of weights, not in groups, and hands back a dense network."""

    name, role, kind = "careless", "baseline", "weights"
    searches = per_seed = False

    def check(self, problem: Problem) -> None:
        del problem

    def prune(self, problem: Problem) -> Result:
        model = problem.task.model
        keep = {
            name: torch.rand(weight.shape) < 0.5 for name, weight in prunable_weights(model).items()
        }
        return Result(mask=WeightMask(keep, Pattern.parse("2:4")), model=model)


@pytest.mark.parametrize(
    ("check", "message"),
    [("check_budget", "were asked for"), ("check_mask", "do not follow the pattern")],
)
def test_a_careless_method_does_not_conform(check: str, message: str, digits: Dataset) -> None:
    problem = pose(digits, Budget(pattern="2:4"))
    with pytest.raises((AssertionError, MaskError), match=message):
        getattr(WeightMethodConformance(), check)(problem, Careless().prune(problem))
