"""Sub-networks of one network, each trained for a step: slimmable training.

A network trained so loses far less when channels leave it, and tells apart better which channels it
can do without once it is fine-tuned (``docs/method.md``). Universally slimmable networks (Yu and
Huang 2019, arXiv 1903.05134) train random widths; these are random masks, since the channels that
stay need not be the first ones.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from prunegraph.graph import StructureGraph
from prunegraph.graph.surgery import slice_plans
from prunegraph.pruning.surgery import apply_mask
from prunegraph.types import Budget, FloatArray, KeepMask

NOISE = 0.5
"""Deviation of what is added to the scores of each group and of each class."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Subnets:
    """Random masks of one network: the best scores after noise, within a random budget.

    Attributes:
        graph: the network's structure.
        scores: ``[N]`` of a deviation of about 1, such as ``prior_scores``.
        least_macs: share of the multiply-adds that the smallest keep, in (0, 1); budgets are drawn
            uniformly from there to 1.
    """

    graph: StructureGraph
    scores: FloatArray
    least_macs: float

    def draw(self, seed: int) -> KeepMask:
        """Return a mask, fixed by ``seed``.

        Raises:
            BudgetError: ``least_macs`` is out of range or out of reach.
        """
        rng = np.random.default_rng(seed)
        groups = rng.normal(0.0, NOISE, size=len(self.graph.groups))[self.graph.group_of]
        classes = rng.normal(0.0, NOISE, size=self.graph.num_classes)
        budget = Budget(keep_macs=float(rng.uniform(self.least_macs, 1.0)))
        return self.graph.project((self.scores + groups + classes).astype(np.float32), budget)

    def digest(self) -> str:
        """Return 16 hex digits that name the masks that can be drawn."""
        content = f"{self.least_macs};{NOISE};".encode() + self.scores.tobytes()
        return hashlib.sha256(content).hexdigest()[:16]


class Subnet:
    """A part of a network for one training step.

    Args:
        model: the whole network.
        subnets: the masks.
        seed: which one.

    Attributes:
        model: the part, a network of its own.
    """

    def __init__(self, model: nn.Module, subnets: Subnets, seed: int) -> None:
        mask = subnets.draw(seed)
        self._whole = model
        self._plans = slice_plans(model, subnets.graph, mask)
        self.model = apply_mask(model, subnets.graph, mask)

    def hand_back(self) -> None:
        """Give the part's gradients to the whole network's parameters, 0 where it has none."""
        for whole, part in zip(self._whole.parameters(), self.model.parameters(), strict=True):
            gradient, plan = part.grad, self._plans.get(id(whole))
            if gradient is not None and plan is not None:
                for axis, keep in plan.keep.items():
                    gradient = _spread(gradient, axis, keep)
            whole.grad = gradient


def _spread(gradient: Tensor, axis: int, keep: Tensor) -> Tensor:
    """Return a gradient with zeros at the positions of an axis that are not kept."""
    shape = list(gradient.shape)
    shape[axis] = len(keep)
    whole = gradient.new_zeros(shape)
    return whole.index_copy_(axis, keep.nonzero().flatten(), gradient)
