"""What people see: progress with time left on a terminal, plain lines elsewhere, one result.

Only this module and ``cli`` write to people. With ``--json`` the result alone goes to standard
output and everything else to standard error.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

WHOLE = 100
"""Percents of a work whose steps are not counted."""

PLAIN_INTERVAL = 10.0
"""Least seconds between two plain progress lines."""

PLAIN_SHARE = 0.02
"""Least time between two plain progress lines, as a share of the time that has passed."""

PLAIN_WIDTH = 160
"""Columns of a table that does not go to a terminal, so that no cell is cut."""


class Report(Protocol):
    """Called by long work: how many of the announced steps are done, and a short note."""

    def __call__(self, completed: float, note: str = "") -> None:
        """Show it."""
        ...


@dataclass(kw_only=True)
class Console:
    """Where a command's words go.

    Attributes:
        json_only: standard output is kept for one JSON document.
        plain: plain lines on a terminal too, for processes that share it.
    """

    json_only: bool = False
    plain: bool = False
    _out: RichConsole = field(init=False, repr=False)

    def __post_init__(self) -> None:
        stream = sys.stderr if self.json_only else sys.stdout
        width = None if stream.isatty() else PLAIN_WIDTH
        self._out = RichConsole(
            file=stream, highlight=False, emoji=False, soft_wrap=True, width=width
        )

    def say(self, text: str) -> None:
        """Print one line."""
        self._out.print(text, markup=False)
        self._out.file.flush()

    def table(self, table: Table) -> None:
        """Print a table."""
        self._out.print(table, soft_wrap=False)
        self._out.file.flush()

    def result(self, value: dict[str, Any]) -> None:
        """Print the command's result as JSON if that was asked for."""
        if self.json_only:
            sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
            sys.stdout.flush()

    @contextlib.contextmanager
    def progress(self, label: str, total: int | None = None) -> Iterator[Report]:
        """Show the progress of ``total`` steps while the block runs.

        Args:
            label: what is being done.
            total: number of steps; None = percents are told, which are complete at its end.

        Yields:
            A function to call with the number of steps done, or the percent, and a note.
        """
        if self.plain or not self._out.is_terminal:
            plain = PlainProgress(self, label, total)
            yield plain
            plain.end()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn() if total is None else MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._out) as bar:
            task = bar.add_task(label, total=WHOLE if total is None else total, note="")

            def report(completed: float, note: str = "") -> None:
                bar.update(task, completed=completed, note=note)

            yield report
            if total is None:
                report(WHOLE)


Told = Callable[[int, str], None]
"""Called by a method with the number of networks run, or the percent done, and a word."""


@contextlib.contextmanager
def shown(progress: Told | bool, label: str, total: int | None) -> Iterator[Told | None]:
    """Yield a function that shows progress: a user's own, or on a terminal, if it is wanted, a bar.

    Args:
        progress: a function, which is yielded as it is; or whether a terminal shows a bar.
        label: what is being done.
        total: number of steps; 0 = it cannot be told; None = percents are told.
    """
    if not isinstance(progress, bool):
        yield progress
    elif progress and sys.stdout.isatty():
        steps = 1 if total == 0 else total
        with Console().progress(label, steps) as report:
            yield lambda completed, note: report(completed, note)
            report(WHOLE if steps is None else steps, "done")
    else:
        yield None


class PlainProgress:
    """Prints a line every ten seconds, in long work less often, and at the end.

    Args:
        console: where to print.
        label: what is being done.
        total: number of steps; None = percents are told.
    """

    def __init__(self, console: Console, label: str, total: int | None) -> None:
        self._console = console
        self._label = label
        self._total = WHOLE if total is None else total
        self._unit = " %" if total is None else f"/{total}"
        self._started = time.monotonic()
        self._printed = self._started
        self._anchor: tuple[float, float] | None = None  # steps and time to count the speed from
        self._told: tuple[float, str] | None = None
        self._shown: tuple[float, str] | None = None

    def __call__(self, completed: float, note: str = "") -> None:
        """Print where the work stands, if enough time has passed or it is done."""
        now = time.monotonic()
        if self._anchor is None:  # the first of many steps may be where an earlier run stopped
            self._anchor = (0, self._started) if completed == 1 else (completed, now)
        self._told = (completed, note)
        interval = max(PLAIN_INTERVAL, PLAIN_SHARE * (now - self._started))
        due = completed >= self._total or now - self._printed >= interval
        if due and self._told != self._shown:
            self._print(now, completed, note, self._time_left(now, completed))

    def end(self) -> None:
        """Print where the work ended, if that is not what was printed last."""
        if self._unit == " %" and (self._told or (0, ""))[0] < self._total:
            self._told = (self._total, "")
        if self._told is not None and self._told != self._shown:
            self._print(time.monotonic(), *self._told, left="")

    def _time_left(self, now: float, completed: float) -> str:
        steps, since = self._anchor or (0, self._started)
        if completed <= steps or completed >= self._total:
            return ""
        left = (now - since) / (completed - steps) * (self._total - completed)
        return f"{seconds_in_words(left)} left"

    def _print(self, now: float, completed: float, note: str, left: str) -> None:
        self._printed, self._shown = now, (completed, note)
        elapsed = seconds_in_words(now - self._started)
        done = f"{math.floor(10 * completed) / 10:g}"  # never a step too many
        words = (f"{self._label}: {done}{self._unit}", elapsed, left, note)
        self._console.say(", ".join(filter(None, words)))


def seconds_in_words(seconds: float) -> str:
    """Return a duration as ``4 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
