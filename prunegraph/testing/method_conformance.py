"""Tests that every pruning method passes: inherit from ``MethodConformance``."""

import copy

import numpy as np
import torch

from prunegraph.core.masks import ChannelMask
from prunegraph.methods.method import Method, Result, Problem


class MethodConformance:
    """Inherit, name the unit ``Test...`` and say what to test; pytest collects the methods.

    Example:
        >>> class TestMine(MethodConformance):
        ...     def make_method(self):
        ...         return MyPruner()
        ...
        ...     def make_problem(self, seed, max_networks):
        ...         return Problem(..., seed=seed, max_networks=max_networks)
    """

    max_networks = 12
    """Networks that the tests allow."""

    def make_method(self) -> Method:
        """Return a new pruner."""
        raise NotImplementedError

    def make_problem(self, seed: int, max_networks: int) -> Problem:
        """Return a new problem, with an evaluator that has run no network."""
        raise NotImplementedError

    def _run(self, seed: int = 0) -> tuple[Problem, Result]:
        problem = self.make_problem(seed, self.max_networks)
        return problem, self.make_method().prune(problem)

    def test_the_budget_is_met_and_used_up(self) -> None:
        """The cost is within each limit, and no removed unit fits any more."""
        problem, result = self._run()
        graph, mask = problem.graph, result.mask
        cost = graph.cost(mask)
        totals = np.array([cost.macs, cost.params])
        limits = graph.limits(problem.budget)[:2]
        assert (totals <= limits).all(), f"{totals} is over {limits}"
        with_another = totals[:, None] + graph.cost_model.added_by_each(mask.keep)[:, ~mask.keep]
        assert (with_another > limits[:, None]).any(axis=0).all(), "a removed unit still fits"

    def test_the_mask_is_legal(self) -> None:
        """Frozen units stay, every group keeps its minimum, and something goes."""
        problem, result = self._run()
        assert isinstance(result.mask, ChannelMask)
        assert problem.graph.mask(result.mask.keep) == result.mask
        assert not result.mask.keep.all()

    def test_a_seed_fixes_the_result(self) -> None:
        """Two runs of one seed agree in mask and networks."""
        (_, first), (_, second) = self._run(seed=3), self._run(seed=3)
        assert first.mask == second.mask
        assert first.networks == second.networks

    def test_the_model_is_left_as_it_was(self) -> None:
        """Tensors are bit-equal, and modes and gradients as they were."""
        problem = self.make_problem(0, self.max_networks)
        problem.task.model.train()
        before = copy.deepcopy(problem.task.model.state_dict())
        statistics = {name: values.copy() for name, values in problem.statistics.items()}
        self.make_method().prune(problem)
        after = problem.task.model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert all(module.training for module in problem.task.model.modules())
        assert all(parameter.grad is None for parameter in problem.task.model.parameters())
        assert all(
            np.array_equal(problem.statistics[name], values) for name, values in statistics.items()
        )

    def test_every_network_is_counted(self) -> None:
        """The count is the evaluator's, and within what is allowed."""
        problem, result = self._run()
        assert result.networks == problem.evaluator.num_networks
        assert result.networks <= self.max_networks
        assert result.networks == 0 or problem.max_networks > 0

    def test_it_has_a_name(self) -> None:
        """The name of a row is short and of one line."""
        name = self.make_method().name
        assert name
        assert name == name.strip()
        assert "\n" not in name
