from collections.abc import Callable

import pytest
from prunegraph.runs.baselines import BASELINES

from prunegraph.core.budget import Budget
from prunegraph.methods.method import Method, Problem, Result
from prunegraph.methods.registry import control_widths, make_method
from prunegraph.testing.method_conformance import MethodConformance


class OnDigits(MethodConformance):
    @pytest.fixture(autouse=True)
    def _problems(self, make_problem: Callable[..., Problem]) -> None:
        self._make = make_problem

    def make_problem(self, seed: int, max_networks: int) -> Problem:
        return self._make(seed, max_networks)


# every criterion, every allocation, every search; not every pair
CHOSEN = [
    name
    for name in BASELINES
    if name.endswith("/per_mac") or name.startswith(("taylor/", "tp_")) or "/" not in name
]


class TestBaselines(OnDigits):
    @pytest.fixture(autouse=True, params=CHOSEN)
    def _choose(self, request: pytest.FixtureRequest) -> None:
        self.chosen = request.param
        if self.chosen.startswith("tp_"):
            pytest.importorskip("torch_pruning")

    def make_method(self) -> Method:
        return BASELINES[self.chosen]()

    def test_its_name_is_the_registry_s(self) -> None:
        assert self.make_method().name == self.chosen


class TestBaselinesOnAParameterBudget(OnDigits):
    @pytest.fixture(
        autouse=True, params=["taylor/per_mac", "l1/isomorphic", "cem", "netadapt", "amc"]
    )
    def _choose(self, request: pytest.FixtureRequest) -> None:
        self.chosen = request.param

    def make_method(self) -> Method:
        return BASELINES[self.chosen]()

    def make_problem(self, seed: int, max_networks: int) -> Problem:
        return self._make(seed, max_networks, Budget(keep_params=0.3))


class TestGivenWidths(OnDigits):
    @pytest.fixture(autouse=True, params=["l1", "random"])
    def _choose(self, request: pytest.FixtureRequest) -> None:
        self.criterion = request.param

    def make_method(self) -> Method:
        problem = self.make_problem(0, 0)
        mask = make_method("taylor/per_mac").prune(problem).mask
        return control_widths(self.criterion, problem.graph.group_widths(mask))


class Overspender:
    name = "overspender"

    def prune(self, problem: Problem) -> Result:
        problem.evaluator.evaluate(problem.graph.dense_mask())
        next(iter(problem.task.model.parameters())).data.add_(1.0)
        return Result(mask=problem.graph.dense_mask())


@pytest.mark.parametrize(
    "test",
    [
        "test_the_budget_is_met_and_used_up",
        "test_the_mask_is_legal",
        "test_the_model_is_left_as_it_was",
        "test_every_network_is_counted",
    ],
)
def test_a_pruner_that_cheats_does_not_conform(
    test: str, make_problem: Callable[..., Problem]
) -> None:
    class Cheating(MethodConformance):
        def make_method(self) -> Method:
            return Overspender()

        def make_problem(self, seed: int, max_networks: int) -> Problem:
            return make_problem(seed, max_networks)

    with pytest.raises(AssertionError):
        getattr(Cheating(), test)()
