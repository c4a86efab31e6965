"""Magnitude pruning: the smallest weights of each layer become zero.

After Han et al. 2015 (arXiv 1506.02626), with the same sparsity in every layer; n:m after Mishra et
al. 2021 (arXiv 2104.08378), section 3: the largest n of each m consecutive inputs stay.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError
from prunegraph.core.pattern import UNSTRUCTURED, Pattern
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import unwrap
from prunegraph.layerwise.weights import PrunableWeight, prunable_weights
from prunegraph.methods.method import Kind, Problem, Result, Role


@dataclass(frozen=True)
class Magnitude:
    """Removes the weights of least absolute value in each layer; reads no data."""

    name: str = "magnitude"
    role: Role = "baseline"
    kind: Kind = "weights"
    searches: bool = False
    per_seed: bool = False

    def check(self, problem: Problem) -> None:
        """Raise BudgetError or ModelError if the network's weights cannot meet the budget."""
        check_weights(prunable_weights(unwrap(problem.task.model)), problem.budget)

    def prune(self, problem: Problem) -> Result:
        """Choose the mask; runs no network."""
        return Result(mask=magnitude_mask(unwrap(problem.task.model), problem.budget))


def check_weights(weights: Mapping[str, PrunableWeight], budget: Budget) -> Pattern:
    """Return the pattern of a budget that choosing the best weights of each layer can meet.

    Raises:
        BudgetError: it is a budget of channels, of whole rows or columns, or the inputs of a layer
            are no multiple of the groups of an n:m pattern.
    """
    if budget.kind != "weights":
        msg = f"a method of single weights needs a sparsity, the budget is {budget.as_dict()}"
        raise BudgetError(msg)
    pattern = UNSTRUCTURED if budget.pattern is None else Pattern.parse(budget.pattern)
    if pattern.kind in ("rows", "columns"):
        msg = f"pattern={pattern} removes no single weights: give n:m, as 2:4, or none"
        raise BudgetError(msg)
    for name, weight in weights.items():
        if pattern.kind == "n:m" and weight.num_inputs % pattern.group:
            msg = (
                f"pattern={pattern} does not fit {name}, whose outputs read {weight.num_inputs} "
                f"inputs each, no multiple of {pattern.group}: give a sparsity without a pattern"
            )
            raise BudgetError(msg)
    return pattern


@torch.no_grad()
def magnitude_mask(model: nn.Module, budget: Budget) -> WeightMask:
    """Return the mask of the weights that are largest in absolute value.

    Args:
        model: the network.
        budget: a sparsity, unstructured or n:m.

    Raises:
        BudgetError: the weights cannot meet it.
        ModelError: the network has no prunable weights, or one is computed from others.
    """
    weights = prunable_weights(model)
    pattern = check_weights(weights, budget)
    scores = {name: model.get_parameter(name).detach().abs() for name in weights}
    if pattern.kind == "n:m":
        keep = {
            name: weight.tensor(_largest_of_groups(weight.matrix(scores[name]), pattern))
            for name, weight in weights.items()
        }
        return WeightMask(keep, pattern)
    sizes = {name: weight.size for name, weight in weights.items()}
    zeros = divide_zeros(sizes, budget.sparsity or 0.0)
    keep = {name: _largest(score, score.numel() - zeros[name]) for name, score in scores.items()}
    return WeightMask(keep, pattern)


def divide_zeros(sizes: Mapping[str, int], sparsity: float) -> dict[str, int]:
    """Return how many weights of each layer go: the same share, and exactly so many in all.

    By largest remainders, ties by order. The last weight of a layer goes only if it must.

    Args:
        sizes: weights of each layer.
        sparsity: share of all weights that goes; in all ``round(sparsity * number)``.
    """
    share = Fraction(sparsity)
    exact = {name: share * size for name, size in sizes.items()}
    zeros = {name: int(value) for name, value in exact.items()}
    missing = round(sparsity * sum(sizes.values())) - sum(zeros.values())
    order = sorted(
        sizes, key=lambda name: (zeros[name] + 1 >= sizes[name], zeros[name] - exact[name])
    )
    for name in order[:missing]:
        zeros[name] += 1
    return zeros


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return booleans of the same shape that mark the ``count`` largest; of equal ones the first.

    NaN counts as infinite.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten().to(torch.promote_types(scores.dtype, torch.float32))
    flat = flat.nan_to_num(nan=torch.inf, posinf=torch.inf)
    least = flat.kthvalue(len(flat) - count + 1).values
    keep = flat > least
    keep[(flat == least).nonzero().flatten()[: count - int(keep.sum())]] = True
    return keep.reshape(scores.shape)


def _largest_of_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """Return ``[outputs, inputs]`` booleans: the largest n of each m consecutive inputs."""
    groups = scores.reshape(-1, pattern.group)
    order = groups.argsort(dim=1, descending=True, stable=True)[:, : pattern.num_kept]
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)
    return keep.reshape(scores.shape)
