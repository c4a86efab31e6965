"""The closed form of drawing masks against the literal draw; shares of layers; the gain."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunegraph.methods.randomized.draw import (
    divide_kept,
    inclusion,
    largest,
    most_drawn,
    selection_gain,
)

SIZE, KEEP = 3000, 300


def magnitudes() -> np.ndarray:
    return np.abs(np.random.default_rng(0).standard_normal(SIZE))


def literal(values: np.ndarray, draws: int, exponent: float, seed: int) -> np.ndarray:
    """Return the mask as the paper's code draws it: without replacement, the most hit stay."""
    generator = np.random.default_rng(seed)
    rates = values**exponent / (values**exponent).sum()
    hits = generator.random(SIZE)
    for _ in range(draws):
        hits[generator.choice(SIZE, KEEP, replace=False, p=rates)] += 1
    return largest(hits, KEEP)


def closed(values: np.ndarray, draws: int, exponent: float, seed: int) -> np.ndarray:
    chances = inclusion(values, KEEP, exponent)
    return most_drawn(chances, KEEP, draws, np.random.default_rng(seed))


def overlaps(masks: list[np.ndarray], other: np.ndarray) -> tuple[float, float]:
    """Return the mean overlap with one mask, and of neighbours among the masks."""
    own = float(np.mean([(mask & other).sum() for mask in masks])) / KEEP
    pairs = itertools.pairwise(masks)
    return own, float(np.mean([(one & two).sum() for one, two in pairs])) / KEEP


@pytest.mark.parametrize(("draws", "exponent"), [(1, 5.0), (8, 5.0), (8, 2.0), (3, 0.0)])
def test_the_closed_form_has_the_law_of_the_literal_draw(draws: int, exponent: float) -> None:
    values = magnitudes()
    top = largest(values, KEEP)
    of_literal = overlaps([literal(values, draws, exponent, seed) for seed in range(60)], top)
    of_closed = overlaps([closed(values, draws, exponent, seed) for seed in range(60)], top)
    assert of_closed == pytest.approx(of_literal, abs=0.01)
    other = overlaps([closed(values, draws + 8, exponent + 1, seed) for seed in range(60)], top)
    assert abs(other[0] - of_literal[0]) > 0.02  # the test would see another law


def test_chances_are_the_frequencies_of_the_literal_draw() -> None:
    values = magnitudes()
    drawn = np.mean([literal(values, 1, 3.0, seed) for seed in range(400)], axis=0)
    chances = inclusion(values, KEEP, 3.0)
    assert chances.sum() == pytest.approx(KEEP, rel=1e-6)
    order = np.argsort(values).reshape(30, -1)  # weights of about one size
    assert drawn[order].mean(1) == pytest.approx(chances[order].mean(1), abs=0.01)


def test_infinitely_many_draws_are_magnitude_pruning() -> None:
    values = magnitudes()
    assert (closed(values, 2**62, 5.0, 0) == largest(values, KEEP)).mean() == 1.0
    assert (closed(values, 8, 5.0, 0) & largest(values, KEEP)).sum() < KEEP


def test_one_draw_with_exponent_zero_is_uniform() -> None:
    values = magnitudes()
    kept = np.mean([closed(values, 1, 0.0, seed) for seed in range(400)], axis=0)
    halves = kept[np.argsort(values)].reshape(2, -1).mean(1)
    assert halves == pytest.approx([KEEP / SIZE] * 2, abs=0.004)


@pytest.mark.parametrize("exponent", [5.0, 1000.0])
@pytest.mark.parametrize("keep", [0, 1, 39, 50])
def test_counts_are_exact_and_zeros_come_last(keep: int, exponent: float) -> None:
    values = np.concatenate([np.zeros(10), np.linspace(1e-200, 1.0, 40)])
    chances = inclusion(values, keep, exponent)
    assert chances.sum() == pytest.approx(min(keep, 40))
    kept = most_drawn(chances, keep, 4, np.random.default_rng(0))
    assert kept.sum() == keep
    assert not kept[:10].any() or keep > 39
    assert largest(values, keep).sum() == keep


@settings(deadline=None)  # its first call loads scipy.optimize
@given(
    st.lists(st.tuples(st.floats(0.01, 100.0), st.integers(1, 400)), min_size=1, max_size=12),
    st.floats(0.0, 1.0),
)
def test_shares_are_divided_exactly(layers: list[tuple[float, int]], part: float) -> None:
    alive = {str(number): count for number, (_, count) in enumerate(layers)}
    shares = {str(number): share for number, (share, _) in enumerate(layers)}
    total = len(layers) + round(part * (sum(alive.values()) - len(layers)))
    kept = divide_kept(shares, alive, total)
    assert sum(kept.values()) == total
    assert all(1 <= kept[name] <= alive[name] for name in alive)


def test_equal_shares_give_each_layer_as_much() -> None:
    assert divide_kept({"a": 100.0, "b": 300.0}, {"a": 100, "b": 300}, 101) == {"a": 25, "b": 76}
    assert divide_kept({"a": 100.0, "b": 300.0}, {"a": 100, "b": 20}, 60) == {"a": 40, "b": 20}


def test_the_gain_is_that_over_all_subsets() -> None:
    generator = np.random.default_rng(1)
    early, final = generator.random(5), generator.random(5)
    found = selection_gain(early, final)
    for size in range(1, 6):
        subsets = itertools.combinations(range(5), size)
        best = [final[min(subset, key=lambda number: early[number])] for subset in subsets]
        assert found[size - 1] == pytest.approx(np.mean(best))
