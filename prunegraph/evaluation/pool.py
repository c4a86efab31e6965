"""The networks of one search evaluated by several workers; what they found is kept in this process.

So one worker and many give the same rewards: a mask that comes twice is run, and counted, once.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, Self

import torch
from torch import Tensor

from prunegraph.core.masks import ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.evaluation.evaluator import Evaluator, subset_digest
from prunegraph.evaluation.log import OutcomeLog


class Pool(Protocol):
    """Workers that evaluate masks.

    Attributes:
        threads: of each worker; the search itself computes with as many, since the last digits
            depend on the number.
    """

    threads: int

    def evaluate(self, network: int, mask: ChannelMask, subset: Tensor | None) -> Outcome:
        """Return the outcome of a mask of network ``network``; called from many threads at once."""
        ...


class MaskEvaluator(Protocol):
    """Scores masks on search images; ``Evaluator`` is one.

    Attributes:
        num_networks: pruned networks run so far.
    """

    num_networks: int

    def evaluate(self, mask: ChannelMask, subset: Tensor | None = None) -> Outcome:
        """Return the outcome of a mask on the search images at positions ``subset``."""
        ...

    def draw_subset(self, size: int, seed: int) -> Tensor:
        """Return positions of random search images, fixed by ``seed``."""
        ...


class SearchEvaluator(MaskEvaluator, Protocol):
    """What a search scores masks with: an ``Evaluator``, or one whose networks run on a pool.

    Attributes:
        seconds: time inside evaluations.
        recalled: of it, in an earlier start of the search.
    """

    seconds: float
    recalled: float

    def evaluate_all(self, masks: Sequence[ChannelMask]) -> list[Outcome]:
        """Return the outcomes of masks on all search images."""
        ...

    def is_cached(self, mask: ChannelMask) -> bool:
        """Return whether a mask was scored on all search images."""
        ...


class PooledEvaluator:
    """Scores masks as an ``Evaluator`` does, on the workers of a pool.

    Args:
        evaluator: the one that it stands for; runs nothing.
        pool: the workers.
        network: position of the network in the run.
        log: what an earlier start of the same search measured; it counts as if it were run now.

    Attributes:
        num_networks: pruned networks that were run for this evaluator.
        seconds: time of their evaluation, that of all workers together.
        recalled: of it, in an earlier start of the search.
    """

    def __init__(
        self, evaluator: Evaluator, pool: Pool, network: int, log: OutcomeLog | None = None
    ) -> None:
        self.num_networks = 0
        self.seconds = 0.0
        self.recalled = 0.0
        self._evaluator = evaluator
        self._pool = pool
        self._network = network
        self._log = log
        self._lock = threading.Lock()
        self._cache: dict[tuple[str, str], Future[Outcome]] = {}

    def beside(self) -> Self:
        """Return an evaluator that shares what was found, and counts what it runs itself."""
        other = type(self)(self._evaluator, self._pool, self._network, self._log)
        other._cache, other._lock = self._cache, self._lock
        return other

    def evaluate(self, mask: ChannelMask, subset: Tensor | None = None) -> Outcome:
        """Return the outcome of a mask on the search images at positions ``subset``."""
        subset = self._evaluator.narrow(subset)
        key = (mask.digest(), subset_digest(subset))
        own: Future[Outcome] = Future()
        found = self._cache.setdefault(key, own)  # atomic: of two threads one runs the network
        if found is own:
            self._run(mask, subset, own)
        return found.result()

    def _run(self, mask: ChannelMask, subset: Tensor | None, result: Future[Outcome]) -> None:
        key = subset_digest(subset)
        known = None if self._log is None else self._log.get(mask.digest(), key)
        try:
            outcome = known or self._pool.evaluate(self._network, mask, subset)
        except BaseException as error:  # whoever waits for the same mask ends with it
            result.set_exception(error)
            return
        with self._lock:
            self.num_networks += 1
            self.seconds += outcome.seconds
            if known is not None:
                self.recalled += known.seconds
            elif self._log is not None:
                self._log.add(outcome, key)
        result.set_result(outcome)

    def evaluate_all(self, masks: Sequence[ChannelMask]) -> list[Outcome]:
        """Return the outcomes of masks on all search images, run at once."""
        threads = ThreadPoolExecutor(max(len(masks), 1))
        try:
            return list(threads.map(self.evaluate, masks))
        finally:  # after Ctrl-C not when all are done
            threads.shutdown(wait=False, cancel_futures=True)

    def is_cached(self, mask: ChannelMask) -> bool:
        """Return whether a mask was scored on all search images."""
        return (mask.digest(), subset_digest(None)) in self._cache

    def draw_subset(self, size: int, seed: int) -> Tensor:
        """Return positions of random search images, fixed by ``seed``."""
        return self._evaluator.draw_subset(size, seed)


@contextmanager
def num_threads(number: int) -> Iterator[None]:
    """Compute with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
