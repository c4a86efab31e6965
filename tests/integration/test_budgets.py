"""Budgets other than kept MACs, from the command line to a verified report."""

import json
import re
from pathlib import Path

import pytest

from prunegraph.agent.method import AppliedPolicy
from prunegraph.cli.main import main
from prunegraph.runs import runner
from prunegraph.runs.report.tables import method_cells, method_columns


def test_rounded_widths_are_trained_reported_and_verified(
    quick_words: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "rounded"
    assert main([*quick_words, "--keep-macs", "0.6", "--round-to", "4", "--out", str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["budget"] == {"keep_macs": 0.6, "round_to": 4}
    assert report["pruned"]["macs"] <= 0.6 * report["dense"]["macs"]
    assert all(width % 4 == 0 for width in report["pruned"]["widths"].values())
    assert main(["verify", str(run), "--threads", "1"]) == 0


def test_a_memory_is_searched_within_reported_and_verified(
    quick_words: list[str], quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = json.loads((quick / "report.json").read_text())["peak_memory"]["dense"]
    run = tmp_path / "memory"
    words = [*quick_words, "--max-memory", str(dense // 2)]
    assert main([*words, "--out", str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["budget"] == {"max_memory": dense // 2}
    pruned = report["peak_memory"]["pruned"]
    assert 0.9 * (dense // 2) < pruned <= dense // 2
    cells = dict(zip(method_columns(report), method_cells(report)[1], strict=True))
    assert cells["memory, bytes"] == f"{pruned:,} ({100 * pruned / dense:.1f} %)"
    capsys.readouterr()
    assert main(["verify", str(run), "--threads", "1"]) == 0
    rows = [{**row, "memory": row["memory"] - 1} for row in report["methods"]]
    (run / "report.json").write_text(json.dumps({**report, "methods": rows}))
    assert main(["verify", str(run), "--threads", "1"]) == 2
    assert "].memory is reported as" in capsys.readouterr().err
    most = ["--max-memory", str(dense), "--out", str(tmp_path / "none")]
    assert main([*quick_words, *most]) == 2
    assert f"which the whole network meets: it needs {dense} bytes" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("parameter_clock")
def test_a_latency_is_searched_within_by_layer_times_and_verified(
    quick_words: list[str], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "latency"
    words = [*quick_words, "--max-latency", "3", "--out", str(run)]
    assert main(words) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["budget"] == {"max_latency": 3.0}
    assert report["latency_ms"]["dense"] > 5
    assert 2.5 < report["latency_ms"]["pruned"] < 3.3
    assert "latency.json" in report["files"]
    assert main(["verify", str(run), "--threads", "1"]) == 0
    assert "latency.json" in capsys.readouterr().out
    small = ["compare", "--weights", str(weights), "--no-agent", "--methods", "l1/uniform"]
    small += ["--seeds", "1", "--networks", "60", "--finetune-epochs", "0", "--threads", "1"]
    compared = [*small, "--max-latency", "3", "--out", str(tmp_path / "compared")]
    assert main(compared) == 0
    rows = json.loads((tmp_path / "compared" / "report.json").read_text())["methods"]
    assert {row["name"] for row in rows} == {"dense", "l1/uniform"}
    assert all(row["params"] < 2600 for row in rows if row["name"] != "dense")


def test_a_policy_is_applied_within_a_memory_budget(
    quick: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["apply", "--policy", str(quick), "--weights", str(weights), "--threads", "1"]
    words += ["--finetune-epochs", "0", "--calibration-images", "64"]
    dense = json.loads((quick / "report.json").read_text())["peak_memory"]["dense"]
    most = int(0.7 * dense)
    run = tmp_path / "memory"
    assert main([*words, "--max-memory", str(most), "--out", str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["budget"] == {"max_memory": most}
    assert report["peak_memory"]["dense"] == dense
    assert report["peak_memory"]["pruned"] <= most
    assert main(["verify", str(run), "--threads", "1"]) == 0
    capsys.readouterr()
    assert main([*words, "--max-memory", "10", "--out", str(tmp_path / "none")]) == 2
    assert "max_memory=10 bytes cannot be met: the least that can is" in capsys.readouterr().err


def test_an_interrupted_apply_keeps_its_decision(
    quick: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["apply", "--policy", str(quick), "--weights", str(weights), "--threads", "1"]
    words += ["--finetune-epochs", "0", "--calibration-images", "64", "--max-latency", "1000"]
    words += ["--out", str(tmp_path / "run")]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "conclude", interrupt)
        assert main(words) == 130
    # the clock could decide otherwise now
    monkeypatch.setattr(AppliedPolicy, "prune", pytest.fail)
    assert main(words) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["decision"]["share"] >= 0


def test_a_policy_is_applied_within_a_latency(
    quick: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["apply", "--policy", str(quick), "--weights", str(weights), "--threads", "1"]
    words += ["--finetune-epochs", "0", "--calibration-images", "64"]
    run = tmp_path / "latency"
    wanted = ["--max-latency", "1000", "--keep-macs", "0.6"]
    assert main([*words, *wanted, "--out", str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["budget"] == {"keep_macs": 0.6, "max_latency": 1000.0}
    assert 0.0 < report["latency_ms"]["pruned"] <= 1000
    assert report["pruned"]["macs"] <= 0.6 * report["dense"]["macs"]
    assert main(["verify", str(run), "--threads", "1"]) == 0
    capsys.readouterr()
    assert main([*words, "--max-latency", "0.00001", "--out", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "max_latency=1e-05 ms cannot be met on the CPU" in error
    assert re.search(r"; give [\d.]+ or more", error)
