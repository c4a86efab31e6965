"""Scores on the scale of an accuracy."""

import itertools
import math

import pytest

from prunegraph.core.task import WORST_UTILITY, Score


def score(value: float, *, higher: bool) -> Score:
    return Score(name="score", value=value, higher_is_better=higher)


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("dense", [0.0, 0.02, 0.7, 1.0, 1.5, 38.0, -0.4, -38.0])
def test_a_better_score_has_a_higher_utility(dense: float, higher: bool) -> None:
    values = sorted([-1e4, -50.0, -1.0, -0.1, 0.0, 0.3, 1.0, 1.1, 20.0, 38.0, 76.0, 1e4, dense])
    found = [score(v, higher=higher).relative_to(score(dense, higher=higher)) for v in values]
    ordered = found if higher else found[::-1]
    assert all(a < b for (a, b), (v, w) in zip(
        itertools.pairwise(ordered), itertools.pairwise(values if higher else values[::-1]),
        strict=True,
    ) if v != w)  # fmt: skip
    assert min(found) > WORST_UTILITY


def test_utilities_by_hand() -> None:
    accuracy, error = score(0.9, higher=True), score(0.1, higher=False)
    assert score(0.8, higher=True).relative_to(accuracy) == 0.8
    assert score(0.2, higher=False).relative_to(error) == pytest.approx(0.8)
    percent, perplexity = score(76.0, higher=True), score(38.0, higher=False)
    assert percent.relative_to(percent) == perplexity.relative_to(perplexity) == 1.0
    assert score(38.0, higher=True).relative_to(percent) == 0.5
    assert score(76.0, higher=False).relative_to(perplexity) == pytest.approx(0.5)
    assert score(25_598.0, higher=False).relative_to(perplexity) == pytest.approx(38.0 / 25_598.0)
    assert (accuracy.utility, error.utility) == (0.9, -0.1)


@pytest.mark.parametrize("dense", [0.1, 38.0])
def test_what_is_no_number_is_the_worst(dense: float) -> None:
    for value, higher in (
        (math.nan, True),
        (math.nan, False),
        (math.inf, False),
        (-math.inf, True),
    ):
        found = score(value, higher=higher).relative_to(score(dense, higher=higher))
        assert found == WORST_UTILITY
