"""Wanda: the weights of least size times the norm of their input become zero; no other changes.

Sun et al. 2024, *A simple and effective pruning approach for large language models* (arXiv
2306.11695), equation 1; compared within each row.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunegraph.core.pattern import Pattern
from prunegraph.layerwise.solve import Hessian
from prunegraph.methods.obs.base import BlockwiseMethod
from prunegraph.methods.obs.choose import (
    all_but_least_columns,
    all_but_least_of_rows,
    best_of_groups,
)


@dataclass(frozen=True)
class Wanda(BlockwiseMethod):
    """Removes the weights of least ``|W_ij| * norm of input j`` in each row."""

    name: ClassVar[str] = "wanda"

    def prune_matrix(
        self, weight: Tensor, hessian: Hessian, zeros: int, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """See ``BlockwiseMethod.prune_matrix``."""
        scores = weight.abs() * hessian.norms
        if pattern.kind == "n:m":
            keep = best_of_groups(scores, pattern)
        elif pattern.kind == "columns":
            keep = all_but_least_columns(weight, scores.square().sum(0), zeros)
        else:
            keep = all_but_least_of_rows(scores, zeros)
        return weight * keep, keep
