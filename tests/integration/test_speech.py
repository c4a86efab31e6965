"""``--task speech_recognition``: pathways on the proxy, verified, its page, small files."""

import json
from pathlib import Path

import pytest

from prunegraph.artefacts.sparse import load_sparse
from prunegraph.cli.main import main
from prunegraph.core.weight_mask import GroupedMask, WeightMask
from prunegraph.models import WeightsInfo, save_weights
from prunegraph.models.recogniser import PROXY_SIZES, build_recogniser
from support.drawing import drawn
from support.recordings import pack
from support.speech import save_whisper

DATA = ["--task", "speech_recognition", "--languages", "right", "up"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of pathways from fresh weights, with both controls."""
    folder = tmp_path_factory.mktemp("speech")
    weights = folder / "fresh.safetensors"
    model = build_recogniser(features=8, tokens=41, **PROXY_SIZES)
    save_weights(model, weights, WeightsInfo(arch="recogniser"))
    options = ["--pathways.epochs", "1", "--sparsity", "0.9", "--weights", str(weights)]
    options += ["--threads", "1"]
    with drawn():
        assert main(["prune", "pathways", *DATA, *options, "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_the_report_tells_of_every_language(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["dataset"] == "digits-proxy"
    assert (report["score_name"], report["higher_is_better"]) == ("word error rate", False)
    rows = {row["name"]: row for row in report["methods"]}
    assert set(rows) == {"dense", "pathways", "one_mask_by_score", "one_mask_of_union"}
    assert rows["pathways"]["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert report["pruned"]["mask_digest"] == rows["pathways"]["digest"]
    told = report["groups"]["pathways"]
    assert set(told["scores"]) == {"right", "up"}
    assert told["active"] < told["stored"]
    assert rows["one_mask_of_union"]["sparsity"] == pytest.approx(1.0 - told["stored"], abs=1e-4)
    page = (run / "report.html").read_text()
    assert "A mask for each language" in page
    assert "Overlap at the end: " in page
    assert (run / "plots" / "languages.png").is_file()


def test_it_is_verified(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    told = capsys.readouterr().out
    assert "are right; not verifiable: versions, groups, methods[]" in told  # what there is alone


def test_a_language_is_exported_as_a_small_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "up.sparse"
    assert main(["export", str(run), "--format", "sparse", "--out", str(out)]) == 2
    assert "give --language right or up" in capsys.readouterr().err
    words = ["export", str(run), "--format", "sparse", "--language", "up", "--out", str(out)]
    assert main(words) == 0
    assert out.stat().st_size <= 0.14 * (run / "dense.safetensors").stat().st_size
    mask = load_sparse(out, build_recogniser(features=8, tokens=41, **PROXY_SIZES))
    assert mask.sparsity == pytest.approx(0.9, abs=1e-4)


def test_options_that_do_not_fit_give_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--sparsity", "0.9", "--out", str(tmp_path / "run")]
    for words, message in (
        (["prune", "pathways", *rest], "needs batches that know their language"),
        (["prune", "magnitude", "--languages", "up", *rest], "--languages is of --task speech"),
        (["prune", "pathways", *DATA, "de", *rest], "no language 'de'; it has: right, left"),
        (
            ["prune", "pathways", *DATA, "--data-dir", str(tmp_path), *rest],
            "digits.csv: check the path",
        ),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_whisper_and_recordings_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "speech").mkdir()
    words = ["--task", "speech_recognition", "--data-dir", str(pack(tmp_path / "speech"))]
    words += ["--weights", str(save_whisper(tmp_path / "whisper", bands=80)), "--sparsity", "0.5"]
    options = ["--pathways.epochs", "1", "--pathways.batch-size", "2", "--pathways.every", "1"]
    options += ["--finetune-epochs", "1", "--batch-size", "2", "--threads", "1"]
    assert main(["prune", "pathways", *words, *options, "--out", str(tmp_path / "run")]) == 0
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "pruned" / "config.json").is_file()
    export = ["export", str(tmp_path / "run"), "--format", "sparse", "--language", "uk"]
    assert main([*export, "--out", str(tmp_path / "uk.sparse")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["arch"], report["dataset"]) == ("whisper", "speech")
    assert set(report["groups"]["pathways"]["scores"]) == {"en", "uk"}
    assert isinstance(
        WeightMask.load(tmp_path / "run" / "pruned" / "mask.safetensors"), GroupedMask
    )
    assert report["dense"]["test_score_finetuned"] is not None
    assert "are right" in capsys.readouterr().out
