"""A tiny pretrained network and a finished run that the tests of this folder share."""

import shutil
from pathlib import Path

import pytest

from prunegraph.experiment.cli import main

ARCH = "digits_resnet8_w4"
SMALL = (
    *("--networks", "24", "--update-size", "4", "--subset", "64"),
    *("--calibration-images", "64", "--finetune-epochs", "2", "--threads", "1"),
)
"""Options that make a run take about a second."""


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the weights of a tiny network that was trained for a few epochs."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    assert main(["pretrain", "--arch", ARCH, "--epochs", "6", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def train_words(weights: Path) -> list[str]:
    """Return a training command without its ``--out``."""
    return ["train", "--weights", str(weights), "--search-seeds", "2", *SMALL]


@pytest.fixture(scope="session")
def quick_words(weights: Path) -> list[str]:
    """Return a training command that compares with nothing."""
    return [
        "train",
        "--weights",
        str(weights),
        "--search-seeds",
        "1",
        "--baselines",
        "none",
        *SMALL,
    ]


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory, quick_words: list[str]) -> Path:
    """Return the folder of a finished run of that command; tests must not change it."""
    path = tmp_path_factory.mktemp("quick") / "run"
    assert main([*quick_words, "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, train_words: list[str]) -> Path:
    """Return the folder of a finished training; tests must not change it."""
    path = tmp_path_factory.mktemp("finished") / "run"
    assert main([*train_words, "--out", str(path)]) == 0
    return path


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))
