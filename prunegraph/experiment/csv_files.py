"""A run's figures as CSV files, for spreadsheets and data frames."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from prunegraph.experiment.folder import RunFolder
from prunegraph.experiment.greedy import GREEDY_CURVE
from prunegraph.experiment.report import History
from prunegraph.experiment.verdict import MethodRow
from prunegraph.files import write_text

METHODS_CSV = "methods.csv"
"""The compared rows, one a line; a figure that there is not is empty."""

HISTORY_CSV = "history.csv"
"""The learning curves, one point a line: search, figure, networks evaluated so far, value.

The policy's own mask (``greedy_accuracy``) is that of before its update, the others are of after.
"""


def write_csv_files(folder: RunFolder, rows: Sequence[MethodRow], history: History) -> None:
    """Write both files into a run folder; without a search there are no learning curves."""
    columns = [field.name for field in fields(MethodRow)]
    lines = ([getattr(row, name) for name in columns] for row in rows)
    write_text(folder.file(METHODS_CSV), _to_csv(columns, lines))
    if history:
        points = _points(history)
        text = _to_csv(("search", "figure", "networks", "value"), points)
        write_text(folder.file(HISTORY_CSV), text)


def _points(history: History) -> Iterable[tuple[Any, ...]]:
    along, greedy = GREEDY_CURVE
    for search, figures in history.items():
        for name, values in figures.items():
            if name not in ("networks", along):
                networks = figures[along if name == greedy else "networks"]
                for number, value in zip(networks, values, strict=True):
                    yield search, name, round(number), value


def _to_csv(columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)
    return content.getvalue()
