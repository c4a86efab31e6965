"""Budgets other than kept MACs, from the command line to a verified report."""

import json
from pathlib import Path

from prunegraph.experiment.cli import main


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
