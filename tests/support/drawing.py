"""Runs without their figures and most of their clocked forwards, a third of a tiny run's time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from prunegraph.runs.report import speed
from prunegraph.runs.report.plots import draw

FORWARDS = 4
"""That are timed of each network."""


@contextmanager
def _drawing(function: Callable[..., Any]) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("conclude", "report.page"):
            patch.setattr(f"prunegraph.runs.{module}.draw", function)
        yield patch


@contextmanager
def undrawn() -> Iterator[None]:
    """Let runs have no figures while the block runs, and look at the clock a few times alone."""
    with _drawing(lambda findings: {}) as patch:
        patch.setattr(speed, "NUM_RUNS", FORWARDS)
        yield


@contextmanager
def drawn() -> Iterator[None]:
    """Let runs have their figures while the block runs."""
    with _drawing(draw):
        yield
