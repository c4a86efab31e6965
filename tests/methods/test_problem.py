from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.splits import Dataset
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.graph import StructureGraph
from prunegraph.methods.method import Method, Problem, Result


class KeepFirst:
    name = "first/uniform"

    def prune(self, problem: Problem) -> Result:
        scores = torch.arange(problem.graph.num_units, 0, -1).float().numpy()
        mask = problem.graph.project(scores, problem.budget)
        problem.evaluator.evaluate(mask)
        return Result(mask=mask, networks=1)


def test_a_method_sees_the_problem_and_returns_a_mask(
    digits: Dataset, digits_net: nn.Module, digits_graph: StructureGraph
) -> None:
    evaluator = Evaluator(
        digits_net, digits_graph, search=digits.search, calibration=digits.train, num_calibration=64
    )
    problem = Problem(
        model=digits_net,
        graph=digits_graph,
        budget=Budget(keep_macs=0.5),
        evaluator=evaluator,
        statistics={},
        example_inputs=torch.zeros(1, *digits.image_shape),
    )
    method: Method = KeepFirst()
    result = method.prune(problem)
    assert digits_graph.cost(result.mask).macs <= 0.5 * digits_graph.dense_cost.macs
    assert evaluator.num_networks == result.networks
    with pytest.raises(FrozenInstanceError):
        problem.seed = 5
