"""A comparison of baselines alone: no agent, the report is about the best of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from prunegraph.cli.main import main
from prunegraph.core.errors import ConfigError
from prunegraph.runs.options.compare import CompareConfig

METHODS = ("cem", "random_search", "taylor/uniform", "l1/uniform")


@pytest.fixture(scope="module")
def compared(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("baselines") / "run"
    words = [
        *("compare", "--no-agent", "--weights", str(weights), "--methods", *METHODS),
        *("--seeds", "2", "--networks", "24", "--agent.subset", "64", "--threads", "1"),
        *("--calibration-images", "64", "--finetune-epochs", "1", "--finetune-best"),
    ]
    assert main([*words, "--out", str(path)]) == 0
    return path


def test_the_report_is_about_the_best_baseline(compared: Path) -> None:
    report = json.loads((compared / "report.json").read_text())
    rows = report["methods"]
    assert {row["name"] for row in rows} == {*METHODS, "dense"}
    seeds = {name: {row["seed"] for row in rows if row["name"] == name} for name in METHODS}
    assert seeds == {name: {0} if name == "l1/uniform" else {0, 1} for name in METHODS}
    searched = {
        name: np.mean([row["search_accuracy"] for row in rows if row["name"] == name])
        for name in METHODS
    }
    best = max(searched, key=lambda name: searched[name])
    tuned = {row["name"] for row in rows if row["test_accuracy_finetuned"] is not None}
    assert tuned == {best, "dense"}
    own = [row for row in rows if row["digest"] == report["pruned"]["mask_digest"]]
    assert best in {row["name"] for row in own}
    assert report["pruned"]["test_accuracy_finetuned"] is not None
    assert report["search"] is None
    assert report["verdict"] is None
    assert "rows of the agent" in report["verdict_reason"]
    page = (compared / "report.html").read_text()
    assert f"Pruned = {best}" in page
    assert "What the search cost" not in page
    assert not (compared / "policy.json").exists()


def test_it_is_verified_exported_and_shown_again(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(compared), "--threads", "1"]) == 0
    report = json.loads((compared / "report.json").read_text())
    digest = report["pruned"]["mask_digest"]
    cells = [row["cell"] for row in report["methods"] if row["digest"] == digest]
    cell = next(filter(None, cells))
    out = tmp_path / "pruned.pt2"
    assert (
        main(["export", str(compared / cell), "--format", "torch-export", "--out", str(out)]) == 0
    )
    capsys.readouterr()
    assert main(["compare", "--config", str(compared / "config.yaml"), "--out", str(compared)]) == 0
    told = capsys.readouterr().out
    assert "is finished" in told
    assert "no verdict" not in told


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is left to compare"):
        CompareConfig(no_agent=True, methods=())


def test_a_policy_without_an_agent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-agent"):
        CompareConfig(no_agent=True, policy=tmp_path)
