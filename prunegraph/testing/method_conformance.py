"""Tests that every pruning method passes: inherit from ``MethodConformance``."""

import copy
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from prunegraph.core.budget import Budget
from prunegraph.core.errors import PruneGraphError
from prunegraph.methods.method import Kind, Method, Problem, Result, Role


class MethodConformance:
    """Inherit, name the class ``Test...`` and say what to test; pytest collects the methods.

    Example:
        >>> class TestMine(MethodConformance):
        ...     def make_method(self):
        ...         return MyMethod()
        ...
        ...     def make_problem(self, seed, max_networks):
        ...         return make_problem(task, graph, budget, seed=seed, max_networks=max_networks)
    """

    max_networks = 12
    """Networks that the tests allow."""

    def make_method(self) -> Method:
        """Return a new method."""
        raise NotImplementedError

    def make_problem(self, seed: int, max_networks: int) -> Problem:
        """Return a new problem, with an evaluator that has run no network."""
        raise NotImplementedError

    def test_it_says_what_it_is(self) -> None:
        """The name of a row is short and of one line; role and kind are known ones."""
        method = self.make_method()
        assert method.name == method.name.strip() != ""
        assert "\n" not in method.name
        assert method.role in get_args(Role)
        assert method.kind in get_args(Kind)
        assert isinstance(method.searches, bool)
        assert isinstance(method.per_seed, bool)
        assert method.per_seed or not method.searches, "a search draws what it tries"

    def _run(self, seed: int) -> Result:
        return self.make_method().prune(self.make_problem(seed, self.max_networks))

    def check_budget(self, problem: Problem, result: Result) -> None:
        """The cost is within each limit, no removed unit fits any more; networks are counted."""
        graph, mask = problem.graph, result.channels
        cost = graph.cost(mask)
        totals = np.array([cost.macs, cost.params])
        limits = graph.limits(problem.budget)[:2]
        assert (totals <= limits).all(), f"{totals} is over {limits}"
        with_another = totals[:, None] + graph.cost_model.added_by_each(mask.keep)[:, ~mask.keep]
        assert (with_another > limits[:, None]).any(axis=0).all(), "a removed unit still fits"
        _check_count(self.make_method(), problem, result)

    def check_mask(self, problem: Problem, result: Result) -> None:
        """Frozen units stay, every group keeps its minimum, and something goes."""
        assert problem.graph.mask(result.channels.keep) == result.mask
        assert not result.channels.keep.all()

    def test_a_seed_fixes_a_legal_result_and_the_model_is_left_as_it_was(self) -> None:
        """Two runs agree in mask and networks, by the rules; tensors, modes and gradients stay."""
        method, problem = self.make_method(), self.make_problem(3, self.max_networks)
        model = problem.task.model
        before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
        model.train()
        first = method.prune(problem)
        assert all(module.training for module in model.modules()), "it left training mode"
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
        after = model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert all(parameter.grad is None for parameter in model.parameters())
        self.check_budget(problem, first)
        self.check_mask(problem, first)
        second = self._run(seed=3)
        assert first.mask.digest() == second.mask.digest()
        assert first.networks == second.networks
        if not method.per_seed:
            other = self._run(seed=4)
            assert other.mask.digest() == first.mask.digest(), "it depends on the seed"

    def test_what_it_cannot_serve_is_refused_before_any_work(self) -> None:
        """The other kind of budget, and a search without networks."""
        method, problem = self.make_method(), self.make_problem(0, self.max_networks)
        other = Budget(keep_macs=0.5) if method.kind == "weights" else Budget(sparsity=0.5)
        with pytest.raises(PruneGraphError) as refused:
            method.check(replace(problem, budget=other))
        assert "\n" not in str(refused.value)
        if method.searches:
            with pytest.raises(PruneGraphError, match="networks"):
                method.check(replace(problem, max_networks=0))
        if method.kind == "channels":
            assert problem.evaluator.num_networks == 0


def _check_count(method: Method, problem: Problem, result: Result) -> None:
    """Check that the count is the evaluator's, with what was run without labels, and allowed."""
    run = problem.evaluator.num_networks
    assert result.networks >= run
    if problem.evaluator.num_networks == 0 == problem.unlabelled.num_networks:
        assert result.networks == 0
    assert run <= problem.max_networks
    if method.searches:
        assert 0 < result.networks <= problem.max_networks
