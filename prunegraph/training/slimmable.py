"""Sub-networks of one network, each trained for a step: slimmable training.

A network trained so loses far less when channels leave it (``docs/method.md``). Universally
slimmable networks (Yu and Huang 2019, arXiv 1903.05134) train random widths; these are random
masks, since the channels that stay need not be the first ones.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from prunegraph.core.budget import Budget
from prunegraph.core.masks import ChannelMask, FloatArray
from prunegraph.graph import StructureGraph
from prunegraph.graph.apply import apply_mask
from prunegraph.graph.surgery import slice_plans, stored

NOISE = 0.5
"""Deviation of what is added to the scores of each group and of each unit."""


class Subnet:
    """A part of a network for one training step.

    Attributes:
        model: the part, a network of its own with the values of the whole one.
        mask: what it keeps.
    """

    def __init__(self, whole: nn.Module, graph: StructureGraph, mask: ChannelMask) -> None:
        self.mask = mask
        self._whole = whole
        self._plans = slice_plans(stored(whole, graph), graph, mask)
        self.model = apply_mask(whole, graph, mask)

    def hand_back(self) -> None:
        """Make the part's gradients those of the whole network, 0 where the part has none.

        They take the place of earlier ones. Buffers of the whole network stay as they are.
        """
        for whole, part in zip(self._whole.parameters(), self.model.parameters(), strict=True):
            gradient = part.grad
            if gradient is not None:
                for axis, keep in self._plans.get(id(whole), {}).items():
                    gradient = _spread(gradient, axis, keep)
            whole.grad = gradient


@dataclass(frozen=True, eq=False, kw_only=True)
class Subnets:
    """Random parts of one network: its best channels after noise, within a random budget.

    Attributes:
        graph: the network's structure.
        least_macs: share of the multiply-adds that the smallest keep, in (0, 1]; budgets are drawn
            uniformly from there to 1.
        scores: ``[N]`` importances of a deviation of about 1; None = chance alone decides.

    Raises:
        BudgetError: ``least_macs`` is out of range or out of reach.
        MaskError: scores of another shape, or not finite.
    """

    graph: StructureGraph
    least_macs: float
    scores: FloatArray | None = None

    def __post_init__(self) -> None:
        scores = np.zeros(self.graph.num_units) if self.scores is None else self.scores
        self.graph.project(np.asarray(scores, np.float32), Budget(keep_macs=self.least_macs))

    def draw(self, seed: int) -> ChannelMask:
        """Return a mask, fixed by ``seed``, which is not negative."""
        rng = np.random.default_rng(seed)
        groups = rng.normal(0.0, NOISE, size=len(self.graph.groups))[self.graph.group_of]
        noise = groups + rng.normal(0.0, NOISE, size=self.graph.num_units)
        scores = noise if self.scores is None else np.asarray(self.scores) + noise
        budget = Budget(keep_macs=float(rng.uniform(self.least_macs, 1.0)))
        return self.graph.project(scores.astype(np.float32), budget)

    def cut(self, model: nn.Module, seed: int) -> Subnet:
        """Return a part of a network, fixed by ``seed``, to be trained for one step.

        Its gradients are the network's after ``hand_back``; the optimizer is the network's.

        Args:
            model: the network of ``graph``, without the wrappers of DDP and ``torch.compile``.
            seed: which part, such as the number of the step.

        Raises:
            SurgeryError: the graph is not of this network.
        """
        return Subnet(model, self.graph, self.draw(seed))

    def digest(self) -> str:
        """Return 16 hex digits that name the masks that can be drawn.

        By whether there are scores alone: measured anew on a GPU they differ in their last bits.
        """
        text = f"{self.least_macs};{NOISE};{self.scores is not None}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _spread(gradient: Tensor, axis: int, keep: Tensor) -> Tensor:
    """Return a gradient with zeros at the positions of an axis that are not kept."""
    shape = list(gradient.shape)
    shape[axis] = len(keep)
    whole = gradient.new_zeros(shape)
    return whole.index_copy_(axis, keep.nonzero().flatten(), gradient)
