"""Random search: the best of many random allocations."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from prunegraph.core.masks import ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.graph.features import in_stream, rank_in_group
from prunegraph.methods.method import ChannelMethod, Problem, Result
from prunegraph.methods.prior import prior_names, without
from prunegraph.methods.search_run import FINALISTS, MOST_IDLE, SearchRun


@dataclass(frozen=True, kw_only=True)
class RandomSearch(ChannelMethod):
    """Best of many random allocations, with channels chosen by Taylor importance.

    In networks that read tokens the order is that of ``obs``, and residual streams stay whole as
    far as the budget lets. Where sub-layers may leave wholly, some do, for a random share of what
    has to go. Each group's keep share is proportional to a number drawn from ``[least_share, 1]``.
    Candidates are scored by loss on one random subset of the search samples (one that comes twice
    is drawn anew); the best are scored again on all of them, which decides by accuracy. Where a
    steadier figure is measured (``Outcome.steady``), it takes the place of both.

    Attributes:
        least_share: least of the numbers that shares are proportional to, in (0, 1].
    """

    least_share: float = 0.2

    name: ClassVar[str] = "random_search"
    searches: ClassVar[bool] = True

    def prune(self, problem: Problem) -> Result:
        """Search, and choose the best finalist."""
        self.check(problem)
        run = SearchRun(problem)
        rng = np.random.default_rng(problem.seed)
        subset = run.subset(problem.seed)
        num_finalists = run.reserved(FINALISTS, subset)
        found: dict[ChannelMask, Outcome] = {}
        idle = 0
        while run.remaining > num_finalists and idle < MOST_IDLE:
            mask = self._draw(problem, rng)
            idle = idle + 1 if mask in found else 0
            found[mask] = problem.evaluator.evaluate(mask, subset)
        ranked = sorted(found, key=lambda mask: _distance(found[mask]))
        return run.choose(ranked or [self._draw(problem, rng)])

    def _draw(self, problem: Problem, rng: np.random.Generator) -> ChannelMask:
        graph = problem.graph
        share = rng.uniform(self.least_share, 1.0, size=len(graph.groups))
        criterion, allocation = prior_names(problem.task, graph)[0].split("/")
        from_top = 1.0 - rank_in_group(graph, problem.statistics[criterion])
        scores = -from_top / share[graph.group_of]
        if allocation == "skip_full":
            scores += in_stream(graph) / self.least_share
        if not graph.min_keep.all():
            worth = problem.statistics["taylor"] * rng.lognormal(size=len(share))[graph.group_of]
            gone = without(graph, worth, problem.budget, rng.random())
            scores -= 2.0 * gone / self.least_share
        return graph.project(scores.astype(np.float32), problem.budget)


def _distance(outcome: Outcome) -> float:
    return outcome.loss if outcome.steady is None else -outcome.steady
