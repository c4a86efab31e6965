from dataclasses import FrozenInstanceError

import pytest
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError, ConfigError
from prunegraph.core.splits import Dataset
from prunegraph.graph import StructureGraph
from prunegraph.methods.context import make_problem
from prunegraph.methods.custom import as_method
from prunegraph.methods.method import Problem, Result
from prunegraph.methods.registry import make_method
from support.tasks import image_task


class KeepFirst:
    name = "first/uniform"
    searches = False

    def prune(self, problem: Problem) -> Result:
        mask = problem.project(-problem.graph.group_of.astype("float32"))
        problem.evaluator.evaluate(mask)
        return Result(mask=mask)


@pytest.fixture
def problem(digits: Dataset, digits_net: nn.Module, digits_graph: StructureGraph) -> Problem:
    task = image_task(digits_net, digits.train, digits.search)
    options = {"num_calibration": 64, "reconstruct": False}
    return make_problem(task, digits_graph, Budget(keep_macs=0.5), max_networks=2, **options)


def test_a_users_method_gets_what_it_does_not_say(problem: Problem) -> None:
    method = as_method(KeepFirst())
    assert (method.name, method.role, method.kind) == ("first/uniform", "baseline", "channels")
    assert (method.searches, method.per_seed) == (False, True)
    result = method.prune(problem)
    assert problem.graph.fits(result.channels, problem.budget)
    assert result.networks == problem.evaluator.num_networks == 1
    with pytest.raises(FrozenInstanceError):
        problem.seed = 5  # type: ignore[misc]


def test_a_method_that_says_all_stays_as_it_is() -> None:
    method = make_method("cem")
    assert as_method(method) is method


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (object(), "has no method prune"),
        (type("Odd", (KeepFirst,), {"role": "judge"})(), "says role = 'judge': it is one of agent"),
        (type("Odd", (KeepFirst,), {"kind": "bits"})(), "says kind = 'bits'"),
    ],
)
def test_what_is_no_method_is_told_in_one_line(own: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_method(own)


def test_channels_are_refused_for_a_sparsity_before_any_work(problem: Problem) -> None:
    other = make_problem(problem.task, problem.graph, Budget(sparsity=0.5), max_networks=9)
    for name in ("l1/uniform", "cem", "prior", "netadapt"):
        with pytest.raises(BudgetError, match="zeroes single weights"):
            make_method(name).check(other)


def test_a_search_without_enough_networks_is_refused_before_any_work(problem: Problem) -> None:
    for name in ("netadapt", "taylor/sensitivity"):
        with pytest.raises(ConfigError, match=f"networks=2 is too few for {name}, which runs 7"):
            make_method(name).check(problem)
    assert problem.evaluator.num_networks == 0
