"""Controls: rows that explain what the agent's figures come from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from prunegraph.core.errors import MaskError
from prunegraph.methods.criteria.registry import find_criterion, importance
from prunegraph.methods.method import ChannelMethod, Problem, Result, Role
from prunegraph.methods.prior import NUM_PRIORS

CONTROL_CRITERIA = ("l1", "random")
"""Criteria that choose channels at the agent's own widths."""


@dataclass(frozen=True)
class WidthsControl(ChannelMethod):
    """Keeps given numbers of units a group, chosen by a criterion.

    Answers whether a mask is good for *which* channels it keeps or for *how many*: the cost is that
    of the mask whose widths are given.

    Args:
        criterion: one of ``CRITERIA``.
        widths: kept units of each group that may be pruned (``StructureGraph.group_widths``).
    """

    criterion: str
    widths: Mapping[str, int]

    role: ClassVar[Role] = "control"

    def __post_init__(self) -> None:
        find_criterion(self.criterion)

    @property
    def name(self) -> str:
        """``"control:widths/criterion"``."""
        return f"control:widths/{self.criterion}"

    def prune(self, problem: Problem) -> Result:
        """Choose the mask; runs no network.

        Raises:
            MaskError: the widths name other groups, or a width is out of range.
        """
        graph = problem.graph
        values = importance(self.criterion, problem.statistics, graph.num_units, problem.seed)
        if set(self.widths) != set(graph.group_widths(graph.dense_mask())):
            odd = sorted(set(self.widths) ^ set(graph.group_widths(graph.dense_mask())))
            msg = f"widths do not fit this structure: {odd[0]!r} is missing or unknown"
            raise MaskError(msg)
        keep = graph.frozen.copy()
        for group in graph.groups:
            width = self.widths.get(group.name, 0)
            if width > len(group.units):
                msg = f"{group.name} has {len(group.units)} units, not {width}"
                raise MaskError(msg)
            order = np.argsort(-values[group.units], kind="stable")
            keep[group.units[order[:width]]] = True
        return Result(mask=graph.mask(keep))


@dataclass(frozen=True)
class PriorControl(ChannelMethod):
    """What a policy starts from, alone: the heuristic that moves the outputs least.

    It is judged without labels on train data, so it searches nothing.
    """

    name: ClassVar[str] = "prior"
    role: ClassVar[Role] = "control"

    def prune(self, problem: Problem) -> Result:
        """Choose the mask of the best prior, which costs a network for each that is tried."""
        best = problem.priors()[0]
        return Result(
            mask=problem.project(best.scores), networks=NUM_PRIORS, details={"prior": best.name}
        )
