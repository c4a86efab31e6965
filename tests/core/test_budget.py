import re
from typing import Any

import pytest

from prunegraph.core.budget import Budget, short
from prunegraph.core.errors import BudgetError
from prunegraph.core.pattern import UNSTRUCTURED, Pattern


@pytest.mark.parametrize("text", ["unstructured", "columns", "2:4", "1:2", "4:8", "7:1024"])
def test_a_pattern_is_read_as_it_is_written(text: str) -> None:
    pattern = Pattern.parse(text)
    assert str(pattern) == text
    assert Pattern.parse(str(pattern)) == pattern


def test_a_pattern_of_groups_fixes_the_sparsity() -> None:
    assert Pattern.parse("1:4").sparsity == 0.75
    assert Pattern.parse("02:4") == Pattern.parse("2:4")
    assert UNSTRUCTURED.sparsity is None


@pytest.mark.parametrize(
    "text", ["", "4:2", "4:4", "0:4", "2:4:8", "2/4", "-1:4", "2:2000", "9" * 9, "two", "2:4\n", 3]
)
def test_what_is_no_pattern_is_told_in_one_line(text: Any) -> None:
    with pytest.raises(BudgetError, match="as 2:4") as caught:
        Pattern.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ({"sparsity": 0.5}, {"sparsity": 0.5}),
        ({"sparsity": 0}, {"sparsity": 0}),
        ({"sparsity": 0.5, "pattern": "unstructured"}, {"sparsity": 0.5}),
        ({"pattern": "2:4"}, {"sparsity": 0.5, "pattern": "2:4"}),
        ({"sparsity": 0.667, "pattern": "1:3"}, {"sparsity": 1 - 1 / 3, "pattern": "1:3"}),
        ({"sparsity": 0.3, "pattern": "columns"}, {"sparsity": 0.3, "pattern": "columns"}),
    ],
)
def test_a_budget_of_weights_says_what_it_is(words: dict[str, Any], same: dict[str, Any]) -> None:
    budget = Budget(**words)
    assert budget.kind == "weights"
    assert budget.as_dict() == same
    assert budget == Budget(**budget.as_dict()) == budget.without_latency()
    assert hash(budget) == hash(Budget(**same))


def test_budgets_of_channels_are_as_they_were() -> None:
    budget = Budget(keep_macs=0.5, max_latency=3.0)
    assert budget.kind == "channels"
    assert budget.as_dict() == {"keep_macs": 0.5, "max_latency": 3.0}
    assert budget.without_latency() == Budget(keep_macs=0.5)
    assert Budget(max_latency=3.0).without_latency() == Budget(keep_macs=1.0)
    assert budget != Budget(sparsity=0.5)
    budget.check_channels()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "at least one of keep_macs, .* or sparsity"),
        ({"round_to": 8}, "at least one of keep_macs, .* or sparsity"),
        ({"sparsity": 1.0}, r"must lie in \[0, 1\)"),
        ({"sparsity": -0.1}, r"must lie in \[0, 1\)"),
        ({"sparsity": float("nan")}, r"must lie in \[0, 1\)"),
        ({"sparsity": 50}, "50 % is 0.5"),
        ({"sparsity": True}, "must be a number"),
        ({"sparsity": "0.5"}, "must be a number"),
        ({"sparsity": "0.5", "pattern": "2:4"}, "must be a number"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "does not fit pattern=2:4, which makes it 0.5"),
        ({"sparsity": 0.5, "pattern": "2:5"}, "does not fit pattern=2:5, which makes it 0.6"),
        ({"pattern": "columns"}, "needs a sparsity"),
        ({"pattern": "2:4", "keep_macs": 0.5}, "keep_macs removes channels"),
        ({"sparsity": 0.5, "keep_params": 0.5}, "keep_params removes channels"),
        ({"sparsity": 0.5, "max_memory": 100}, "max_memory removes channels"),
        ({"sparsity": 0.5, "max_latency": 1.0}, "max_latency removes channels"),
        ({"sparsity": 0.5, "round_to": 8}, "round_to removes channels"),
        ({"sparsity": 0.5, "pattern": "4:2"}, "as 2:4"),
    ],
)
def test_contradictions_are_told_in_one_line(words: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message) as caught:
        Budget(**words)
    assert "\n" not in str(caught.value)


def test_who_chooses_channels_refuses_a_sparsity() -> None:
    asked = re.escape("a budget of sparsity=0.5, pattern=2:4 zeroes single weights")
    with pytest.raises(BudgetError, match=asked):
        Budget(pattern="2:4").check_channels()


def test_limits_are_shown_short() -> None:
    assert [short(value) for value in (0.5, 123_456_789, "2:4", 1 / 3)] == [
        *("0.5", "123456789", "2:4", "0.333333"),
    ]


def test_uniform_is_no_limit_by_itself_and_survives_a_dict() -> None:
    with pytest.raises(BudgetError, match="at least one of"):
        Budget(uniform=True)
    with pytest.raises(BudgetError, match="uniform removes channels"):
        Budget(sparsity=0.5, uniform=True)
    with pytest.raises(BudgetError, match="must be True or False"):
        Budget(keep_macs=0.5, uniform="yes")  # type: ignore[arg-type]  # the point of the test
    budget = Budget(keep_macs=0.5, uniform=True)
    assert Budget(**budget.as_dict()) == budget != Budget(keep_macs=0.5)
    assert Budget(keep_macs=0.5).as_dict() == {"keep_macs": 0.5}
    assert Budget(sparsity=0.0).as_dict() == {"sparsity": 0.0}
