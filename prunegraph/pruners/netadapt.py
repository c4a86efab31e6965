"""NetAdapt: step by step, the group whose loss of channels hurts least."""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from prunegraph.errors import ConfigError
from prunegraph.graph import Group
from prunegraph.graph.features import rank_in_group
from prunegraph.pruners.search import SearchRun
from prunegraph.pruning.problem import PrunerResult, PruningProblem
from prunegraph.types import BoolArray, KeepMask, Outcome


@dataclass(frozen=True, kw_only=True)
class NetAdapt:
    """Greedy search over widths (Yang et al. 2018, ECCV, "NetAdapt", algorithm 1).

    As many steps of equal size lead from the dense network to the budget as ``max_networks`` pays
    for. In each step every group makes a proposal: it alone loses its channels of least Taylor
    importance until the step's cost is met. All proposals are scored on the same random search
    images, and the one with the best outcome stands. A group that cannot pay for
    the step makes none; where none can, each gives what it has. What is left after the last step
    goes in the order of rank within the group, and channels that still fit come back so.

    The paper fine-tunes every proposal for a few iterations and shrinks its steps; here, as for all
    methods, batch norm is recalibrated, and steps are equal.

    Args:
        subset_size: search images that proposals are scored on.
    """

    subset_size: int = 1500

    @property
    def name(self) -> str:
        """``"netadapt"``."""
        return "netadapt"

    def prune(self, problem: PruningProblem) -> PrunerResult:
        """Search; the last mask is the result.

        Raises:
            ConfigError: ``max_networks`` does not pay for a single step, or the budget limits
                neither MACs nor parameters, by which the steps are measured.
        """
        if problem.budget.keep_macs is None and problem.budget.keep_params is None:
            msg = f"netadapt goes by MACs or parameters, the budget is {problem.budget.as_dict()}"
            raise ConfigError(msg)
        run, graph = SearchRun(problem), problem.graph
        groups = [group for group in graph.groups if group.frozen is None]
        num_steps = (problem.max_networks - 1) // max(len(groups), 1)  # one is kept for the result
        if num_steps < 1:
            msg = (
                f"netadapt runs {len(groups) + 1} networks or more on this structure, "
                f"max_networks={problem.max_networks} allows fewer: raise it or choose another one"
            )
            raise ConfigError(msg)
        subset = run.subset(self.subset_size, problem.seed)
        keep = np.ones(graph.num_classes, dtype=bool)
        start = graph.cost_ratio(keep, problem.budget)
        for step in range(1, num_steps + 1):
            target = start - (start - 1.0) * step / num_steps
            if graph.cost_ratio(keep, problem.budget) > target:
                keep = self._step(run, groups, keep, target, subset)
        ranks = rank_in_group(graph, problem.statistics["taylor"])
        return run.choose([problem.project((ranks + keep).astype(np.float32))])

    def _step(
        self,
        run: SearchRun,
        groups: list[Group],
        keep: BoolArray,
        target: float,
        subset: Tensor | None,
    ) -> BoolArray:
        """Return the keep bits of the best proposal; the same where no group can give anything."""
        proposals = [_shrunk(run.problem, group, keep, target) for group in groups]
        budget, graph = run.problem.budget, run.problem.graph
        paying = [bits for bits in proposals if graph.cost_ratio(bits, budget) <= target]
        masks = [graph.mask(bits) for bits in paying or proposals if (bits != keep).any()]
        if not masks:
            return keep
        outcomes: dict[KeepMask, Outcome] = {
            mask: run.problem.evaluator.evaluate(mask, subset) for mask in masks
        }
        best = max(outcomes, key=lambda mask: outcomes[mask].rank)
        run.record(list(outcomes.values()), outcomes[best])
        return best.keep.copy()


def _shrunk(problem: PruningProblem, group: Group, keep: BoolArray, target: float) -> BoolArray:
    """Return keep bits without the group's least channels, as many as it takes or as may go."""
    graph, classes = problem.graph, group.classes[keep[group.classes]]
    order = classes[np.argsort(problem.statistics["taylor"][classes], kind="stable")]

    def without(number: int) -> BoolArray:
        bits = keep.copy()
        bits[order[:number]] = False
        return bits

    most = len(classes) - group.min_keep
    number = bisect_left(
        range(most), True, key=lambda n: graph.cost_ratio(without(n), problem.budget) <= target
    )
    return without(number)
