"""Networks of a search on a pool: each is run once, whoever asks."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from prunegraph.core.errors import ModelError
from prunegraph.core.masks import ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.evaluation.log import OutcomeLog
from prunegraph.evaluation.pool import PooledEvaluator, num_threads
from support.toy_env import KnownMaskEvaluator, draw_signs, toy_graphs

GRAPH = toy_graphs()[0]
DENSE = GRAPH.dense_mask()
SMALL = GRAPH.mask(GRAPH.frozen | (np.arange(GRAPH.num_units) % 2 == 0))


class WaitingPool:
    """Evaluates when it is allowed to, and notes what it was asked."""

    threads = 1

    def __init__(self, *, waits: bool = False, error: Exception | None = None) -> None:
        self.calls: list[tuple[int, str]] = []
        self.error = error
        self.go = threading.Event()
        if not waits:
            self.go.set()

    def evaluate(self, network: int, mask: ChannelMask, subset: Tensor | None) -> Outcome:
        self.calls.append((network, mask.digest()))
        assert self.go.wait(timeout=30)
        if self.error is not None:
            raise self.error
        return stand_in().evaluate(mask, subset)


class StandIn(KnownMaskEvaluator):
    search = range(1000)

    def narrow(self, subset: Tensor | None) -> Tensor | None:
        return None if subset is None or len(subset) == len(self.search) else subset


def stand_in() -> StandIn:
    return StandIn(GRAPH, draw_signs(GRAPH, np.random.default_rng(0))[1])


def pooled(pool: WaitingPool, network: int = 0, log: OutcomeLog | None = None) -> PooledEvaluator:
    return PooledEvaluator(cast(Evaluator, stand_in()), pool, network, log)


def test_a_mask_that_is_asked_for_twice_at_once_is_run_once() -> None:
    pool = WaitingPool(waits=True)
    first = pooled(pool)
    second = first.beside()
    subset = first.draw_subset(20, seed=1)
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(each.evaluate, SMALL, subset) for each in (first, second)]
        pool.go.set()
        outcomes = [future.result() for future in asked]
    assert outcomes[0] is outcomes[1]
    assert outcomes[0] == stand_in().evaluate(SMALL, subset)
    assert first.num_networks + second.num_networks == len(pool.calls) == 1


def test_other_masks_images_and_networks_are_run() -> None:
    pool = WaitingPool()
    evaluator = pooled(pool)
    for mask, subset in ((SMALL, None), (DENSE, None), (SMALL, torch.arange(5))):
        evaluator.evaluate(mask, subset)
    pooled(pool, network=1).evaluate(SMALL)
    names = [(0, SMALL.digest()), (0, DENSE.digest()), (0, SMALL.digest()), (1, SMALL.digest())]
    assert pool.calls == names
    assert evaluator.num_networks == 3
    everything = evaluator.draw_subset(len(stand_in().search), seed=0)
    assert evaluator.evaluate(SMALL, everything) == evaluator.evaluate(SMALL)
    assert pool.calls == names


def test_what_an_earlier_start_has_run_is_counted_and_not_run(tmp_path: Path) -> None:
    log = OutcomeLog(tmp_path / "log.json")
    subsets = (None, torch.arange(5))
    first = [pooled(WaitingPool(), log=log).evaluate(SMALL, subset) for subset in subsets]
    log.write()
    pool = WaitingPool()
    again = pooled(pool, log=OutcomeLog(tmp_path / "log.json"))
    assert [again.beside().evaluate(SMALL, subset) for subset in subsets] == first
    assert again.evaluate(SMALL) == first[0]  # beside() has found it
    assert again.num_networks == 0
    other = pooled(pool, log=OutcomeLog(tmp_path / "log.json"))
    other.evaluate(SMALL)
    assert (other.num_networks, other.recalled, pool.calls) == (1, other.seconds, [])


def test_all_masks_at_once_come_back_in_order() -> None:
    evaluator = pooled(WaitingPool())
    outcomes = evaluator.evaluate_all([DENSE, SMALL, DENSE])
    assert [outcome.digest for outcome in outcomes] == [m.digest() for m in (DENSE, SMALL, DENSE)]
    assert evaluator.num_networks == 2
    assert evaluator.evaluate_all([]) == []


def test_an_error_reaches_everyone_who_asked() -> None:
    pool = WaitingPool(error=ModelError("outputs hold NaN"))
    evaluator = pooled(pool)
    for each in (evaluator, evaluator.beside()):
        with pytest.raises(ModelError, match="outputs hold NaN"):
            each.evaluate(SMALL)
    assert len(pool.calls) == 1
    assert evaluator.num_networks == 0


def test_threads_are_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), num_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
