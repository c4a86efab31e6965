"""Searches and fine-tunes in processes of their own."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prunegraph.cli.main import main
from prunegraph.core.console import Console
from prunegraph.core.errors import PruneGraphError
from prunegraph.core.reading import read_json
from prunegraph.runs.options.config import TrainConfig
from prunegraph.runs.parallel import jobs
from prunegraph.runs.parallel.jobs import Batch, Jobs, no_interrupts


@pytest.mark.slow
def test_two_workers_give_what_one_gives(
    finished: Path,
    train_words: list[str],
    assert_same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    path = tmp_path / "run"
    words = [*train_words, "--workers", "2", "--out", str(path)]  # of --threads 1: one thread each
    assert main(words) == 0
    assert_same_run(finished, path)


@pytest.mark.slow
def test_a_run_with_workers_that_is_killed_resumes_to_the_same_result(
    finished: Path,
    train_words: list[str],
    assert_same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    words = [*train_words, "--workers", "2", "--out", str(tmp_path / "run")]
    run = subprocess.Popen([sys.executable, "-m", "prunegraph", *words], start_new_session=True)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "run").glob("checkpoints/finished-*.json")):  # one of two searches
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert main(words) == 0
    assert_same_run(finished, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.tmp"))


class FakeExecutor:
    """Counts what it is given, and gives back the arguments."""

    def __init__(self) -> None:
        self.submitted: list[tuple[Any, ...]] = []

    def submit(self, _work: object, _job: object, values: tuple[Any, ...]) -> Future[Any]:
        self.submitted.append(values)
        future: Future[Any] = Future()
        future.set_result(values)
        return future

    def shutdown(self, **_: object) -> None:
        pass


@pytest.mark.parametrize(("planned", "in_worker"), [(None, False), (1, False), (3, True)])
def test_the_last_of_several_jobs_runs_where_the_others_ran(
    planned: int | None, in_worker: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, here = FakeExecutor(), []
    target = SimpleNamespace(device=torch.device("cpu"))
    place: Any = SimpleNamespace(contexts=[SimpleNamespace(target=target)], console=Console())
    monkeypatch.setattr(Jobs, "_start", lambda _: executor)
    found: list[Any] = []
    batch = Batch(
        label="jobs",
        job=lambda _, name: here.append(name),
        arguments=[("last",)],
        keep=lambda values, _: found.append(values),
        planned=planned,
    )
    with Jobs(TrainConfig(threads=2, workers=2), place) as pool:
        pool.run(batch)
    assert found == [("last",)]
    assert executor.submitted == ([("last",), ()] if in_worker else [])
    assert here == ([] if in_worker else ["last"])


def test_jobs_of_several_kinds_wait_in_one_queue(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    executor, kept = FakeExecutor(), []
    target = SimpleNamespace(device=torch.device("cpu"))
    place: Any = SimpleNamespace(contexts=[SimpleNamespace(target=target)], console=Console())
    monkeypatch.setattr(Jobs, "_start", lambda _: executor)
    batches = [
        Batch(
            label=name,
            job=print,
            arguments=[(name, number) for number in range(count)],
            keep=lambda values, result, name=name: kept.append((name, values == result)),
            networks=(lambda values: 100 + values[1]) if name == "searches" else None,
        )
        for name, count in (("searches", 3), ("nothing", 0), ("baselines", 2))
    ]
    with Jobs(TrainConfig(threads=2, workers=2), place) as pool:
        pool.run(*batches)
    names = ["searches", "searches", "searches", "baselines", "baselines"]
    assert [values[0] for values in executor.submitted[:-1]] == names
    assert sorted(kept) == sorted((name, True) for name in names)
    assert "searches, baselines, networks: 305/305" in capsys.readouterr().out


class BrokenExecutor(FakeExecutor):
    """Lost a process while no job ran."""

    def submit(self, _work: object, _job: object, values: tuple[Any, ...]) -> Future[Any]:
        raise BrokenProcessPool


def test_a_worker_that_died_between_two_batches_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    target = SimpleNamespace(device=torch.device("cpu"))
    place: Any = SimpleNamespace(contexts=[SimpleNamespace(target=target)], console=Console())
    monkeypatch.setattr(Jobs, "_start", lambda _: BrokenExecutor())
    batch = Batch(label="jobs", job=print, arguments=[(1,), (2,)], keep=print)
    with (
        Jobs(TrainConfig(threads=2, workers=2), place) as pool,
        pytest.raises(PruneGraphError, match="a worker process was killed"),
    ):
        pool.run(batch)


def test_why_a_worker_could_not_start_is_raised_by_its_first_job(tmp_path: Path) -> None:
    config = TrainConfig(dataset="cifar10", data_dir=tmp_path / "nowhere", threads=1, json=True)
    context = multiprocessing.get_context("spawn")
    arguments = (config, [tmp_path], 1)
    with ProcessPoolExecutor(1, context, jobs._open_workplace, arguments) as executor:
        future = executor.submit(jobs._work, print, ("a line of the user's own code",))
        with pytest.raises(PruneGraphError, match="nowhere"):
            future.result()


def searching(words: list[str], folder: Path, **options: Any) -> "subprocess.Popen[str]":
    """Start a run with two workers, and return it when both have begun to search."""
    words = [*words, "--networks", "4000", "--workers", "2", "--out", str(folder / "run")]
    run = subprocess.Popen([sys.executable, "-m", "prunegraph", *words], **options)
    deadline = time.monotonic() + 300
    while len(list(folder.glob("run/checkpoints/search-*/outcomes-0.json"))) < 2:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return run


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits another process's memory")
def test_a_worker_without_memory_is_told_in_one_line(
    train_words: list[str], tmp_path: Path
) -> None:
    run = searching(train_words, tmp_path, stderr=subprocess.PIPE, text=True)
    resource.prlimit(_worker_of(run.pid), resource.RLIMIT_AS, (2**20, 2**20))
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 2, errors
    assert "out of memory" in errors
    assert errors.count("\n") == 1
    for path in (tmp_path / "run").glob("checkpoints/search-*/outcomes-0.json"):
        assert read_json(path)["outcomes"]


@pytest.mark.slow
def test_two_workers_of_one_search_find_what_one_finds(
    one_worker: Path,
    one_worker_words: list[str],
    assert_same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    path = tmp_path / "run"
    assert main([*one_worker_words, "--workers", "2", "--out", str(path)]) == 0
    assert_same_run(one_worker, path)


@pytest.mark.slow
def test_workers_end_with_a_run_that_is_killed(train_words: list[str], tmp_path: Path) -> None:
    run = searching(train_words, tmp_path, start_new_session=True)
    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 120
    while (alive := _group_lives(run.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    if alive:
        os.killpg(run.pid, signal.SIGKILL)
    assert not alive, "a worker outlived its run"


def _group_lives(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_killed_worker_is_told_in_one_line(train_words: list[str], tmp_path: Path) -> None:
    run = searching(train_words, tmp_path, stderr=subprocess.PIPE, text=True)
    os.kill(_worker_of(run.pid), signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2
    assert errors.startswith("prunegraph: a worker process was killed")
    assert errors.count("\n") == 1


def _worker_of(pid: int) -> int:
    """Return the newest child of a process that is not multiprocessing's resource tracker."""
    children = [
        int(status.parent.name)
        for status in Path("/proc").glob("[0-9]*/status")
        if f"\nPPid:\t{pid}\n" in status.read_text()
    ]
    workers = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return max(workers)


def test_an_interrupt_does_not_reach_a_process_that_starts() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        with no_interrupts():
            held = executor.submit(signal.pthread_sigmask, signal.SIG_BLOCK, [])
        assert signal.SIGINT in held.result()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
