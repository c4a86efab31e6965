"""Magnitude pruning: the smallest weights of each layer become zero.

After Han et al. 2015 (arXiv 1506.02626), with the same sparsity in every layer; n:m after Mishra et
al. 2021 (arXiv 2104.08378), section 3: the largest n of each m consecutive inputs stay.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from prunegraph.core.budget import Budget
from prunegraph.core.pattern import Pattern
from prunegraph.core.tensors import all_but_least
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import unwrap
from prunegraph.layerwise.weights import prunable_weights
from prunegraph.methods.method import Problem, Result
from prunegraph.methods.obs.choose import (
    all_but_least_columns,
    best_of_groups,
    check_weights,
    divide_zeros,
)
from prunegraph.methods.weights import WeightMethod


@dataclass(frozen=True)
class Magnitude(WeightMethod):
    """Removes the weights of least absolute value in each layer; reads no data.

    Of columns it removes those of least norm.
    """

    name: ClassVar[str] = "magnitude"
    per_seed: ClassVar[bool] = False

    def prune(self, problem: Problem) -> Result:
        """Choose the mask; runs no network."""
        return Result(mask=magnitude_mask(unwrap(problem.task.model), problem.budget))


@torch.no_grad()
def magnitude_mask(model: nn.Module, budget: Budget) -> WeightMask:
    """Return the mask of the weights that are largest in absolute value.

    Args:
        model: the network.
        budget: a sparsity, unstructured, n:m or of columns.

    Raises:
        BudgetError: the weights cannot meet it.
        ModelError: the network has no prunable weights, or one is computed from others.
    """
    weights = prunable_weights(model)
    pattern = check_weights(weights, budget)
    sizes = {name: weight.size for name, weight in weights.items()}
    zeros = divide_zeros(sizes, budget.sparsity or 0.0)
    keep = {}
    for name, weight in weights.items():
        matrix = weight.matrix(model.get_parameter(name).detach())
        groups = weight.groups if pattern.kind == "columns" else 1  # each reads its own inputs
        share = math.ceil(zeros[name] / groups)
        parts = [_largest(part, share, pattern) for part in matrix.chunk(groups)]
        keep[name] = weight.tensor(torch.cat(parts))
    return WeightMask(keep, pattern)


def _largest(matrix: Tensor, zeros: int, pattern: Pattern) -> Tensor:
    """Return which entries of a matrix ``[C, B]`` stay."""
    if pattern.kind == "n:m":
        return best_of_groups(matrix.abs(), pattern)
    if pattern.kind == "columns":
        return all_but_least_columns(matrix, matrix.norm(dim=0), zeros)
    return all_but_least(matrix.abs(), zeros)
