"""What methods share that see what each matrix reads: the walk, the budget, exact numbers."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from prunegraph.core.errors import ConfigError
from prunegraph.core.pattern import Pattern
from prunegraph.core.precision import autocasting
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import copy_network, unwrap
from prunegraph.graph.module_sizes import slim_all_attentions
from prunegraph.layerwise.blocks import BlockWalk, Matrix
from prunegraph.layerwise.order import group_blocks
from prunegraph.layerwise.solve import Hessian
from prunegraph.layerwise.weights import prunable_weights
from prunegraph.methods.method import Problem, Result
from prunegraph.methods.obs.choose import check_weights, divide_zeros
from prunegraph.methods.weights import WeightMethod

BATCH = 8
"""Samples of a batch of calibration data, at most."""

TOKENS = 1024
"""Of a batch of sequences, about: more are slower on a CPU, and their logits are large."""


@dataclass(frozen=True)
class BlockwiseMethod(WeightMethod):
    """A method that prunes one matrix after the other, by the Hessian of what it reads.

    A method is a name and ``prune_matrix``.

    Attributes:
        damping: share of the mean of a Hessian's diagonal that is added to it.
        blocks: glob of the names of the modules that are walked through one after the other, as
            ``"model.layers.*"``; empty: found by themselves.
    """

    damping: float = 0.01
    blocks: str = ""

    def __post_init__(self) -> None:
        if not 0.0 < self.damping <= 1.0:
            msg = f"damping={self.damping} must lie in (0, 1]: 0.01 is usual"
            raise ConfigError(msg)

    def check(self, problem: Problem) -> None:
        """Say before any work what it cannot serve; ConfigError: there are no such blocks."""
        super().check(problem)
        model = unwrap(problem.task.model)
        layers = [weight.module for weight in prunable_weights(model).values()]
        group_blocks(model, layers, self.blocks or None)

    @abstractmethod
    def prune_matrix(
        self, weight: Tensor, hessian: Hessian, zeros: int, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """Return the new weight ``[C, B]`` and which entries stay, ``[C, B]`` booleans.

        Args:
            weight: ``[C, B]`` float32.
            hessian: of what it reads.
            zeros: weights that become zero; exactly, unless whole columns do.
            pattern: where they may lie.
        """

    def mask_pattern(self, pattern: Pattern) -> Pattern:
        """Return the pattern that the masks have if a budget asks for one."""
        return pattern

    def prune(self, problem: Problem) -> Result:
        """Choose the mask and change the weights that stay, block by block."""
        task = problem.task
        dense = unwrap(task.model)
        weights = prunable_weights(dense)
        pattern = check_weights(weights, problem.budget)
        sizes = {name: weight.size for name, weight in weights.items()}
        zeros = divide_zeros(sizes, problem.budget.sparsity or 0.0)
        model = copy_network(dense).eval()
        shared = {id(parameter): parameter for parameter in model.parameters()}
        walked = slim_all_attentions(copy_network(model, shared)).eval()  # needs no second copy
        errors: dict[str, float] = {}

        def forward(model: torch.nn.Module, batch: Any) -> None:
            with autocasting(next(model.parameters()).device, wanted=task.autocast):
                task.forward(model, batch)

        walk = BlockWalk(
            walked,
            weights,
            list(task.batches(problem.calibration, _batch_size(problem))),
            forward,
            blocks=self.blocks or None,
            folder=problem.folder,
            identity=problem.identity(self, calibration=problem.calibration.fingerprint()),
            notes=errors,
            progress=problem.tell_block,
        )
        keep = walk.run(lambda matrix: self._prune(matrix, zeros[matrix.name], pattern, errors))
        with torch.no_grad():  # of what has slim attention, which holds weights of its own
            for name in weights:
                model.get_parameter(name).copy_(walked.get_parameter(name))
        details: dict[str, Any] = {"errors": errors, "calibration": len(problem.calibration)}
        if walk.unseen:
            details["unseen"] = walk.unseen
        return Result(
            mask=WeightMask(keep, self.mask_pattern(pattern)), model=model, details=details
        )

    def _prune(
        self, matrix: Matrix, zeros: int, pattern: Pattern, errors: dict[str, float]
    ) -> tuple[Tensor, Tensor]:
        """Prune the groups of a matrix; note by how much its outputs change."""
        parts = matrix.weight.chunk(len(matrix.hessians))
        sizes = {str(number): part.numel() for number, part in enumerate(parts)}
        shares = divide_zeros(sizes, zeros / matrix.weight.numel())
        results, change, size = [], 0.0, 0.0
        for part, hessian, count in zip(parts, matrix.hessians, shares.values(), strict=True):
            damped = hessian.with_damping(self.damping)
            changed, keep = self.prune_matrix(part, damped, count, pattern)
            results.append((changed, keep))
            change += damped.error(changed - part)
            size += damped.error(part)
        errors[matrix.name] = change / size if size else 0.0
        changed, keep = (torch.cat(items) for items in zip(*results, strict=True))
        return changed, keep


def _batch_size(problem: Problem) -> int:
    """Return how many samples are run at once; integers are tokens, or labels."""
    sample = tree_leaves(next(iter(problem.task.batches(problem.calibration, 1))))
    tensors = [item for item in sample if isinstance(item, Tensor)]
    tokens = max((item.numel() for item in tensors if not item.is_floating_point()), default=1)
    return max(min(BATCH, TOKENS // max(tokens, 1)), 1)
