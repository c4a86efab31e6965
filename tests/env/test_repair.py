"""Bits to masks: the budget is met, and chance alone decides which bits flip."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from prunegraph.core.budget import Budget
from prunegraph.core.masks import BoolArray, ChannelMask
from support.toy_env import toy_graph

# equal widths and positions: a class costs the same wherever it is
GRAPH = toy_graph((8, 8, 8), (2, 2, 2, 2))
BUDGET = Budget(keep_macs=0.5)


def repair(keep: BoolArray, rng: np.random.Generator) -> tuple[ChannelMask, float]:
    return GRAPH.repair(keep, BUDGET, rng)


def random_bits(seed: int, share: float) -> BoolArray:
    return (np.random.default_rng(seed).random(GRAPH.num_units) < share) | GRAPH.frozen


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_the_budget_is_met(share: float) -> None:
    limit = 0.5 * GRAPH.dense_cost.macs
    for seed in range(50):
        keep = random_bits(seed, share)
        mask, flipped = repair(keep, np.random.default_rng(seed))
        assert GRAPH.cost(mask).macs <= limit
        assert flipped == ((mask.keep != keep) & GRAPH.free).sum() / GRAPH.free.sum()


def flip_counts(keep: BoolArray) -> Any:
    counts = np.zeros(GRAPH.num_units)
    for seed in range(600):
        counts += repair(keep, np.random.default_rng(seed))[0].keep != keep
    return counts


@pytest.mark.parametrize("keep", [GRAPH.free | GRAPH.frozen, GRAPH.frozen], ids=["all", "none"])
def test_repair_flips_each_class_of_a_group_equally_often(keep: BoolArray) -> None:
    counts = flip_counts(keep)
    assert not counts[GRAPH.frozen].any()
    for group in np.unique(GRAPH.group_of[GRAPH.free]):
        members = counts[GRAPH.group_of == group]
        assert members.min() > 0
        assert stats.chisquare(members).pvalue > 1e-3


def test_an_order_by_index_would_be_noticed() -> None:
    class Sorted(np.random.Generator):
        def random(self, size: Any = None, *_: Any, **__: Any) -> Any:
            return np.linspace(0.9, 0.0, size) + super().random(size) / 10

    counts = np.zeros(GRAPH.num_units)
    keep = GRAPH.free | GRAPH.frozen
    for seed in range(100):
        counts += repair(keep, Sorted(np.random.PCG64(seed)))[0].keep != keep
    pvalues = [
        stats.chisquare(counts[GRAPH.group_of == group] + 1).pvalue
        for group in np.unique(GRAPH.group_of[GRAPH.free])
    ]
    assert min(pvalues) < 1e-6


def test_the_generator_decides_which_bits_flip() -> None:
    keep = random_bits(3, 0.8)
    first, again, other = (repair(keep, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again
    assert first[0] != other[0]


def test_bits_that_fill_the_budget_are_not_flipped() -> None:
    repaired, _ = repair(random_bits(0, 0.9), np.random.default_rng(0))
    again, flipped = repair(repaired.keep, np.random.default_rng(9))
    assert (again, flipped) == (repaired, 0.0)
