"""NetAdapt: step by step, the group whose loss of channels hurts least."""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from prunegraph.core.errors import ConfigError
from prunegraph.core.masks import BoolArray, ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.graph import Group, StructureGraph
from prunegraph.graph.features import rank_in_group
from prunegraph.methods.method import ChannelMethod, Problem, Result
from prunegraph.methods.search_run import SearchRun

MOST_SHARE = 0.5
"""What a step takes, at the most, of all that the median group can give."""


@dataclass(frozen=True, kw_only=True)
class NetAdapt(ChannelMethod):
    """Greedy search over widths (Yang et al. 2018, ECCV, "NetAdapt", algorithm 1).

    In each round every group makes a proposal: it alone loses its channels of least Taylor
    importance until the step's cost is met. All proposals are scored on the same random search
    images, and those with the best outcomes stand. A group that cannot pay for the step makes none.
    What is left after the last round goes in the order of rank within the group, and channels that
    still fit come back so.

    In the paper one proposal a round stands. That takes steps which are small for every group, so
    on deep networks more rounds than ``max_networks`` pays for: there as many stand as it takes for
    steps of half at most (``MOST_SHARE``) of what the median group gives. The paper also fine-tunes
    every proposal for a few iterations and shrinks its steps; here, as for all methods, batch norm
    is recalibrated, and what networks are left decides the next step.
    """

    name: ClassVar[str] = "netadapt"
    searches: ClassVar[bool] = True

    def networks_needed(self, graph: StructureGraph) -> int:
        """Return the networks of one step, and one for the result."""
        return len(_free(graph)) + 1

    def check(self, problem: Problem) -> None:
        """Say before any work what it cannot serve.

        Raises:
            ConfigError: ``max_networks`` does not pay for a single step, or the budget limits a
                latency alone: the steps are measured by MACs, parameters and memory.
        """
        super().check(problem)
        if problem.graph.cost_ratio(problem.graph.dense_mask().keep, problem.budget) == 0:
            msg = f"netadapt goes by no latency, the budget is {problem.budget}: give keep_macs"
            raise ConfigError(msg)

    def prune(self, problem: Problem) -> Result:
        """Search; the last mask is the result."""
        self.check(problem)
        run, graph = SearchRun(problem), problem.graph
        groups = _free(graph)
        subset = run.subset(problem.seed)
        keep = np.ones(graph.num_units, dtype=bool)
        while graph.cost_ratio(keep, problem.budget) > 1.0:
            rounds = (run.remaining - 1) // max(len(groups), 1)
            if rounds < 1:
                break
            changed = self._round(run, groups, keep, rounds, subset)
            if (changed == keep).all():
                break
            keep = changed
        ranks = rank_in_group(graph, problem.statistics["taylor"])
        return run.choose([problem.project((ranks + keep).astype(np.float32))])

    def _round(
        self,
        run: SearchRun,
        groups: list[Group],
        keep: BoolArray,
        rounds: int,
        subset: Tensor | None,
    ) -> BoolArray:
        """Return the keep bits after a round; the same where no group can give anything."""
        problem, graph = run.problem, run.problem.graph
        ratio = graph.cost_ratio(keep, problem.budget)
        gives = [
            ratio - graph.cost_ratio(_emptied(group, keep), problem.budget) for group in groups
        ]
        share = (ratio - 1.0) / rounds
        typical = float(np.median([give for give in gives if give > 0] or [np.inf]))
        accepted = min(math.ceil(share / (MOST_SHARE * typical)), len(groups)) or 1
        target = ratio - share / accepted
        proposals = [_shrunk(problem, group, keep, target) for group in groups]
        enough = [bits for bits in proposals if graph.cost_ratio(bits, problem.budget) <= target]
        masks = [graph.mask(bits) for bits in enough if (bits != keep).any()]
        if not masks:
            return keep
        outcomes: dict[ChannelMask, Outcome] = {
            mask: problem.evaluator.evaluate(mask, subset) for mask in masks
        }
        best = sorted(outcomes, key=lambda mask: outcomes[mask].rank, reverse=True)[:accepted]
        kept: BoolArray = np.logical_and.reduce([mask.keep for mask in best])
        return kept


def _free(graph: StructureGraph) -> list[Group]:
    return [group for group in graph.groups if group.frozen is None]


def _emptied(group: Group, keep: BoolArray) -> BoolArray:
    """Return keep bits with as few of a group's channels as may stay."""
    bits = keep.copy()
    bits[group.units[keep[group.units]][group.min_keep :]] = False
    return bits


def _shrunk(problem: Problem, group: Group, keep: BoolArray, target: float) -> BoolArray:
    """Return keep bits without the group's least channels, as many as it takes or as may go."""
    graph, units = problem.graph, group.units[keep[group.units]]
    order = units[np.argsort(problem.statistics["taylor"][units], kind="stable")]

    def without(number: int) -> BoolArray:
        bits = keep.copy()
        bits[order[:number]] = False
        return bits

    most = len(units) - group.min_keep
    number = bisect_left(
        range(most), True, key=lambda n: graph.cost_ratio(without(n), problem.budget) <= target
    )
    return without(number)
