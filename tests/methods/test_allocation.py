import numpy as np
from torch import nn

from prunegraph.core.splits import Dataset
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.graph import StructureGraph
from prunegraph.methods.allocation import num_sensitivity_networks, sensitivity
from support.tasks import image_task


def test_sensitivity_counts_its_networks_and_is_one_number_a_group(
    digits_net: nn.Module, digits_graph: StructureGraph, digits: Dataset
) -> None:
    task = image_task(digits_net, digits.train, digits.search)
    evaluator = Evaluator(task, digits_graph, num_calibration=64)
    scores = np.random.default_rng(0).random(digits_graph.num_units).astype(np.float32)
    gains = sensitivity(evaluator, digits_graph, scores)
    assert evaluator.num_networks == num_sensitivity_networks(digits_graph) == 7
    assert not gains[digits_graph.frozen].any()
    per_group = [set(gains[group.units].tolist()) for group in digits_graph.groups]
    assert all(len(values) == 1 for values in per_group)
    assert len(set.union(*per_group)) == 7
