"""The benchmarks run to their end, small, as their own commands run them."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.sentences import save_encoder, write_table

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
def test_the_overhead_of_a_search(
    benchmark: RunBenchmark, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark("search_overhead.py", "--networks 34 --threads 1")
    found = json.loads(capsys.readouterr().out)
    assert found["networks"] >= 32
    assert found["ratio"] > 0.5


@pytest.mark.slow
def test_ablations(
    benchmark: RunBenchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ablations.json"
    benchmark("ablations.py", f"--out {out} --seeds 1 --networks 90 --only no_edges {DIGITS}")
    assert json.loads(out.read_text())["rows"]
    capsys.readouterr()
    benchmark("ablations.py", f"--out {out} --table")
    assert "| no_edges |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_fit_helps_layers_of_each_kind(benchmark: RunBenchmark, tmp_path: Path) -> None:
    out = tmp_path / "fit.json"
    benchmark("reconstruction.py", f"--seeds 1 --epochs 6 --out {out}")
    for row in json.loads(out.read_text())["rows"]:
        assert row["fitted 0.25"] > row["cut 0.25"], row["layers"]


@pytest.mark.slow
def test_masks_drawn_at_random(
    benchmark: RunBenchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    encoder, table = save_encoder(tmp_path / "enc"), write_table(tmp_path / "toy.tsv")
    words = f"--weights {encoder} --table {table} --out {tmp_path / 'cells'} --candidates 2"
    words += " --early 2 --steps 4 --dense-steps 20"
    benchmark("randomized.py", f"{words} --seeds 0")
    benchmark("randomized.py", f"{words} --seeds 0 1 2")  # goes on
    benchmark("randomized.py", f"--out {tmp_path / 'cells'} --show")
    shown = capsys.readouterr().out.rpartition("**toy**")[2]
    assert "| 0.9 | randomized_shares |" in shown
    assert "randomized above magnitude: " in shown
    assert len([*tmp_path.glob("cells/toy/*.json")]) == 1 + 4 * 3
