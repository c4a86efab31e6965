"""Thanos: all weights of a block of columns are removed at once, with the best change to its right.

Ilin & Richtarik 2025, *Thanos: A block-wise pruning algorithm for efficient large language model
compression* (arXiv 2504.05346), algorithms 1 and 2. Blocks of 512 columns are better than the
paper's 128 (measured on SmolLM2-135M: ``docs/results.md``).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunegraph.core.checks import check_fields
from prunegraph.core.errors import ConfigError
from prunegraph.core.pattern import UNSTRUCTURED, Pattern
from prunegraph.core.tensors import all_but_least
from prunegraph.layerwise.solve import Hessian, solve_selected
from prunegraph.methods.obs.base import BlockwiseMethod
from prunegraph.methods.obs.choose import best_of_groups, without_columns


@dataclass(frozen=True)
class Thanos(BlockwiseMethod):
    """Removes the weights of least ``|W_ij| * norm of input j``, a block of columns at once.

    Attributes:
        block_size: columns of a block.
        outlier_rows: share of the rows, those of largest outputs, that stay dense, in [0, 1). Of
            whole columns the others then lose more; of n:m the realised sparsity is lower.
    """

    name: ClassVar[str] = "thanos"

    block_size: int = 512
    outlier_rows: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, block_size=1)
        if not 0.0 <= self.outlier_rows < 1.0:
            msg = f"outlier_rows={self.outlier_rows} must lie in [0, 1): it is a share of the rows"
            raise ConfigError(msg)

    def mask_pattern(self, pattern: Pattern) -> Pattern:
        """Return the budget's pattern; rows that stay dense follow none."""
        return UNSTRUCTURED if self.outlier_rows else pattern

    def prune_matrix(
        self, weight: Tensor, hessian: Hessian, zeros: int, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """See ``BlockwiseMethod.prune_matrix``."""
        num_dense = math.floor(self.outlier_rows * len(weight))
        if pattern.kind == "unstructured" or not num_dense:
            return self._prune_rows(weight, hessian, zeros, pattern)
        sizes = (weight.square() * hessian.matrix.diagonal()).sum(1)
        others = sizes.argsort(stable=True)[: len(weight) - num_dense]
        changed, keep = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
        changed[others], keep[others] = self._prune_rows(weight[others], hessian, zeros, pattern)
        return changed, keep

    def _prune_rows(
        self, weight: Tensor, hessian: Hessian, zeros: int, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        if pattern.kind == "columns":
            scores = (weight.square() * hessian.norms.square()).sum(0)
            return without_columns(weight, scores, zeros, hessian)
        weight, (rows, columns) = weight.clone(), weight.shape
        keep, upper = torch.ones_like(weight, dtype=torch.bool), hessian.upper
        left = zeros
        for start, end in self._blocks(columns, pattern):
            if pattern.kind == "n:m":
                scores = weight[:, start:end].abs() * hessian.norms[start:end]
                bits = best_of_groups(scores, pattern)
            else:  # the least of all that remain, of which those of this block go now
                scores = weight[:, start:].abs() * hessian.norms[start:]
                bits = all_but_least(scores, left)[:, : end - start]
                left -= rows * (end - start) - int(bits.sum())
            keep[:, start:end] = bits
            own = upper[start:end, start:end]
            inverse = own.T @ upper[start:end, start:]  # [block, rest] of the trailing inverse
            factors = solve_selected(own.T @ own, ~bits, weight[:, start:end] * ~bits)
            weight[:, start:] -= factors @ inverse
            weight[:, start:end] *= bits
        return weight, keep

    def _blocks(self, columns: int, pattern: Pattern) -> list[tuple[int, int]]:
        """Return first and last column of each block: of n:m whole groups."""
        width = self.block_size
        if pattern.kind == "n:m":
            width = max(width // pattern.group, 1) * pattern.group
        return [(start, min(start + width, columns)) for start in range(0, columns, width)]
