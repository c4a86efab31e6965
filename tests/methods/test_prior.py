from collections.abc import Callable

import numpy as np
import pytest

from prunegraph.core.budget import Budget
from prunegraph.core.masks import ChannelMask
from prunegraph.graph.features import prior_scores
from prunegraph.methods.method import Problem
from prunegraph.methods.prior import (
    BEST,
    MEAN,
    NUM_PRIORS,
    PRIORS,
    rank_priors,
    scores_of_prior,
    worst_last,
)
from prunegraph.methods.registry import make_method

MakeProblem = Callable[..., Problem]


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("budget", [Budget(keep_macs=0.4), Budget(keep_params=0.4)])
def test_a_start_keeps_what_its_heuristic_keeps(
    name: str, budget: Budget, make_problem: MakeProblem
) -> None:
    problem = make_problem(budget=budget)
    graph = problem.graph
    scores = scores_of_prior(name, graph, problem.statistics, budget)
    mask = make_method(name).prune(problem).mask
    same = (graph.project(scores, budget).keep == mask.keep)[graph.free]
    assert same.mean() > 0.97  # float32 and the floor of the logarithm may swap neighbours
    free = scores[graph.free]
    assert abs(float(free.mean())) < 0.05
    assert 0.8 < float(free.std()) <= 1.01


def test_the_start_is_the_heuristic_whose_mask_is_best(make_problem: MakeProblem) -> None:
    problem = make_problem()
    graph, statistics = problem.graph, problem.statistics
    budget = Budget(keep_macs=0.5)
    wanted = graph.project(scores_of_prior("fpgm/uniform", graph, statistics, budget), budget)
    asked: list[ChannelMask] = []

    def divergence(mask: ChannelMask) -> float:
        asked.append(mask)
        return float((mask.keep != wanted.keep).sum())

    starts = rank_priors(divergence, graph, statistics, budget)
    assert starts[0].name == "fpgm/uniform"
    assert starts[0].divergence == 0.0
    assert [start.divergence for start in starts] == sorted(start.divergence for start in starts)
    assert len(asked) == len(starts) == NUM_PRIORS
    assert all(graph.fits(mask, budget) for mask in asked)


def test_where_only_the_clock_limits_policies_start_from_taylor_per_mac(
    make_problem: MakeProblem,
) -> None:
    problem = make_problem()
    graph, statistics = problem.graph, problem.statistics
    budget = Budget(max_latency=1.0)
    start = rank_priors(lambda mask: float(mask.keep.sum()), graph, statistics, budget)[0]
    np.testing.assert_array_equal(start.scores, prior_scores(graph, statistics, budget))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_scores_of_any_size_are_told_apart_but_not_by_rounding_errors(scale: float) -> None:
    assert worst_last(0.912 * scale) < worst_last(0.913 * scale)
    assert worst_last(0.912 * scale) == worst_last(0.9120001 * scale)
    assert worst_last(float("nan")) > worst_last(1e9 * scale)


def test_the_mean_of_the_best_heuristics_is_tried_too(make_problem: MakeProblem) -> None:
    problem = make_problem()
    graph, statistics = problem.graph, problem.statistics
    budget = Budget(keep_macs=0.5)
    chosen = ("l2/uniform", "fpgm/uniform", "taylor/skip_full", "fpgm/skip_full")
    scores = [scores_of_prior(name, graph, statistics, budget) for name in chosen]
    rank = {graph.project(values, budget): 1.0 for values in scores}
    mean = graph.project(np.mean(scores, axis=0), budget)
    rank[mean] = 0.0
    starts = rank_priors(lambda mask: rank.get(mask, 2.0), graph, statistics, budget)
    assert starts[0].name == MEAN
    assert graph.project(starts[0].scores, budget) == mean
    assert {start.name for start in starts[1 : 1 + BEST]} == set(chosen)
    few = rank_priors(lambda mask: 0.0, graph, statistics, budget, PRIORS[:BEST])
    assert [start.name for start in few] == list(PRIORS[:BEST])
