from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prunegraph.runs.report.report import write_report
from prunegraph.runs.report.tables import method_cells, methods_table
from prunegraph.runs.report.verdict import MethodRow
from support.parts import part

KEYS = {
    "": "schema command arch dataset seed budget dense pruned search methods verdict "
    "verdict_reason",
    "dense": "macs params test_accuracy test_accuracy_finetuned",
    "pruned": "macs params search_accuracy test_accuracy_recalibrated test_accuracy_finetuned "
    "widths",
    "search": "seconds networks_evaluated evaluation_seconds",
    "methods": "name seed macs params search_accuracy test_accuracy_recalibrated "
    "test_accuracy_finetuned networks_evaluated",
}
"""The keys of architecture.md, section 6, that others may rely on."""


def method(name: str, seed: int, search: float) -> MethodRow:
    return MethodRow(
        name=name,
        **part(name),
        seed=seed,
        macs=50,
        params=40,
        search_accuracy=search,
        test_accuracy_recalibrated=search - 0.01,
        test_accuracy_finetuned=None,
        networks_evaluated=16,
        digest="d",
    )


@pytest.fixture
def report() -> dict[str, Any]:
    rows = [
        method("l1/uniform", 0, 0.7),
        replace(method("agent", 0, 0.8), seconds=60.0),
        replace(method("agent", 1, 0.82), seconds=120.0),
    ]
    return {
        "schema": 1,
        "command": "train",
        "arch": "resnet20",
        "dataset": "cifar10",
        "seed": 0,
        "budget": {"keep_macs": 0.5},
        "dense": {
            "macs": 100,
            "params": 90,
            "test_accuracy": 0.9,
            "test_accuracy_finetuned": 0.91,
        },
        "pruned": {
            "macs": 50,
            "params": 40,
            "search_accuracy": 0.8,
            "test_accuracy_recalibrated": 0.79,
            "test_accuracy_finetuned": 0.88,
            "widths": {"layer1.0.conv1": 9},
            "seed": 1,
            "mask_digest": "d",
        },
        "verdict": None,
        "verdict_reason": "one seed",
        "task": "image_classification",
        "score_name": "accuracy",
        "higher_is_better": True,
        "verdict_metric": "test_accuracy_recalibrated",
        "search": {"seconds": 1.23, "networks_evaluated": 16, "evaluation_seconds": 1.0},
        "methods": [row.to_json() for row in rows],
    }


def test_report_has_the_promised_keys(report: dict[str, Any], tmp_path: Path) -> None:
    content = write_report(report, tmp_path / "report.json", {"mask.json": "00"})
    assert KEYS[""].split() == list(content)[:12]
    for name in ("dense", "pruned", "search"):
        assert KEYS[name].split() == list(content[name])[: len(KEYS[name].split())]
    assert KEYS["methods"].split() == list(content["methods"][0])[:8]
    assert content["files"] == {"mask.json": "00"}
    assert content["budget"] == {"keep_macs": 0.5}


def test_table_is_sorted_by_search_accuracy_and_shows_the_spread(report: dict[str, Any]) -> None:
    console = Console(width=160, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(methods_table(report))
    console.file.close()
    text = console.export_text()
    assert text.index("agent (x2)") < text.index("l1/uniform")
    assert "81.00 ± 1.41" in text
    assert "50 (50.0 %)" in text
    assert "1.5" in text  # minutes: the mean of the agent's two seeds


def test_methods_are_told_apart_on_a_narrow_terminal(report: dict[str, Any]) -> None:
    names = ["activation/sensitivity", "activation/skip_full"]
    wide = report | {"methods": [method(name, 0, 0.7).to_json() for name in names]}
    with Path("/dev/null").open("w") as nowhere:
        console = Console(width=80, record=True, file=nowhere)
        console.print(methods_table(wide))
    text = console.export_text()
    assert all(name in text for name in names)
    assert max(map(len, text.splitlines())) <= 80


def test_the_dense_control_shows_its_spread(report: dict[str, Any]) -> None:
    tuned = [
        replace(method("dense", seed, 0.9), test_accuracy_finetuned=0.9 + seed / 100)
        for seed in (0, 1)
    ]
    content = report | {"methods": [*report["methods"], *(row.to_json() for row in tuned)]}
    assert method_cells(content)[0][5] == "90.50 ± 0.71"
