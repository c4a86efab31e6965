"""``--task text_classification``: an encoder's folder, a table, a verified run of drawn masks."""

import json
import os
from pathlib import Path

import pytest

from prunegraph.cli.main import main
from prunegraph.models import load_encoder
from support.sentences import save_encoder, tiny_encoder, write_table

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers")

OPTIONS = ("candidates", "early", "steps", "batch-size")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return options that name an encoder and a table."""
    folder = tmp_path_factory.mktemp("sentences")
    save_encoder(folder / "enc", tiny_encoder(initializer_range=0.3))
    write_table(folder / "toy.tsv", train=64, search=32, dev=32)
    weights = ["--weights", str(folder / "enc"), "--data-dir", str(folder), "--dataset", "toy"]
    return ["--task", "text_classification", *weights, "--threads", "1", "--pretrain-epochs", "2"]


def recipe(name: str) -> list[str]:
    values = zip(OPTIONS, ("3", "2", "4", "8"), strict=True)
    return [word for option, value in values for word in (f"--{name}.{option}", value)]


def test_masks_are_drawn_selected_reported_and_verified(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["prune", "randomized", *words, *recipe("randomized"), "--sparsity", "0.9"]
    assert main([*command, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert (report["task"], report["dataset"]) == ("text_classification", "toy")
    rows = {row["name"]: row for row in report["methods"]}
    names = ("randomized", "randomized_shares", "randomized_magnitude", "randomized_uniform")
    assert {*rows} == {"dense", *names}
    assert all(name in shown for name in names)
    assert {row["sparsity"] for name, row in rows.items() if name != "dense"} == {
        rows["randomized"]["sparsity"]
    }
    assert rows["randomized"]["networks_evaluated"] == 9
    assert {*report["selection"]} == {"randomized", "randomized_shares"}
    for record in report["selection"].values():
        assert len(record["final"]) == len(record["gain"]) == 3
        assert -1.0 <= record["rank_correlation"] <= 1.0
    page = (out / "report.html").read_text()
    assert "rank correlation of early and final loss" in page
    assert main(["verify", str(out), "--threads", "1"]) == 0
    assert "selection" in capsys.readouterr().out
    model, fresh = load_encoder(out / "pruned", 2, 0)
    assert not fresh
    assert (model.get_parameter("bert.encoder.layer.0.output.dense.weight") == 0.0).any()
    assert main(["export", str(out), "--format", "safetensors"]) == 0


def test_controls_stand_alone_beside_one_shot_methods(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    methods = ["randomized_uniform", "magnitude"]
    command = ["compare", "--methods", *methods, *words, *recipe("randomized_uniform")]
    command += ["--sparsity", "0.8", "--seeds", "2", "--workers", "1", "--out", str(out)]
    assert main(command) == 0
    rows = json.loads((out / "report.json").read_text())["methods"]
    assert [row["seed"] for row in rows if row["name"] == "randomized_uniform"] == [0, 1]
    assert main(["verify", str(out), "--threads", "1"]) == 0
    alone = ["prune", "randomized_uniform", *words, *recipe("randomized_uniform")]
    assert main([*alone, "--sparsity", "0.8", "--out", str(tmp_path / "alone")]) == 0
    assert main(["verify", str(tmp_path / "alone"), "--threads", "1"]) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--weights": None}, "text_classification needs --weights FOLDER"),
        ({"--data-dir": None}, "--data-dir FOLDER with the table"),
        ({"--dataset": "sst2"}, "holds no sst2.tsv or sst2.tsv.gz; there are: toy"),
        ({"--report-on": "search"}, "'search' is nothing to report on"),
        ({"--report-on": "test"}, "toy has no rows of split test"),
        ({"--arch": "resnet20"}, "--arch is of --task image_classification"),
        ({"--randomized.draw": "3"}, "has no option 'draw' (did you mean 'draws'?)"),
        ({"--randomized.steps": "0"}, "steps=0 must be at least 1"),
        ({"--pattern": "2:4"}, "give a sparsity, no pattern"),
    ],
)
def test_bad_input_is_one_line(
    changed: dict[str, str | None],
    message: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = dict(zip(words[::2], words[1::2], strict=True)) | {"--sparsity": "0.9"}
    if "--pattern" in changed:
        del given["--sparsity"]
    given = {name: value for name, value in {**given, **changed}.items() if value is not None}
    line = [word for pair in given.items() for word in pair]
    assert main(["prune", "randomized", *line, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()
