"""Independent jobs of a run - searches, fine-tunes - side by side, each in a process of its own.

Small networks gain little from a second thread, so two jobs on one core each end sooner than one
after the other on both.
"""

import multiprocessing
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from os import _exit, dup2
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from prunegraph.core.console import Console
from prunegraph.core.errors import PruneGraphError
from prunegraph.core.masks import ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.evaluation.pool import Pool
from prunegraph.runs.context import RunContext
from prunegraph.runs.dense import ensure_dense
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.compare import RunConfig
from prunegraph.runs.options.config import SearchOptions
from prunegraph.runs.parallel.machine import default_threads, keep_freed_memory
from prunegraph.runs.parallel.ray_pool import RayPool
from prunegraph.runs.plan import applied_policy
from prunegraph.runs.predicted_latency import with_prediction
from prunegraph.runs.target import Target
from prunegraph.runs.tasks.registry import load_target, network_configs
from prunegraph.training.distributed import current_ranks

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False, kw_only=True)
class Workplace:
    """What a job works with.

    Attributes:
        contexts: the networks.
        folders: where each network's files go; the first is the run folder.
        console: where progress goes.
        pool: evaluates the networks of a search; None = the search itself does.
    """

    contexts: Sequence[RunContext]
    folders: Sequence[RunFolder]
    console: Console
    pool: Pool | None = None


def load_targets(config: RunConfig) -> list[Target]:
    """Load every network of a run, checked to be within reach of the budget."""
    return [load_target(network, config.budget()) for network in network_configs(config)]


def make_workplace(
    config: RunConfig, targets: Sequence[Target], folders: Sequence[RunFolder], console: Console
) -> Workplace:
    """Make the dense networks final, and return what jobs work with."""
    for network, target, folder in zip(network_configs(config), targets, folders, strict=True):
        ensure_dense(target, network, folder, console)
    if applied_policy(config) is None:  # which goes by the clock
        targets = [
            with_prediction(target, config.budget(), folder, console)
            for target, folder in zip(targets, folders, strict=True)
        ]
    return Workplace(
        contexts=[
            RunContext(target=target, options=config, seed=config.seed) for target in targets
        ],
        folders=folders,
        console=console,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Jobs of one kind, and what becomes of their results.

    Attributes:
        label: what the jobs are called in the progress.
        job: a module's function of a ``Workplace`` and further arguments.
        arguments: these, a tuple for each job.
        keep: called with a job's arguments and its result when it has ended.
        planned: how many jobs an uninterrupted run has here; default: all of ``arguments``. One
            that is left of several runs in a worker as it would have: with this process's
            threads its last digits would be others.
        networks: how many networks a job runs, with its arguments: how long it takes beside others;
            None = as long as any other.
        searches: the jobs use the workplace's pool, if it has one.
        trains: the jobs train networks, which ranks share one after another.
        quick: they are done before processes have started.
    """

    label: str
    job: Callable[..., Any]
    arguments: Sequence[tuple[Any, ...]]
    keep: Callable[[tuple[Any, ...], Any], object] = lambda *_: None
    planned: int | None = None
    networks: Callable[[tuple[Any, ...]], int] | None = None
    searches: bool = False
    trains: bool = False
    quick: bool = False

    def size(self, values: tuple[Any, ...]) -> int:
        """Return how many steps of the progress a job is."""
        return 1 if self.networks is None else self.networks(values)


class Jobs:
    """Runs jobs: functions of a ``Workplace`` and further arguments.

    One worker, or a single job, runs in this process; a single search lets the workers evaluate
    its networks if their number was asked for. With Ray the searches run one after another in this
    process, each on the whole cluster. Several workers are processes that load networks and
    images themselves; each gets its share of the threads. They end with this process, however it
    ends.

    Args:
        config: the run's options; ``config.workers`` says how many.
        place: what jobs work with in this process.
    """

    def __init__(self, config: RunConfig, place: Workplace) -> None:
        self.place = place
        self._config = config
        on_cpu = place.contexts[0].target.device.type == "cpu"
        self.num_workers = config.workers or (
            (config.threads or default_threads()) if on_cpu else 1
        )
        self._threads = max(1, torch.get_num_threads() // self.num_workers)
        self._executor: ProcessPoolExecutor | None = None
        self._others: list[Any] = []  # processes of whoever calls this
        self._ray = config.ray if isinstance(config, SearchOptions) else None
        self._ray_pool: RayPool | None = None

    def __enter__(self) -> Self:
        """Return this; processes start with the first jobs."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the processes, at once if an error is on its way."""
        if self._executor is not None:
            if error is not None:
                for process in multiprocessing.active_children():
                    if process not in self._others:
                        process.terminate()
            self._executor.shutdown(cancel_futures=True)
        if self._ray_pool is not None:
            self._ray_pool.close()

    def run(self, *batches: Batch) -> None:
        """Run the jobs of all batches, in this order as far as there are workers.

        Raises:
            PruneGraphError: a job raised it, or a process was killed.
        """
        batches = tuple(batch for batch in batches if batch.arguments)
        here = [batch for batch in batches if self._runs_here(batch)]
        for batch in here:
            self._run_here(batch)
        beside = [batch for batch in batches if batch not in here]
        if not beside:
            return
        with _told_if_killed():
            self._run_beside(beside)

    def _run_beside(self, beside: Sequence[Batch]) -> None:
        """Run the jobs in the worker processes."""
        executor = self._start()
        with no_interrupts():
            futures = {
                executor.submit(_work, batch.job, values): (batch, values)
                for batch in beside
                for values in batch.arguments
            }
            # the pool watches a process from the next submission on only: without this one, the
            # death of the last process would show when another job ends
            executor.submit(_work, _no_job, ())
        label = ", ".join(batch.label for batch in beside)
        label += ", networks" * any(batch.networks is not None for batch in beside)
        done, total = 0, sum(batch.size(values) for batch, values in futures.values())
        with self.place.console.progress(label, total) as report:
            for future in as_completed(futures):
                batch, values = futures[future]
                batch.keep(values, future.result())
                done += batch.size(values)
                report(done)

    def _run_here(self, batch: Batch) -> None:
        """Run the jobs in this process; those that neither search nor train show nothing."""
        place = replace(self.place, pool=self._pool()) if batch.searches else self.place
        silent = not (batch.searches or batch.trains)
        shown = place.console.progress(batch.label, len(batch.arguments)) if silent else None
        with shown or nullcontext() as report:
            for number, values in enumerate(batch.arguments, start=1):
                batch.keep(values, batch.job(place, *values))
                if report is not None:
                    report(number)

    def _runs_here(self, batch: Batch) -> bool:
        """Return whether the jobs run in this process, one after another."""
        one = self.num_workers == 1 or (batch.planned or len(batch.arguments)) == 1
        shared = batch.trains and current_ranks() is not None
        return one or batch.quick or shared or (batch.searches and self._ray is not None)

    def _pool(self) -> Pool | None:
        """Return what evaluates the networks of searches in this process, or None."""
        if self._ray is not None:
            if self._ray_pool is None:
                evaluators = [context.measures.evaluator() for context in self.place.contexts]
                self._ray_pool = RayPool(self._ray, evaluators)
            return self._ray_pool
        if self.num_workers > 1 and self._config.workers:
            return _Workers(self._start(), self._threads)
        return None

    def _start(self) -> ProcessPoolExecutor:
        if self._executor is None:
            self._others = multiprocessing.active_children()
            paths = [folder.path for folder in self.place.folders]
            self._executor = ProcessPoolExecutor(
                self.num_workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_open_workplace,
                initargs=(self._config, paths, self._threads),
            )
        return self._executor


@contextmanager
def no_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back while processes start: they inherit that, and import torch in peace.

    The parent ends its workers; one that is interrupted in an import would print a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _told_if_killed() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        msg = (
            "a worker process was killed (out of memory?): give the same command again to go on, "
            "with --workers 1 if memory is short"
        )
        raise PruneGraphError(msg) from error


class _Workers:
    """The worker processes as the pool of a search.

    Args:
        executor: the processes.
        threads: of each.
    """

    def __init__(self, executor: ProcessPoolExecutor, threads: int) -> None:
        self.threads = threads
        self._executor = executor

    def evaluate(self, network: int, mask: ChannelMask, subset: Tensor | None) -> Outcome:
        """Return the outcome of a mask; called from many threads at once."""
        values = (network, mask, subset)
        with _told_if_killed():
            with no_interrupts():
                future = self._executor.submit(_work, _evaluate_job, values)
            return future.result()


def _no_job(_: Workplace) -> None:
    pass


def _evaluate_job(
    place: Workplace, network: int, mask: ChannelMask, subset: Tensor | None
) -> Outcome:
    return place.contexts[network].final_evaluator.evaluate(mask, subset)


_place: list[Workplace] = []
"""The workplace of a worker process."""

_failed: list[Exception] = []
"""Why a worker process has none: its first job raises it."""


def _open_workplace(config: RunConfig, paths: Sequence[Path], threads: int) -> None:
    """Start a worker process."""
    if config.json:  # standard output is for the result, whatever the user's code prints
        dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    warnings.simplefilter("ignore")  # as the command line does
    keep_freed_memory()
    torch.set_num_threads(threads)
    console = Console(json_only=config.json, plain=True)
    try:
        targets = load_targets(config)
        folders = [RunFolder(path=path) for path in paths]
        _place.append(make_workplace(config, targets, folders, console))
    except Exception as error:  # a user's code may raise anything
        _failed.append(error)


def _end_with_parent() -> None:
    """End this process when its parent has ended, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    _exit(1)


def _work(job: Callable[..., Result], values: tuple[Any, ...]) -> Result:
    if _failed:
        raise _failed[0]
    try:
        return job(_place[0], *values)
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":
            raise
        # a panic of safetensors, which has no memory left: no Exception, and not to be pickled
        raise MemoryError(str(error)) from None
