"""Tests that every method of single weights passes: inherit from ``WeightMethodConformance``."""

from prunegraph.core.weight_mask import WeightMask
from prunegraph.layerwise.weights import check_pattern, prunable_weights
from prunegraph.methods.method import Problem, Result
from prunegraph.testing.method_conformance import MethodConformance


class WeightMethodConformance(MethodConformance):
    """Inherit as from ``MethodConformance``; problems hold a budget with a sparsity."""

    def check_budget(self, problem: Problem, result: Result) -> None:
        """As many weights become zero as were asked for, exactly, and where the pattern says."""
        assert isinstance(result.mask, WeightMask)
        weights, sparsity = prunable_weights(problem.task.model), problem.budget.sparsity
        assert sparsity is not None
        zeros = result.mask.size - result.mask.num_kept
        asked = round(sparsity * sum(weight.size for weight in weights.values()))
        assert zeros == asked, f"{zeros:,} weights become zero, {asked:,} were asked for"
        assert str(result.mask.pattern) == (problem.budget.pattern or "unstructured")

    def check_mask(self, problem: Problem, result: Result) -> None:
        """It names prunable weights, follows its pattern, and its network holds the zeros."""
        assert isinstance(result.mask, WeightMask)
        check_pattern(result.mask, problem.task.model)
        if result.model is not None:
            result.mask.check_zeros(result.model)
            assert result.model is not problem.task.model
