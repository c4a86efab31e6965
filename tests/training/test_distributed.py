"""Two processes train what one trains: every batch is shared between them."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

SCRIPT = Path(__file__).with_name("shared_training.py")
ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of what two ranks trained."""
    folder = tmp_path_factory.mktemp("shared")
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)],
            env={**os.environ, **common, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return folder


@pytest.fixture(scope="module")
def training() -> ModuleType:
    """Return the ranks' script as a module."""
    spec = importlib.util.spec_from_file_location("shared_training", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    record = json.loads((folder / f"{name}.json").read_text())
    return safetensors.torch.load_file(folder / f"{name}.safetensors"), record


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "unusual", "slimmable"])
def test_two_ranks_train_what_one_process_trains(
    shared: Path, training: ModuleType, tmp_path: Path, name: str
) -> None:
    training.train(name, tmp_path / f"{name}.safetensors")
    (one, losses), (two, shared_losses) = read(tmp_path, name), read(shared, name)
    assert two.keys() == one.keys()
    assert shared_losses["losses"] == pytest.approx(losses["losses"], rel=1e-5)
    start = training.make(name, 0).state_dict()
    moved = [key for key in one if not torch.equal(one[key], start[key])]
    assert any("running_var" in key for key in moved)
    assert any("conv" in key for key in moved)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.slow
def test_bfloat16_rounds_another_way(shared: Path, training: ModuleType, tmp_path: Path) -> None:
    training.train("digits", tmp_path / "bfloat16.safetensors", autocast=True)
    losses, shared_losses = read(tmp_path, "bfloat16")[1], read(shared, "bfloat16")[1]
    assert shared_losses["losses"] == pytest.approx(losses["losses"], rel=0.02)


@pytest.mark.slow
def test_ranks_resume_bit_equal(shared: Path) -> None:
    (whole, losses), (cut, cut_losses) = read(shared, "digits"), read(shared, "cut")
    assert cut_losses == {"losses": losses["losses"], "resumed": 2}
    assert all(torch.equal(cut[key], value) for key, value in whole.items())


@pytest.mark.slow
def test_rank_0_alone_writes(shared: Path) -> None:
    assert not list(shared.rglob("nowhere"))
    assert len(list(shared.iterdir())) == 5 * 3


def test_statistics_of_a_share_would_not_do(training: ModuleType) -> None:
    """The twin of the comparison above: batch norm of half a batch is another function."""
    net = training.make("digits", 0).train()
    batch, _ = next(iter(training.images().batches(32)))
    halves = torch.cat([net(half) for half in batch.tensor_split(2)])
    assert float((halves - net(batch)).detach().abs().max()) > 1e-2
