"""Comparisons of several budgets in one command: resumed, summed up, verified."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prunegraph.cli.main import main
from prunegraph.runs import comparisons
from prunegraph.runs.runner import run_plan

FOLDERS = ["digits_resnet8_w4-0.6", "digits_resnet8_w4-0.4"]


@pytest.fixture(scope="module")
def words(weights: Path) -> list[str]:
    return [
        *("compare", "--weights", str(weights), "--keep-macs", "0.6", "0.4", "--seeds", "2"),
        *(
            "--methods",
            "l1/uniform",
            "taylor/per_mac",
            "--networks",
            "24",
            "--agent.update-size",
            "4",
        ),
        *("--agent.subset", "64", "--calibration-images", "64", "--finetune-epochs", "1"),
        *("--threads", "1", "--agent.surrogate-steps", "2", "--agent.distill-steps", "1"),
    ]


@pytest.fixture(scope="module")
def compared(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of two comparisons, the second of them interrupted before it began."""
    path = tmp_path_factory.mktemp("comparisons") / "run"

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        done = iter([run_plan, interrupt])
        patch.setattr(comparisons, "run_plan", lambda *given: next(done)(*given))
        assert main([*words, "--out", str(path)]) == 130
    assert [(path / name / "report.json").is_file() for name in FOLDERS] == [True, False]
    first = (path / FOLDERS[0] / "report.json").read_bytes()
    assert main([*words, "--out", str(path)]) == 0
    assert (path / FOLDERS[0] / "report.json").read_bytes() == first
    return path


@pytest.fixture
def restored(compared: Path, tmp_path: Path) -> Iterator[Path]:
    """Return a copy that a test may damage."""
    shutil.copytree(compared, tmp_path / "copy")
    yield tmp_path / "copy"


@pytest.fixture(scope="module")
def summary(compared: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((compared / "summary.json").read_text())
    return content


def test_each_budget_has_a_comparison_of_its_own(compared: Path, summary: dict[str, Any]) -> None:
    assert [entry["folder"] for entry in summary["comparisons"]] == FOLDERS
    for name, share in zip(FOLDERS, (0.6, 0.4), strict=True):
        report = json.loads((compared / name / "report.json").read_text())
        assert report["budget"] == {"keep_macs": share}
        rows = [row for row in report["methods"] if row["name"] != "dense"]
        assert all(row["macs"] <= share * report["dense"]["macs"] for row in rows)
    assert not list(compared.rglob("checkpoints"))


def test_the_summary_names_the_best_baseline_and_the_verdict(
    compared: Path, words: list[str], summary: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rivals = ("l1/uniform", "taylor/per_mac", "prior")
    assert all(entry["best_baseline"] in rivals for entry in summary["comparisons"])
    assert all("2 seed(s)" in entry["verdict"][1] for entry in summary["comparisons"])
    assert main([*words, "--out", str(compared)]) == 0
    shown = capsys.readouterr().out
    for entry in summary["comparisons"]:
        (line,) = [line for line in shown.splitlines() if f" {entry['folder']} " in line]
        assert entry["best_baseline"] in line
        assert "none" in line


def test_a_finished_one_is_shown_again(
    compared: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (compared / "summary.json").read_bytes()
    assert main([*words, "--out", str(compared)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert (compared / "summary.json").read_bytes() == before


def test_verify_checks_every_comparison_and_the_summary(
    restored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(restored), "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["figures"] > 100
    path = restored / "summary.json"
    content = path.read_text()
    forged = json.loads(content)
    forged["comparisons"][0]["best_baseline"] = "cem"
    path.write_text(json.dumps(forged))
    assert main(["verify", str(restored), "--threads", "1"]) == 2
    assert f"{path} is not what the reports" in capsys.readouterr().err
    path.write_text(content)
    weights = next(restored.glob(f"{FOLDERS[1]}/cells/*/pruned.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert main(["verify", str(restored), "--threads", "1"]) == 2
    assert str(weights) in capsys.readouterr().err


@pytest.mark.parametrize("folders", [FOLDERS[:1], FOLDERS[:1] * 2, FOLDERS[::-1], ["..", "."]])
def test_verify_misses_a_comparison_that_was_left_out(
    folders: list[str], restored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = restored / "summary.json"
    content = json.loads(path.read_text())
    content["comparisons"] = [{"folder": n, "arch": "digits_resnet8_w4"} for n in folders]
    path.write_text(json.dumps(content))
    assert main(["verify", str(restored), "--threads", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error


def test_verify_finds_names_swapd(restored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for old, new in ((FOLDERS[0], "kept"), (FOLDERS[1], FOLDERS[0]), ("kept", FOLDERS[1])):
        (restored / old).rename(restored / new)
    assert main(["verify", str(restored), "--threads", "1"]) == 2
    assert (
        "is not what config.yaml asks for: keep_macs 0.4 there, 0.6 here" in capsys.readouterr().err
    )


def test_a_comparison_that_was_lost_or_changed(
    restored: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = restored / FOLDERS[0] / "config.yaml"
    original = options.read_text()
    options.write_text(original.replace("seeds: 2", "seeds: 9"))
    assert main([*words, "--out", str(restored)]) == 2
    assert "other options (seeds " in capsys.readouterr().err
    options.write_text(original)
    summary = (restored / "summary.json").read_text()
    shutil.rmtree(restored / FOLDERS[1])
    assert main([*words, "--out", str(restored)]) == 0
    again, before = json.loads((restored / "summary.json").read_text()), json.loads(summary)
    for content in (again, before):
        for entry in content["comparisons"]:
            del entry["report"]  # times differ
    assert again == before


def test_comparisons_of_one_network_begin_with_the_same_weights(
    restored: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = restored / FOLDERS[1] / "report.json"
    content = json.loads(path.read_text())
    content["files"]["dense.safetensors"] = "0" * 64
    path.write_text(json.dumps(content))
    assert main([*words, "--out", str(restored)]) == 2
    assert "was made of other weights than" in capsys.readouterr().err


def test_export_asks_for_one_of_them(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(compared), "--format", "safetensors"]) == 2
    assert "several comparisons" in capsys.readouterr().err


def test_all_is_checked_before_anything_begins(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [word if word != "0.4" else "0.0001" for word in words]
    assert main([*wrong, "--out", str(tmp_path / "run")]) == 2
    assert "0.0001" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_folders_have_names_of_their_own(weights: Path) -> None:
    config = comparisons.ComparisonsConfig(weights=(weights, weights), keep_params=(0.5,))
    archs = ["digits_resnet8_w4"] * 2
    name = "digits_resnet8_w4-0.5"
    assert comparisons.folder_names(config.comparisons(), archs) == [f"{name}-0", f"{name}-1"]
    other = comparisons.ComparisonsConfig(weights=(weights, Path("b.safetensors")))
    assert comparisons.folder_names(other.comparisons(), archs) == [
        *("digits_resnet8_w4-tiny-0.5", "digits_resnet8_w4-b-0.5")
    ]
