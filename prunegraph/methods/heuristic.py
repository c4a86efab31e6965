"""Heuristics: a criterion says which channels, an allocation how many of each group."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from prunegraph.core.errors import ConfigError, MaskError
from prunegraph.core.masks import Float64Array, FloatArray, IntArray
from prunegraph.graph import StructureGraph
from prunegraph.graph.features import group_mean, in_stream, rank_in_group, rank_within, unit_cost
from prunegraph.graph.projection import check_scores
from prunegraph.methods.criteria.registry import CRITERION_NAMES, importance
from prunegraph.methods.criteria.taylor import num_sensitivity_networks, sensitivity
from prunegraph.methods.method import Result, Problem

@dataclass(frozen=True)
class Heuristic:
    """Keeps the units with the highest scores that fit the budget.

    Args:
        criterion: one of ``CRITERION_NAMES``.
        allocation: one of ``ALLOCATIONS``.
    """

    criterion: str
    allocation: str

    def __post_init__(self) -> None:
        _check_criterion(self.criterion)
        _check_allocation(self.allocation)

    @property
    def name(self) -> str:
        """``"criterion/allocation"``."""
        return f"{self.criterion}/{self.allocation}"

    def prune(self, problem: Problem) -> Result:
        """Choose a mask that meets the problem's budget; only ``sensitivity`` runs networks."""
        values = importance(
            self.criterion, problem.statistics, problem.graph.num_units, problem.seed
        )
        of_the_layer = self.criterion in OF_THE_LAYER
        return allocate(problem, values, self.allocation, of_the_layer=of_the_layer)
