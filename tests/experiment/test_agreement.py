import numpy as np
import pytest

from prunegraph.experiment.agreement import agreement
from prunegraph.types import Budget
from support.toy_env import toy_graph


def test_the_same_choice_agrees_and_the_opposite_does_not() -> None:
    graph = toy_graph((8, 8), (4, 4, 1))
    scores = np.arange(graph.num_classes, dtype=np.float32)
    keep = graph.dense_mask().keep.copy()
    for group in graph.groups:
        if group.frozen is None:
            keep[group.classes[:4]] = False  # the four lowest scores of each group
    mask = graph.mask(keep)
    assert agreement(graph, mask, scores.astype(np.float64)) == {"overlap": 1.0, "chance": 0.5}
    assert agreement(graph, mask, -scores.astype(np.float64)) == {"overlap": 0.0, "chance": 0.5}


def test_a_random_criterion_agrees_as_chance_says() -> None:
    graph = toy_graph((400, 200), (4, 4, 1))
    generator = np.random.default_rng(0)
    scores = generator.random(graph.num_classes).astype(np.float32)
    mask = graph.project(scores, Budget(keep_macs=0.3))
    found = agreement(graph, mask, generator.random(graph.num_classes))
    assert found["overlap"] == pytest.approx(found["chance"], abs=0.08)


def test_a_network_that_was_not_pruned_agrees_with_nothing() -> None:
    graph = toy_graph((8, 8), (4, 4, 1))
    assert agreement(graph, graph.dense_mask(), np.arange(graph.num_classes) * 1.0) == {}
