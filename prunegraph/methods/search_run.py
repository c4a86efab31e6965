"""What all searches share: the count of their networks, and the choice among finalists."""

import itertools
from collections.abc import Iterable

from torch import Tensor

from prunegraph.core.masks import ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.evaluation.pool import SearchEvaluator
from prunegraph.methods.method import Problem, Result

MOST_IDLE = 50
"""Steps in a row without a new mask after which a search ends: there are hardly any more."""

FINALISTS = 8
"""Candidates that are scored on all search images."""


class SearchRun:
    """Counts the networks of a search.

    Args:
        problem: what is searched.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._before = problem.evaluator.num_networks

    @property
    def networks(self) -> int:
        """Networks run so far."""
        return self.problem.evaluator.num_networks - self._before

    @property
    def remaining(self) -> int:
        """Networks that may still be run."""
        return self.problem.max_networks - self.networks

    def subset(self, seed: int) -> Tensor | None:
        """Return positions of random search samples; None, all, if a search scores as rows do."""
        evaluator = self.problem.evaluator
        return evaluator.narrow(evaluator.draw_subset(self.problem.subset_size, seed))

    def reserved(self, wanted: int, subset: Tensor | None) -> int:
        """Return how many networks to keep for finalists: none if they were scored for good."""
        return 0 if subset is None else min(wanted, (self.problem.max_networks + 1) // 2)

    def choose(self, finalists: list[ChannelMask]) -> Result:
        """Score the finalists, as far as networks remain, on the whole search split."""
        best, _ = best_of(finalists, self.problem.evaluator, self.remaining)
        return Result(mask=best, networks=self.networks)


def best_of(
    masks: Iterable[ChannelMask], evaluator: SearchEvaluator, remaining: int
) -> tuple[ChannelMask, Outcome]:
    """Return the mask with the best outcome on the whole search split; of equal ones the first.

    Args:
        masks: finalists, the likeliest first.
        evaluator: scores them.
        remaining: networks that may be run; beyond them only masks that were scored count, and the
            first if none was.
    """
    known = {mask: evaluator.is_cached(mask) for mask in masks}
    run = itertools.accumulate(not each for each in known.values())
    counted = [
        mask for mask, count in zip(known, run, strict=True) if known[mask] or count <= remaining
    ]
    chosen = counted or [*known][:1]
    outcomes = dict(zip(chosen, evaluator.evaluate_all(chosen), strict=True))
    best = max(chosen, key=lambda mask: outcomes[mask].rank)
    return best, outcomes[best]
