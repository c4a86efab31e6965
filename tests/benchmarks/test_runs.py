"""The benchmarks run to their end, small, as their own commands run them."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prunegraph.data import load_dataset
from prunegraph.models import WeightsInfo, save_weights
from prunegraph.runs.prepare import build_network
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


@pytest.mark.parametrize("command", ["catalogue.py", "headroom.py collect"])
def test_a_share_that_there_is_not_is_refused(
    benchmark: RunBenchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    name, _, job = command.partition(" ")
    with pytest.raises(SystemExit, match="2"):
        benchmark(name, f"{job} --out {tmp_path} --shard 5 2")
    assert "--shard K N: K is from 0 to N - 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_catalogue_is_made_once(benchmark: RunBenchmark, tmp_path: Path) -> None:
    out = tmp_path / "catalogue"
    benchmark("catalogue.py", f"--out {out} --networks 34")
    records = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    assert [record["number"] for record in records] == [32, 33]
    assert min(record["search_accuracy"] for record in records) > 0.8
    before = [path.stat().st_mtime_ns for path in sorted(out.iterdir())]
    benchmark("catalogue.py", f"--out {out} --networks 34")
    assert [path.stat().st_mtime_ns for path in sorted(out.iterdir())] == before


@pytest.mark.slow
def test_general_policies(
    benchmark: RunBenchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue, dataset = tmp_path / "catalogue", load_dataset("digits")
    catalogue.mkdir()
    for number, part in enumerate(("train", "val", "val")):
        arch = f"random_basic_{number}"
        info = WeightsInfo(arch=arch, dataset="digits", extra={"part": part, "family": "basic"})
        save_weights(
            build_network(arch, dataset, number), catalogue / f"{number}.safetensors", info
        )
    given = f"--catalogue {catalogue} --threads 1 --device cpu --calibration-images 128"
    policy, rows = tmp_path / "policy-0", tmp_path / "rows"
    benchmark(
        "general.py",
        f"train --variant raw --out {policy} {given} --networks 40 --budgets 0.5 "
        "--agent.update-size 2",
    )
    capsys.readouterr()
    quick = tmp_path / "quick.json"
    benchmark("general.py", f"quick --out {quick} --at 0.5 --policies {policy} {given}")
    assert "| 0.5 | 2 |" in capsys.readouterr().out
    divergences = json.loads(quick.read_text())["divergence"]["0.5"]
    assert {len(row) for row in divergences.values()} == {2}
    words = f"rows --out {rows} --at 0.5 --policies {policy} --label raw {given}"
    benchmark("general.py", words)
    found = [json.loads(path.read_text())["rows"] for path in sorted(rows.glob("*.json"))]
    assert all(row["keep_macs"] <= 0.5 for own in found for row in own.values())
    before = [path.stat().st_mtime_ns for path in sorted(rows.iterdir())]
    benchmark("general.py", words)
    assert [path.stat().st_mtime_ns for path in sorted(rows.iterdir())] == before
    capsys.readouterr()
    benchmark("general.py", f"show --out {rows}")
    assert "| policy:raw | 2 |" in capsys.readouterr().out
