"""Cross-entropy method over group offsets."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from prunegraph.core.errors import ConfigError
from prunegraph.core.masks import ChannelMask, Float64Array, IntArray
from prunegraph.core.outcome import Outcome
from prunegraph.graph import StructureGraph
from prunegraph.methods.method import ChannelMethod, Problem, Result
from prunegraph.methods.prior import NUM_PRIORS, prior_names, rank_priors
from prunegraph.methods.search_run import MOST_IDLE, SearchRun

LOSS_WEIGHT = 0.25
"""Accuracy that a nat of cross-entropy is worth."""

CEM_FINALISTS = 16
"""Candidates that are scored on all search images."""


@dataclass(frozen=True, kw_only=True)
class CrossEntropySearch(ChannelMethod):
    """Cross-entropy method over one offset a group, added to the best heuristic's scores.

    That heuristic is the best of ``prior_names`` and their ``MEAN`` (of one for each step, if all
    would leave no network for a step) on one subset of the search images; the agent chooses its own
    among the same, by train images.

    Each step draws a population of offsets from a diagonal normal distribution, projects each to
    the budget, scores all on one fresh random subset of the search images, and refits the
    distribution to the elites (Rubinstein 1999; smoothed as in de Boer et al. 2005, "A Tutorial on
    the Cross-Entropy Method", section 3; the deviation is that from the old mean, as in CMA-ES,
    Hansen 2016, arXiv 1604.00772, section 3.1). The first member of each population is the mean
    itself.
    Elites have the highest ``accuracy - LOSS_WEIGHT * loss``: accuracy is what is wanted, and the
    loss tells apart what few images cannot.
    A step whose masks were all run before doubles the deviation: the search goes on until its
    networks are used up.
    Finalists - the start, the last mean, the best of the latest steps, with what networks are left
    the best of all others - are scored on all search images, which decides by accuracy. Where a
    steadier figure is measured (``Outcome.steady``), it takes the place of accuracy and loss.

    Attributes:
        population: networks a step.
        num_elites: candidates that the distribution is refitted to, weighted by rank.
        sigma: deviation at the start, in deviations of the prior over the free units.
        least_sigma: deviations do not fall below.
        smoothing: weight of the elites' mean and deviation against the old ones, in (0, 1].
    """

    population: int = 16
    num_elites: int = 5
    sigma: float = 0.4
    least_sigma: float = 0.05
    smoothing: float = 0.7

    def __post_init__(self) -> None:
        if not 1 <= self.num_elites <= self.population:
            msg = f"num_elites={self.num_elites} must lie in [1, population={self.population}]"
            raise ConfigError(msg)

    name: ClassVar[str] = "cem"
    searches: ClassVar[bool] = True

    def prune(self, problem: Problem) -> Result:
        """Search, and choose the best finalist."""
        self.check(problem)
        run = SearchRun(problem)
        rng = np.random.default_rng(problem.seed)
        subset = run.subset(int(rng.integers(2**31)))
        enough = problem.max_networks > NUM_PRIORS + self.population
        names = prior_names(problem.task, problem.graph)
        tried = names if enough else names[: problem.max_networks // self.population]
        prior = rank_priors(
            lambda mask: (
                self._divergence(problem.evaluator.evaluate(mask, subset)) if tried else 0.0
            ),
            problem.graph,
            problem.statistics,
            problem.budget,
            tried or names[:1],
        )[0].scores.astype(np.float64)
        steps = problem.graph.free_groups
        mean, deviation = np.zeros(len(steps)), np.full(len(steps), self.sigma)
        latest: list[ChannelMask] = []
        found: dict[ChannelMask, float] = {}
        num_finalists = max(run.reserved(CEM_FINALISTS, subset), 1)  # the last mean
        idle = 0
        while run.remaining > num_finalists and idle < MOST_IDLE:
            before, size = run.networks, min(self.population, run.remaining - num_finalists)
            offsets = mean + deviation * rng.normal(size=(size, len(steps)))
            offsets[0] = mean
            subset = run.subset(int(rng.integers(2**31)))
            masks = [shifted(problem, prior, steps, offset) for offset in offsets]
            outcomes = [problem.evaluator.evaluate(mask, subset) for mask in masks]
            order = np.argsort([self._divergence(outcome) for outcome in outcomes], kind="stable")
            latest = [masks[0], masks[order[0]], *latest]
            found.update(zip(masks, map(self._divergence, outcomes), strict=True))
            if run.networks == before:
                idle += 1
                deviation = np.minimum(2.0 * deviation, self.sigma)
                continue
            idle = 0
            if size == self.population:  # a last, smaller one says too little to refit
                mean, deviation = self.refit(mean, deviation, offsets[order[: self.num_elites]])
        start, last = (shifted(problem, prior, steps, offset) for offset in (0.0 * mean, mean))
        return run.choose([last, start, *latest, *sorted(found, key=lambda mask: found[mask])])

    def _divergence(self, outcome: Outcome) -> float:
        if outcome.steady is not None:
            return -outcome.steady
        return LOSS_WEIGHT * outcome.loss - outcome.accuracy

    def refit(
        self, mean: Float64Array, deviation: Float64Array, elites: Float64Array
    ) -> tuple[Float64Array, Float64Array]:
        """Return the new mean and deviation from elites ``[K, G]``, best first."""
        weights = np.log(len(elites) + 0.5) - np.log(np.arange(1, len(elites) + 1))
        weights /= weights.sum()
        elite_mean = weights @ elites
        elite_deviation = np.sqrt(weights @ (elites - mean) ** 2)
        new_mean = mean + self.smoothing * (elite_mean - mean)
        new_deviation = deviation + self.smoothing * (elite_deviation - deviation)
        return new_mean, np.maximum(new_deviation, self.least_sigma)


def shifted(
    problem: Problem, prior: Float64Array, steps: IntArray, offset: Float64Array
) -> ChannelMask:
    """Return the mask of the prior plus one offset for each group of ``steps``."""
    graph: StructureGraph = problem.graph
    of_group = np.zeros(len(graph.groups))
    of_group[steps] = offset
    scores = (prior + of_group[graph.group_of]).astype(np.float32)
    return graph.project(scores, problem.budget)
