"""SparseGPT: columns from left to right, each removal made up for by the columns to its right.

Frantar & Alistarh 2023, *SparseGPT: Massive language models can be accurately pruned in one shot*
(arXiv 2301.00774), algorithm 1, with its blocks of 128 columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunegraph.core.pattern import Pattern
from prunegraph.core.tensors import all_but_least
from prunegraph.layerwise.solve import Hessian
from prunegraph.methods.obs.base import BlockwiseMethod
from prunegraph.methods.obs.choose import all_but_least_columns, best_of_groups

BLOCK = 128
"""Columns among whose weights those of least error go; the changes of others wait for its end."""

ChooseGroup = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From weights ``[C, m]``, U ``[m, m]`` and keep bits ``[C, m]`` of a group to new keep bits."""


@dataclass(frozen=True)
class SparseGPT(BlockwiseMethod):
    """Removes the weights of least OBS error, one column at a time."""

    name: ClassVar[str] = "sparsegpt"

    def prune_matrix(
        self, weight: Tensor, hessian: Hessian, zeros: int, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """See ``BlockwiseMethod.prune_matrix``."""
        if pattern.kind == "columns":
            scores = weight.square().sum(0) / hessian.inverse.diagonal()
            keep = all_but_least_columns(weight, scores, zeros)
            return sweep(weight, hessian.upper, keep=keep)
        if pattern.kind == "n:m":
            return sweep(weight, hessian.upper, group=pattern.group, choose=best_in_group(pattern))
        return sweep(weight, hessian.upper, zeros=zeros)


def best_in_group(pattern: Pattern) -> ChooseGroup:
    """Return what keeps the n weights of each group whose removal would cost most, one by one."""

    def choose(weights: Tensor, upper: Tensor, keep: Tensor) -> Tensor:
        del keep
        return best_of_groups((weights / upper.diagonal()).square(), pattern)

    return choose


def sweep(
    weight: Tensor,
    upper: Tensor,
    *,
    zeros: int | None = None,
    keep: Tensor | None = None,
    group: int = 0,
    choose: ChooseGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Remove weights column by column; return the new ones and which stay, both ``[C, B]``.

    Args:
        weight: ``[C, B]``.
        upper: U ``[B, B]``, with U^T U the inverse Hessian.
        zeros: in all; those of least error of each block go.
        keep: which stay, if that is known.
        group: columns among which ``choose`` chooses; a multiple of it is a block.
        choose: called at the first column of each group; may change what the block chose.
    """
    weight, (_, columns) = weight.clone(), weight.shape
    kept = torch.ones_like(weight, dtype=torch.bool) if keep is None else keep.clone()
    width = BLOCK if not group else max(BLOCK // group, 1) * group
    for start in range(0, columns, width):
        end = min(start + width, columns)
        own, part = upper[start:end, start:end], weight[:, start:end].clone()
        bits, errors = kept[:, start:end], torch.zeros_like(part)
        if zeros is not None:
            count = round(zeros * end / columns) - round(zeros * start / columns)
            bits[:] = all_but_least((part / own.diagonal()).square(), count)
        for column in range(end - start):
            if choose is not None and column % group == 0:
                to = slice(column, column + group)
                bits[:, to] = choose(part[:, to], own[to, to], bits[:, to])
            errors[:, column] = part[:, column] * ~bits[:, column] / own[column, column]
            part[:, column:] -= errors[:, column, None] * own[column, column:]
        weight[:, start:end] = part * bits
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight, kept
