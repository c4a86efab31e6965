"""Commands under torchrun, in the spelling that works everywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prunegraph.cli.main import main
from prunegraph.runs.parallel.ranks import num_ranks, speaks

TWO_RANKS = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TWO_RANKS, "-m", "prunegraph", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.mark.slow
def test_pretrain_under_torchrun(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "shared.safetensors"
    words = ["pretrain", "--arch", "digits_resnet8_w4", "--epochs", "6", "--out", str(path)]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    one, two = (json.loads(p.with_suffix(".json").read_text()) for p in (weights, path))
    assert abs(one["test_accuracy"] - two["test_accuracy"]) < 0.1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["shared.json", path.name]


@pytest.mark.slow
def test_a_run_under_torchrun_shares_its_fine_tunes(
    quick: Path, quick_words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    done = run(*quick_words, "--out", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    masks = [(folder / "masks.json").read_bytes() for folder in (quick, path)]
    assert masks[0] == masks[1]  # the search is rank 0's alone
    assert main(["verify", str(path)]) == 0


@pytest.mark.slow
def test_what_trains_nothing_is_refused_in_one_line() -> None:
    done = run("inspect")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("prunegraph: ")]
    assert lines == [
        "prunegraph: `prunegraph inspect` trains nothing that ranks could share: "
        "leave torchrun away"
    ]


def test_torchrun_is_known_by_all_that_it_sets() -> None:
    given = dict.fromkeys(("MASTER_ADDR", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), "1")
    given |= {"RANK": "1", "WORLD_SIZE": "2"}
    assert num_ranks(given) == 2
    assert not speaks(given)
    assert speaks({**given, "LOCAL_RANK": "0"})  # the first of its machine
    assert num_ranks({"WORLD_SIZE": "2"}) == 1  # left over from something else
    assert speaks({"WORLD_SIZE": "2", "RANK": "1"})
