"""Fixtures that every test may use."""

import gc
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from prunegraph.graph.costs import latency as latency_table
from prunegraph.graph.costs import latency_budget as latency
from prunegraph.graph.costs.clock import Latency
from prunegraph.runs.report import speed
from support import drawing

SHARED = Path(__file__).resolve().parents[2] / "shared"

pytest_plugins = ["support.networks"]

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
"""Read by processes that follow, those of xdist too: threads that wait on busy cores sleep. A test
of two threads took 5 CPU s in place of 40."""


SLOW_TIMEOUT = 3600
"""Seconds of a slow test, unless it has a marker of its own; those without ``slow`` have 300."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the pages, whose tests are long: last, one of them kept a process waiting.

    Slow tests get a longer timeout, unless the command line says which.
    """
    items.sort(key=lambda item: item.path.name != "test_docs.py")
    for item in items if config.getoption("timeout") is None else ():
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


def pytest_collection_finish() -> None:
    """Spare the collector the imported modules: they were a twentieth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.fixture(autouse=True)
def single_thread() -> None:
    """Pin torch to one thread: two pools on two cores are ten times slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Return ``../shared``, or skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (CIFAR-10 and trained weights), which is absent")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def runs_without_figures() -> Iterator[None]:
    """Leave out the figures of runs, where no test looks at them (``support.drawing``)."""
    with drawing.undrawn():
        yield


@pytest.fixture
def drawn() -> Iterator[None]:
    """Draw the figures of the runs of a test."""
    with drawing.drawn():
        yield


@pytest.fixture
def parameter_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Latency]:
    """Let all forwards take a millisecond, and one more for a thousand parameters."""

    def measure(model: nn.Module, *_: object, **__: object) -> Latency:
        took = 1.0 + sum(p.numel() for p in model.parameters()) / 1000
        return Latency(least=took, median=took, p90=took, num_runs=1, ran=1.0)

    def measure_all(models: Sequence[nn.Module], *_: object, **__: object) -> list[Latency]:
        return [measure(model) for model in models]

    for module in (latency, latency_table):
        monkeypatch.setattr(module, "measure_latency", measure)
    for module in (latency_table, speed):
        monkeypatch.setattr(module, "measure_latencies", measure_all)
    return measure


MEASURE = """<script>document.title = [document.scrollingElement.scrollWidth, innerWidth,
document.querySelectorAll("svg").length].join(" ")</script></body>"""


@pytest.fixture
def browser(tmp_path: Path) -> Callable[..., tuple[int, ...]]:
    """Return a function that returns what a script measures on a page of a width.

    By default: the width that the page scrolls, that of its window, and its number of figures. A
    headless window is never narrower than 500 pixels; a frame in it is.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Debian's chromium, which is not installed")

    def measured(text: str, width: int, script: str = MEASURE) -> tuple[int, ...]:
        (tmp_path / "page.html").write_text(text.replace("</body>", script))
        frame = f'<iframe src="page.html" style="width:{width}px;height:800px;border:0"></iframe>'
        copy = "<script>onload = () => document.title = frames[0].document.title</script>"
        (tmp_path / "frame.html").write_text(f"<!doctype html><title></title>{frame}{copy}")
        words = [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            "--disable-quic",
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", "--allow-file-access-from-files", "--window-size=1400,900"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
            (tmp_path / "frame.html").as_uri(),
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
        title = re.search(r"<title>(.*?)</title>", done.stdout)
        assert title is not None
        return tuple(map(int, title[1].split()))

    return measured
