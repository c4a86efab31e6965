"""AMC as a baseline: its agent plays on the search split."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from prunegraph.core.masks import ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.graph.features import rank_in_group
from prunegraph.methods.amc.ddpg import train_widths
from prunegraph.methods.amc.env import WidthEnv
from prunegraph.methods.method import ChannelMethod, Problem, Result
from prunegraph.methods.search_run import FINALISTS, SearchRun

MOST_REPEATS = 4
"""Late episodes repeat masks: so many episodes a network are played at most."""


@dataclass(frozen=True, kw_only=True)
class AmcSearch(ChannelMethod):
    """AMC (He et al. 2018): a DDPG agent sets each group's width, L1 chooses the channels.

    The reward is the accuracy on one random subset of the search images, or the steadier figure
    (``Outcome.steady``), if one is measured, of the network that the evaluator makes: AMC's
    least-squares reconstruction is in it, as for every method. The best masks are scored again on
    all search images, which decides.
    """

    name: ClassVar[str] = "amc"
    searches: ClassVar[bool] = True

    def prune(self, problem: Problem) -> Result:
        """Search, and choose the best finalist; an episode whose mask is known costs no network.

        The agent plays until its networks are used up, or ``MOST_REPEATS`` as many episodes.
        """
        self.check(problem)
        run = SearchRun(problem)
        subset = run.subset(problem.seed)
        num_finalists = run.reserved(FINALISTS, subset)
        found: dict[ChannelMask, Outcome] = {}

        def evaluate(mask: ChannelMask) -> float:
            found[mask] = problem.evaluator.evaluate(mask, subset)
            steady = found[mask].steady
            return found[mask].accuracy if steady is None else steady

        importance, graph = problem.statistics["l1"], problem.graph
        env = WidthEnv(graph, importance, problem.budget, problem.project, evaluate)
        num_episodes = problem.max_networks - num_finalists
        if num_episodes:
            train_widths(
                env,
                num_episodes=num_episodes,
                seed=problem.seed,
                most_episodes=MOST_REPEATS * num_episodes,
                goes_on=lambda: run.remaining > num_finalists,
            )
        ranked = sorted(found, key=lambda mask: found[mask].rank, reverse=True)
        uniform = rank_in_group(graph, importance).astype(np.float32)
        return run.choose(ranked or [problem.project(uniform)])
