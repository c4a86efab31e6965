"""The verdict of ``benchmarks/structure_zoo.py`` on rows as its workers write them."""

from types import ModuleType
from typing import Any

import pytest


def row(**changes: Any) -> dict[str, Any]:
    passing = {"library": "timm", "name": "vit", "least_macs": 0.1, "prunable": 1.0}
    return passing | {"frozen": {}, "compared": 3, "failures": []} | changes


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"error": "ModelError: no inner channels"}, "ModelError: no inner channels"),
        ({"failures": ["budget: 3"], "compared": 0}, "budget: 3"),
        ({"compared": 0}, "its outputs hardly depend on its inputs"),
        (
            {"least_macs": 0.7, "frozen": {"once": 1, "twice": 2, "thrice": 3}},
            "70% of the MACs must stay: thrice; twice",
        ),
    ],
)
def test_shortcomings(context: ModuleType, changes: dict[str, Any], told: str) -> None:
    assert "; ".join(context.shortcomings(row(**changes))) == told


def test_the_table_counts_by_library(context: ModuleType) -> None:
    rows = [row(), row(name="pit", least_macs=0.9), {"library": "monai", "name": "x", "error": "E"}]
    text = context.table(rows)
    assert "| timm | 2 | 2 | 2 | 1 | 1 |" in text
    assert "| monai | 1 | 0 | 0 | 0 | 0 |" in text
    assert "- monai/x: E" in text
    assert "timm/vit" not in text
