"""The benchmarks run to their end, small, as their own commands run them."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prunegraph.experiment.cli import main
from prunegraph.experiment.folder import CONFIG_FILE

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
DIGITS = "--dataset digits --arch digits_resnet --keep-macs 0.25 --pretrain-epochs 1 --threads 1"

RunBenchmark = Callable[..., None]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> RunBenchmark:
    """Return a function that runs a benchmark: name of the file, then its words in one text."""

    def run(name: str, words: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *words.split()])
        monkeypatch.syspath_prepend(FOLDER)
        runpy.run_path(str(FOLDER / name), run_name="__main__")

    return run


@pytest.mark.slow
def test_the_overhead_of_a_search(benchmark: RunBenchmark, capsys) -> None:
    benchmark("search_overhead.py", "--networks 34 --threads 1")
    found = json.loads(capsys.readouterr().out)
    assert found["networks"] >= 32
    assert found["ratio"] > 0.5


@pytest.mark.slow
def test_ablations_and_what_predicts_their_outcomes(
    benchmark: RunBenchmark, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "ablations.json"
    benchmark("ablations.py", f"--out {out} --seeds 1 --networks 90 --only default {DIGITS}")
    assert json.loads(out.read_text())["rows"]
    capsys.readouterr()
    benchmark("predict_outcomes.py", f"{out.with_suffix('')} {DIGITS}")
    assert "| default |" in capsys.readouterr().out


def test_scores(benchmark: RunBenchmark, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    benchmark("scores.py", f"--out {out} --masks 4 {DIGITS}")
    assert "accuracy" in out.read_text()


@pytest.mark.slow
def test_what_reads_a_comparison(benchmark: RunBenchmark, tmp_path: Path) -> None:
    run, few = tmp_path / "run", "--networks 40 --finetune-epochs 1 --workers 1"
    words = f"compare {DIGITS} --methods cem l1/uniform --seeds 2 {few} --out {run}"
    assert main(words.split()) == 0
    assert "pretrain_epochs: 1" in (run / CONFIG_FILE).read_text()
    dense = run / "dense.safetensors"
    masks = f"finetune_masks.py --weights {dense} --dataset digits --threads 1 --keep-macs 0.25"
    rows = []
    for words in (
        f"starts.py --weights {dense}",
        masks,
        f"{masks} --closed",
        masks.replace("finetune", "refit") + " --names cem",
    ):
        name, _, options = words.partition(" ")
        out = tmp_path / f"{len(rows)}.json"
        benchmark(name, f"{run} --out {out} {options}")
        rows.append(json.loads(out.read_text())["rows"])
    assert all(rows)
    opened = ["test_accuracy_finetuned" in row["0"] for row in rows[1:3]]
    assert opened == [True, False]
    assert list(rows[3]) == ["cem, seed 0", "cem, seed 1"]
    assert all(row["at once"] != row["layer by layer"] for row in rows[3].values())


@pytest.mark.slow
def test_the_fit_helps_layers_of_each_kind(benchmark: RunBenchmark, tmp_path: Path) -> None:
    out = tmp_path / "fit.json"
    benchmark("reconstruction.py", f"--seeds 1 --epochs 6 --out {out}")
    for row in json.loads(out.read_text())["rows"]:
        assert row["fitted 0.25"] > row["cut 0.25"], row["layers"]
