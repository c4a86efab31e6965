"""Heuristics: a criterion says which channels, an allocation how many of each group."""

from dataclasses import dataclass

from prunegraph.graph import StructureGraph
from prunegraph.methods.allocation import allocate, find_allocation
from prunegraph.methods.criteria.registry import find_criterion, importance
from prunegraph.methods.method import ChannelMethod, Problem, Result


@dataclass(frozen=True)
class Heuristic(ChannelMethod):
    """Keeps the units with the highest scores that fit the budget.

    Args:
        criterion: one of ``CRITERIA``.
        allocation: one of ``ALLOCATIONS``.
    """

    criterion: str
    allocation: str

    def __post_init__(self) -> None:
        find_criterion(self.criterion)
        find_allocation(self.allocation)

    @property
    def name(self) -> str:
        """``"criterion/allocation"``."""
        return f"{self.criterion}/{self.allocation}"

    @property
    def per_seed(self) -> bool:
        """Whether the criterion reads images or chance, or the allocation runs networks on them.

        What one draw of images gives, taken for all that the method can give, would be a rival
        without a spread, and differences from it would look surer than they are.
        """
        runs = find_allocation(self.allocation).num_networks is not None
        return find_criterion(self.criterion).per_seed or runs

    def networks_needed(self, graph: StructureGraph) -> int:
        """Return what its allocation runs."""
        count = find_allocation(self.allocation).num_networks
        return 0 if count is None else count(graph)

    def prune(self, problem: Problem) -> Result:
        """Choose a mask that meets the problem's budget."""
        self.check(problem)
        graph, found = problem.graph, find_criterion(self.criterion)
        values = importance(self.criterion, problem.statistics, graph.num_units, problem.seed)
        return allocate(problem, values, self.allocation, of_the_layer=found.of_the_layer)
