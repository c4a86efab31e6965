"""The tables of ``benchmarks/weights.py`` on cells as its processes write them."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True, scope="module")
def neighbours() -> Iterator[None]:
    """Let the benchmark find its other files, as where it is run."""
    sys.path.append(str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def cell(method: str, seed: int, score: float, **changes: Any) -> dict[str, Any]:
    return {
        "method": method,
        "budget": "50 %",
        "calibration": "text",
        "seed": seed,
        "tests": ["test"],
        "sparsity": 0.5,
        "cpu_seconds": 10.0,
        "peak_bytes": 3_000_000,
        "copy_bytes": 1_000_000,
        "perplexity": {"test": {"first": score}},
        **changes,
    }


def test_mean_and_spread_over_seeds(context: ModuleType) -> None:
    text = context.tables([cell("wanda", seed, 40.0 + seed) for seed in range(3)])
    assert "| wanda | 41.00 ± 1.00 |  | 0.5000 |  | 10 | 2 | 3 |" in text


@pytest.mark.parametrize(("gains", "verdict"), [([5, 6, 7], "shown"), ([5, -6, 2], "not shown")])
def test_a_difference_is_shown_beyond_two_standard_errors(
    context: ModuleType, gains: list[int], verdict: str
) -> None:
    rows = [cell("wanda", seed, 40.0) for seed in range(3)]
    rows += [cell("sparsegpt", seed, 40.0 - gain) for seed, gain in enumerate(gains)]
    (line,) = [each for each in context.tables(rows).splitlines() if each.startswith("- ")]
    assert line.startswith("- sparsegpt below wanda by")
    assert line.endswith(f": {verdict}.")


def test_calibration_texts_are_compared(context: ModuleType) -> None:
    rows = [cell("apt", 0, 40.0), cell("apt", 1, 40.0), cell("apt", 0, 50.0, calibration="other")]
    text = context.tables(rows)
    assert "| other | 50.00 | 1 |" in text
    assert "| apt | 40.00 ± 0.00 |" in text
