"""The tables of the benchmark ``weights.py``, in Markdown, from the figures of its cells."""

import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from weights_cells import BUDGETS, DENSE, METHODS

Row = dict[str, Any]


def tables(rows: Sequence[Row]) -> str:
    """Return the Markdown tables of cells."""
    lines = []
    for budget in ("", *BUDGETS):
        own = [row for row in rows if row["budget"] == budget]
        if own:
            lines += _budget_table(budget or DENSE, own)
    texts = sorted({row["calibration"] for row in rows if row["method"] != DENSE}, key=str)
    if len(texts) > 1:
        lines += _text_table([row for row in rows if row["budget"] == "50 %"], texts)
    return "\n".join(lines)


def _budget_table(title: str, rows: Sequence[Row]) -> list[str]:
    """Return the table of one budget, and the paired differences of its neighbours."""
    main = rows[0]["calibration"] if title == DENSE else _main_text(rows)
    own = [row for row in rows if row["calibration"] == main]
    test = own[0]["tests"][0]
    lines = [
        f"**{title}**, calibrated on {main}, perplexity on {test}:",
        "",
        "| method | first windows | whole | sparsity | mean error | CPU s | peak, MB | seeds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    scores: dict[str, dict[int, float]] = {}
    for method in (DENSE, *METHODS):
        found = [row for row in own if row["method"] == method]
        if not found:
            continue
        scores[method] = {row["seed"]: row["perplexity"][test]["first"] for row in found}
        cells = [
            method,
            _spread(scores[method].values()),
            _spread(_present(row["perplexity"][test].get("whole") for row in found)),
            _spread(_present(row.get("sparsity") for row in found), 4, spread=False),
            _spread(_present(row.get("mean_error") for row in found), 4, spread=False),
            _spread(_present(row.get("cpu_seconds") for row in found), 0, spread=False),
            _spread(
                [
                    (row["peak_bytes"] - row["copy_bytes"]) / 1e6
                    for row in found
                    if row.get("copy_bytes")
                ],
                0,
                spread=False,
            ),
            str(len(found)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_differences(scores), ""]
    return lines


def _main_text(rows: Sequence[Row]) -> str:
    """Return the calibration text of most cells."""
    return str(statistics.mode(row["calibration"] for row in rows))


def _differences(scores: dict[str, dict[int, float]]) -> Iterator[str]:
    """Yield by how much each method is below the one before it, calibration seed by seed."""
    for before, after in itertools.pairwise(name for name in scores if name != DENSE):
        one, other = scores[before], scores[after]
        if before == "magnitude":
            one = dict.fromkeys(other, next(iter(one.values())))
        gains = [one[seed] - other[seed] for seed in other if seed in one]
        if len(gains) > 1:
            error = 2 * statistics.stdev(gains) / len(gains) ** 0.5
            shown = "shown" if abs(statistics.mean(gains)) > error else "not shown"
            yield (
                f"- {after} below {before} by {statistics.mean(gains):.2f} ± {error:.2f} "
                f"(two standard errors, {len(gains)} seeds): {shown}."
            )


def _text_table(rows: Sequence[Row], texts: Sequence[str]) -> list[str]:
    """Return what each calibration text costs on each test text."""
    tests = list(dict.fromkeys(test for row in rows for test in row["tests"]))
    lines = [
        "**apt at 50 %**, by calibration text, perplexity on the first windows of:",
        "",
        f"| calibrated on | {' | '.join(tests)} | seeds |",
        f"|---|{'--:|' * (len(tests) + 1)}",
    ]
    for text in texts:
        own = [row for row in rows if row["calibration"] == text and row["method"] == "apt"]
        cells = [
            _spread(_present(row["perplexity"].get(test, {}).get("first") for row in own))
            for test in tests
        ]
        lines.append(f"| {text} | {' | '.join(cells)} | {len(own)} |")
    return [*lines, ""]


def _present(values: Iterable[Any]) -> list[float]:
    return [value for value in values if value is not None]


def _spread(values: Iterable[float], digits: int = 2, *, spread: bool = True) -> str:
    values = list(values)
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if spread and values[1:] else mean
