"""Which weights go: exactly so many, the ones of least score, where a pattern allows it."""

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError
from prunegraph.core.pattern import UNSTRUCTURED, Pattern
from prunegraph.layerwise.solve import Hessian, remove_columns
from prunegraph.layerwise.weights import PrunableWeight


def check_weights(weights: Mapping[str, PrunableWeight], budget: Budget) -> Pattern:
    """Return the pattern of a budget that choosing weights in each layer can meet.

    Args:
        weights: of the network.
        budget: a sparsity.

    Raises:
        BudgetError: it is a budget of channels, or the inputs of a layer are no
            multiple of the groups of an n:m pattern.
    """
    if budget.kind != "weights":
        msg = f"a method of single weights needs a sparsity: give one, as 0.5, in place of {budget}"
        raise BudgetError(msg)
    pattern = UNSTRUCTURED if budget.pattern is None else Pattern.parse(budget.pattern)
    for name, weight in weights.items():
        if pattern.kind == "n:m" and weight.num_inputs % pattern.group:
            msg = (
                f"pattern={pattern} does not fit {name}, whose outputs read {weight.num_inputs} "
                f"inputs each, no multiple of {pattern.group}: give a sparsity without a pattern"
            )
            raise BudgetError(msg)
    return pattern


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


def best_of_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """Return ``[C, B]`` booleans: True at the largest n of each m consecutive scores of a row."""
    groups = scores.reshape(-1, pattern.group)
    order = groups.argsort(dim=1, descending=True, stable=True)[:, : pattern.num_kept]
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)
    return keep.reshape(scores.shape)


def all_but_least_of_rows(scores: Tensor, zeros: int) -> Tensor:
    """Return ``[C, B]`` booleans: each row loses as many, exactly ``zeros`` in all.

    Where that does not come out even, one more goes in the rows that lose least by it.
    """
    rows, columns = scores.shape
    each, more = divmod(zeros, rows)
    if each == columns:
        return torch.zeros_like(scores, dtype=torch.bool)
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf)
    limit = scores.kthvalue(each + 1, dim=1, keepdim=True).values
    keep, level = scores > limit, scores == limit
    if int(level.sum()) > rows:  # of equal ones the first go
        missing = columns - each - keep.sum(1, keepdim=True)
        level &= level.cumsum(1) > level.sum(1, keepdim=True) - missing
    keep |= level
    if more:
        chosen = limit.flatten().argsort(stable=True)[:more]
        keep[chosen, level[chosen].int().argmax(1)] = False
    return keep


def all_but_least_columns(weight: Tensor, scores: Tensor, zeros: int) -> Tensor:
    """Return ``[C, B]`` booleans: False in the columns of least score, at least one of which stays.

    Args:
        weight: ``[C, B]``.
        scores: ``[B]`` of its columns.
        zeros: weights that become zero, rounded up to whole columns.
    """
    rows, columns = weight.shape
    count = min(math.ceil(zeros / rows), columns - 1)
    keep = torch.ones_like(weight, dtype=torch.bool)
    keep[:, scores.argsort(stable=True)[:count]] = False
    return keep


def without_columns(
    weight: Tensor, scores: Tensor, zeros: int, hessian: Hessian
) -> tuple[Tensor, Tensor]:
    """Return ``all_but_least_columns``, and before it the weights, all others changed best."""
    keep = all_but_least_columns(weight, scores, zeros)
    return remove_columns(weight, ~keep[0], hessian), keep
