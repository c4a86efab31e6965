"""What every baseline is given, and what it gives back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.masks import ChannelMask, FloatArray
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.graph import ExampleInputs, StructureGraph
from prunegraph.graph.costs.latency import LatencyTable
from prunegraph.graph.costs.latency_budget import project_budget


@dataclass(frozen=True, eq=False, kw_only=True)
class PruningProblem:
    """One network to prune to one budget.

    Attributes:
        model: the dense network; no method changes it.
        graph: its structure.
        budget: what may remain.
        evaluator: scores masks on search images and counts the networks run.
        statistics: measured arrays ``[N]`` by name (see ``pruning.statistics``).
        example_inputs: what the network's forward takes.
        seed: fixes every random choice of the method.
        max_networks: pruned networks that the method may run.
        subset_size: search images that a method scores its candidates on; None = its own number.
        latency: layer times measured before, used if the budget holds a latency; default: measured
            when they are needed.
    """

    model: nn.Module
    graph: StructureGraph
    budget: Budget
    evaluator: Evaluator
    statistics: Mapping[str, FloatArray]
    example_inputs: ExampleInputs
    seed: int = 0
    max_networks: int = 0
    subset_size: int | None = None
    latency: LatencyTable | None = None

    def project(self, scores: FloatArray) -> ChannelMask:
        """Return the mask of the best scores ``[N]`` within the budget, a latency included."""
        return project_budget(
            self.model, self.graph, scores, self.budget, self.example_inputs, self.latency
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class PrunerResult:
    """The mask that a method chose.

    Attributes:
        mask: which units stay; meets the problem's budget.
        networks_evaluated: pruned networks run on the way to it.
    """

    mask: ChannelMask
    networks_evaluated: int = 0


class Pruner(Protocol):
    """A pruning method."""

    @property
    def name(self) -> str:
        """Its name in tables, as ``"l1/uniform"``."""
        ...

    def prune(self, problem: PruningProblem) -> PrunerResult:
        """Choose a mask that meets the problem's budget."""
        ...
