"""What methods are given: measured once, judged alike, without labels where none may be seen."""

import copy

import numpy as np
import pytest
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ModelError
from prunegraph.core.splits import Dataset, TrainSplit
from prunegraph.graph import StructureGraph
from prunegraph.methods.context import Context, make_problem
from prunegraph.methods.prior import NUM_PRIORS
from support.tasks import image_task

BUDGET = Budget(keep_macs=0.5)


@pytest.fixture
def context(digits_net: nn.Module, digits_graph: StructureGraph, digits: Dataset) -> Context:
    task = image_task(digits_net, digits.train, digits.search)
    return Context(task=task, structure=digits_graph, num_calibration=64, reconstruct=False)


def test_priors_are_ranked_without_labels_and_search_images(
    context: Context, digits: Dataset, digits_net: nn.Module, digits_graph: StructureGraph
) -> None:
    source = copy.copy(digits.train.source)
    source.labels = source.labels.flip(0)  # type: ignore[attr-defined]
    mislabelled = image_task(digits_net, TrainSplit(source, digits.train.index))
    evaluators = [
        context.unlabelled,
        Context(
            task=mislabelled, structure=digits_graph, num_calibration=64, reconstruct=False
        ).unlabelled,
    ]
    scores = np.random.default_rng(0).random(digits_graph.num_units).astype(np.float32)
    mask = digits_graph.project(scores, BUDGET)
    first, second = (item.evaluate(mask).kl for item in evaluators)
    assert first == second
    assert first is not None
    assert first > 0.0
    assert evaluators[0].search is not None
    assert set(evaluators[0].search.index.tolist()) <= set(digits.train.index.tolist())
    assert context.task.search is digits.search


def test_priors_are_run_once_for_all_problems_of_a_context(context: Context) -> None:
    first, second = (context.problem(BUDGET) for _ in range(2))
    priors = first.priors()
    run = context.unlabelled.num_networks
    assert 0 < run <= NUM_PRIORS == len(priors)
    again = second.priors()
    assert context.unlabelled.num_networks == run
    assert [prior.name for prior in again] == [prior.name for prior in priors]
    features = second.features(("start", "taylor"))
    assert features.shape == (context.graph.num_units, 2)
    np.testing.assert_array_equal(features[:, 0], priors[0].scores)
    np.testing.assert_array_equal(
        second.features(("start",), prior=priors[1].scores)[:, 0], priors[1].scores
    )


def test_each_problem_counts_networks_of_its_own(context: Context) -> None:
    first, second = (context.problem(BUDGET, seed=seed) for seed in (0, 1))
    first.evaluator.evaluate(context.graph.dense_mask())
    assert first.evaluator.num_networks == 1
    assert second.evaluator.num_networks == first.new_evaluator().num_networks == 0
    assert (first.seed, second.seed) == (0, 1)
    assert first.statistics is context.statistics
    assert second.statistics is context.with_statistics(1).statistics


def test_another_seed_measures_other_images_and_judges_masks_alike(context: Context) -> None:
    other = context.with_statistics(1)
    assert other.with_statistics(0) is context
    assert (other.statistics["l1"] == context.statistics["l1"]).all()
    assert (other.statistics["taylor"] != context.statistics["taylor"]).any()
    mask = context.graph.dense_mask()
    assert other.evaluator().evaluate(mask).loss == context.evaluator().evaluate(mask).loss


def test_a_problem_of_single_weights_needs_no_structure(context: Context) -> None:
    problem = make_problem(context.task, None, Budget(sparsity=0.5))
    assert problem.structure is None
    with pytest.raises(ModelError, match="has no structure graph"):
        _ = problem.graph
