"""APT: sets of weights of a row are removed at once, all others of the row changed best.

Zhao et al. 2024, *Pruning foundation models for high accuracy without retraining* (arXiv
2410.15567): the multiple removal problem. Mask and update are each chosen by single removals (S, as
in SparseGPT) or by multiple ones (M). S with S is SparseGPT. An update by M never has a larger
error than one by S for the same mask.
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunegraph.core.checks import check_choice
from prunegraph.core.errors import ConfigError
from prunegraph.core.pattern import Pattern
from prunegraph.core.tensors import all_but_least
from prunegraph.layerwise.solve import Hessian, remove
from prunegraph.methods.obs.base import BlockwiseMethod
from prunegraph.methods.obs.choose import best_of_groups, without_columns
from prunegraph.methods.obs.sparsegpt import best_in_group, sweep

GROUP = 4
"""Columns among which a mask by M without a pattern chooses jointly, as many as S would."""

STAGES = 4
"""Of a staged mask: the weights that stay are changed between them."""


@dataclass(frozen=True)
class APT(BlockwiseMethod):
    """Removes sets of weights by their exact joint error.

    Attributes:
        mask: ``"s"``: column by column, as SparseGPT. ``"m"``: within it, of each group of columns
            the set of least joint error. ``"staged"``: by OBS errors in four stages, all weights
            that stay changed between them (ours).
        update: ``"m"``: all weights that stay of a row; ``"s"``: those to the right.
    """

    name: ClassVar[str] = "apt"

    mask: Literal["s", "m", "staged"] = "s"
    update: Literal["s", "m"] = "m"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, valid in (("mask", ("s", "m", "staged")), ("update", ("s", "m"))):
            check_choice(name, getattr(self, name), valid)
        if self.mask == "staged" and self.update == "s":
            msg = "a staged mask changes all weights between its stages: give update=m"
            raise ConfigError(msg)

    def prune_matrix(
        self, weight: Tensor, hessian: Hessian, zeros: int, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """See ``BlockwiseMethod.prune_matrix``."""
        if pattern.kind == "columns":
            scores = weight.square().sum(0) / hessian.inverse.diagonal()
            return without_columns(weight, scores, zeros, hessian)
        if self.mask == "staged":
            return staged(weight, hessian, zeros, pattern)
        upper = hessian.upper
        if pattern.kind == "n:m":
            choose = best_in_group(pattern) if self.mask == "s" else best_set
            first = None if self.mask == "s" else first_of_groups(weight, pattern)
            changed, keep = sweep(weight, upper, keep=first, group=pattern.group, choose=choose)
        elif self.mask == "s":
            changed, keep = sweep(weight, upper, zeros=zeros)
        else:
            changed, keep = sweep(weight, upper, zeros=zeros, group=GROUP, choose=best_set)
        return (changed if self.update == "s" else remove(weight, keep, hessian)), keep


def first_of_groups(weight: Tensor, pattern: Pattern) -> Tensor:
    """Return ``[C, B]`` booleans that keep the first n of each m: how many stay, not which."""
    bits = torch.arange(weight.shape[1], device=weight.device) % pattern.group < pattern.num_kept
    return bits.expand(len(weight), -1)


def best_set(weights: Tensor, upper: Tensor, keep: Tensor) -> Tensor:
    """Return which weights of a group stay: as many as before, those of least joint error.

    The error of removing Q is ``w_Q ([U^T U]_QQ)^-1 w_Q^T``: what is to the left is frozen.

    Args:
        weights: ``[C, m]``.
        upper: U ``[m, m]`` of the group.
        keep: ``[C, m]`` of which only the number in each row counts.
    """
    inverse, wanted = (upper.T @ upper).double(), (~keep).sum(1)
    best = keep.clone()
    for size in wanted.unique().tolist():
        if 0 < size < weights.shape[1]:
            rows = wanted == size
            best[rows] = _best_of_size(weights[rows], inverse, size)
    return best


def _best_of_size(weights: Tensor, inverse: Tensor, size: int) -> Tensor:
    """Return keep bits ``[C, m]`` of rows that all lose ``size`` weights."""
    width = weights.shape[1]
    sets = torch.tensor(list(itertools.combinations(range(width), size)), device=weights.device)
    parts = inverse[sets[:, :, None], sets[:, None, :]]  # [sets, size, size]
    solved = torch.linalg.inv(parts).to(weights)
    removed = weights[:, sets]  # [C, sets, size]
    errors = torch.einsum("csi,sij,csj->cs", removed, solved, removed)
    gone = sets[errors.argmin(1)]
    return torch.ones_like(weights, dtype=torch.bool).scatter_(1, gone, False)


def staged(weight: Tensor, hessian: Hessian, zeros: int, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Return weights and mask that are tightened in stages, after a cubic schedule.

    At each stage the weights of least OBS error ``w^2 / [H^-1]_jj`` go (those that are gone have
    none), and all that stay are changed anew from the dense ones.
    """
    diagonal, current = hessian.inverse.diagonal(), weight
    keep = torch.ones_like(weight, dtype=torch.bool)
    for stage in range(1, STAGES + 1):
        share = 1.0 - (1.0 - stage / STAGES) ** 3
        errors = current.square() / diagonal
        if pattern.kind == "n:m":
            gone = round(share * (pattern.group - pattern.num_kept))
            if not gone:
                continue
            keep = best_of_groups(errors, Pattern("n:m", pattern.group - gone, pattern.group))
        else:
            keep = all_but_least(errors, round(share * zeros))
        current = remove(weight, keep, hessian)
    return current, keep
