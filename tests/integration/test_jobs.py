"""Searches and fine-tunes in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prunegraph.experiment.cli import main


@pytest.mark.slow
def test_two_workers_give_what_one_gives(
    finished: Path, train_words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    words = [*train_words, "--workers", "2", "--out", str(path)]  # of --threads 1: one thread each
    assert main(words) == 0
    one, two = (json.loads((p / "report.json").read_bytes()) for p in (finished, path))
    assert two["methods"] == one["methods"]
    assert two["pruned"] == one["pruned"]
    masks = [(p / "pruned.safetensors").read_bytes() for p in (finished, path)]
    assert masks[0] == masks[1]


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
    words = [*train_words, "--networks", "4000", "--workers", "2", "--out", str(tmp_path / "run")]
    run = subprocess.Popen([sys.executable, "-m", "prunegraph", *words], start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "run").glob("checkpoints/search-*.safetensors"))) < 2:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    run.send_signal(signal.SIGKILL)
    run.wait()
    while time.monotonic() < deadline:
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    os.killpg(run.pid, signal.SIGKILL)
    pytest.fail("a worker outlived its run")


@pytest.mark.slow
def test_a_killed_worker_is_told_in_one_line(train_words: list[str], tmp_path: Path) -> None:
    words = [*train_words, "--networks", "4000", "--workers", "2", "--out", str(tmp_path / "run")]
    run = subprocess.Popen(
        [sys.executable, "-m", "prunegraph", *words], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "run").glob("checkpoints/search-*.safetensors"))) < 2:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
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
