"""Sparsities by step, against their formulas and at their ends."""

import itertools

import pytest

from prunegraph.core.errors import ConfigError
from prunegraph.training.schedules import Constant, Cubic, Geometric, Levels, Schedule


def test_cubic_is_the_formula_of_its_paper() -> None:
    schedule = Cubic(0.9, begin=10, end=110, every=10, initial=0.1)
    for step in (10, 20, 55, 109):
        stage = (step - 10) // 10 * 10 / 100
        assert schedule(step) == pytest.approx(0.9 + (0.1 - 0.9) * (1 - stage) ** 3)
    assert schedule(0) == schedule(19) == pytest.approx(0.1)
    assert schedule(110) == schedule(10**6) == 0.9


def test_geometric_keeps_the_same_share_in_each_stage() -> None:
    schedule = Geometric(0.9, end=30, every=3)
    kept = [1 - schedule(step) for step in range(0, 31, 3)]
    assert kept[0] == 1.0
    shares = [second / first for first, second in itertools.pairwise(kept)]
    assert shares == pytest.approx([0.1**0.1] * 10)
    assert schedule(30) == 0.9
    assert schedule(5) == schedule(3)


def test_levels_and_constant() -> None:
    schedule = Levels([(5, 0.5), (9, 0.8)])
    assert [schedule(step) for step in (0, 4, 5, 8, 9, 99)] == [0.0, 0.0, 0.5, 0.5, 0.8, 0.8]
    assert Constant(0.3)(7) == 0.3


@pytest.mark.parametrize(
    "schedule", [Cubic(0.95, end=40), Geometric(0.95, end=40, every=7), Levels([(3, 0.95)])]
)
def test_a_sparsity_never_falls_and_ends_exactly(schedule: Schedule) -> None:
    values = [schedule(step) for step in range(60)]
    assert values == sorted(values)
    assert values[0] == 0.0
    assert values[40:] == [0.95] * 20


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constant(1.0),
        lambda: Cubic(0.5, initial=0.6),
        lambda: Cubic(0.5, begin=3, end=3),
        lambda: Geometric(-0.1),
        lambda: Geometric(0.5, end=5, every=0),
        lambda: Levels([(5, 0.5), (5, 0.6)]),
        lambda: Levels([(5, 0.5), (6, 0.4)]),
    ],
)
def test_what_is_no_schedule_is_refused_in_one_line(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError) as refused:
        make()
    assert "\n" not in str(refused.value)
