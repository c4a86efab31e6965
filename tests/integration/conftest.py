"""A tiny pretrained network and a finished run that the tests of this folder share."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from prunegraph.cli.main import main
from support.drawing import drawn

ARCH = "digits_resnet8_w4"
SMALL = (
    *("--networks", "24", "--agent.update-size", "4", "--agent.subset", "64"),
    *("--agent.surrogate-steps", "2", "--agent.distill-steps", "1"),
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
def one_worker_words(quick_words: list[str]) -> list[str]:
    """Return a training command of one search of several updates."""
    return [*quick_words, "--networks", "60"]


@pytest.fixture(scope="session")
def one_worker(tmp_path_factory: pytest.TempPathFactory, one_worker_words: list[str]) -> Path:
    """Return the folder of a finished run of that command by one worker."""
    path = tmp_path_factory.mktemp("one") / "run"
    assert main([*one_worker_words, "--workers", "1", "--out", str(path)]) == 0
    return path


@pytest.fixture
def assert_same_run() -> Callable[[Path, Path], None]:
    """Return a comparison of what two runs found, to the last bit."""

    def compare(one: Path, two: Path) -> None:
        reports = [json.loads((path / "report.json").read_bytes()) for path in (one, two)]
        methods = [[{**row, "seconds": 0} for row in report["methods"]] for report in reports]
        assert methods[0] == methods[1]
        assert reports[0]["pruned"] == reports[1]["pruned"]
        searches = [report["search"] for report in reports]
        assert searches[0]["networks_evaluated"] == searches[1]["networks_evaluated"] > 30
        for name in ("masks.json", "policy.safetensors", "pruned/pruned.safetensors"):
            assert (one / name).read_bytes() == (two / name).read_bytes(), name

    return compare


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, train_words: list[str]) -> Path:
    """Return the folder of a finished training; tests must not change it."""
    path = tmp_path_factory.mktemp("finished") / "run"
    with drawn():
        assert main([*train_words, "--out", str(path)]) == 0
    return path


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Return what writes a module into the current folder, and returns its name.

    It is another one in each test.
    """

    def write(text: str) -> str:
        name = f"own_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        return name

    return write
