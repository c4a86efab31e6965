"""Runs that go on after an interruption where something could differ: all images, threads."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from prunegraph.agent import search
from prunegraph.agent.options import AgentOptions
from prunegraph.cli.main import main
from prunegraph.core.console import Console
from prunegraph.core.errors import ConfigError
from prunegraph.runs.choose import Choice, choose_job
from prunegraph.runs.context import RunContext
from prunegraph.runs.dense import warn_of_network
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.compare import CompareConfig
from prunegraph.runs.parallel.jobs import Jobs, Workplace, make_workplace
from prunegraph.runs.tasks.registry import load_target
from prunegraph.training.loop import _Training


class Stop(Exception):
    """Ends a search between two updates."""


def searched(
    options: CompareConfig, folder: RunFolder, stop_at: int | None, patch: pytest.MonkeyPatch
) -> Choice:
    """Search as ``compare`` does, and stop after an update."""
    target = load_target(options, options.budget())
    place = make_workplace(options, [target], [folder], Console(json_only=True))
    show, updates = search._show, []

    def counted(*arguments: Any) -> None:
        show(*arguments)
        updates.append(arguments)
        if len(updates) == stop_at:
            raise Stop

    patch.setattr(search, "_show", counted)
    with Jobs(options, place) as jobs:
        place = replace(place, pool=jobs._pool())
        return choose_job(place, (0,), "agent", 0)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [None, 2])
def test_masks_that_come_again_after_a_resume_are_not_counted_twice(
    workers: int | None, weights: Path, tmp_path: Path
) -> None:
    options = CompareConfig(
        weights=weights,
        networks=79,
        agent=AgentOptions(update_size=4, surrogate_steps=2, distill_steps=0),
        calibration_images=64,
        keep_macs=0.3,
        threads=1,
        workers=workers,
    )
    assert (
        len(
            RunContext(
                target=load_target(options, options.budget()), options=options, seed=0
            ).target.dataset.search
        )
        < 1500
    )  # an update scores on all of them
    cut = RunFolder(path=tmp_path / "cut")
    with pytest.MonkeyPatch.context() as patch:
        whole = searched(options, RunFolder(path=tmp_path / "whole"), None, patch)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        searched(options, cut, 10, patch)
    with pytest.MonkeyPatch.context() as patch:
        again = searched(options, cut, None, patch)
    assert whole.record is not None and again.record is not None
    for name in ("networks_evaluated", "history"):
        assert whole.record[name] == again.record[name]
    assert whole.candidates[0].mask == again.candidates[0].mask


def test_an_interrupted_fine_tune_goes_on_with_other_threads(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["apply", "--policy", "resnet-cifar", "--weights", str(weights)]
    words += [
        "--calibration-images",
        "64",
        "--finetune-epochs",
        "3",
        "--out",
        str(tmp_path / "run"),
    ]
    train_epoch, epochs = _Training.train_epoch, []

    def counted(self: _Training, after_step: Callable[[float], None]) -> None:
        epochs.append(self.seed)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        train_epoch(self, after_step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Training, "train_epoch", counted)
        assert main([*words, "--threads", "1"]) == 130
        assert main([*words, "--threads", "2", "--workers", "1"]) == 0
    assert len(epochs) == 2 + 1 + 1 + 3  # the dense network's three come after the pruned one's
    capsys.readouterr()


def test_a_limit_that_takes_nothing_away_is_verified(weights: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["apply", "--policy", "resnet-cifar", "--weights", str(weights), "--out", str(run)]
    words += ["--calibration-images", "64", "--finetune-epochs", "1", "--threads", "1"]
    assert main([*words, "--max-memory", "100000000"]) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["pruned"]["macs"] == report["dense"]["macs"]
    assert main(["verify", str(run), "--threads", "1"]) == 0


@pytest.fixture
def begun(weights: Path, tmp_path: Path) -> tuple[CompareConfig, RunFolder]:
    """Return the options of a run on weights of its own, and its folder, just begun."""
    for path in (weights, weights.with_suffix(".json")):
        shutil.copy(path, tmp_path / f"net{path.suffix}")
    options = CompareConfig(weights=tmp_path / "net.safetensors", threads=1, keep_macs=0.5)
    folder = RunFolder(path=tmp_path / "run")
    workplace(options, folder)
    workplace(options, folder)
    return options, folder


def workplace(options: CompareConfig, folder: RunFolder) -> Workplace:
    target = load_target(options, options.budget())
    return make_workplace(options, [target], [folder], Console(plain=True))


def test_a_run_goes_on_with_the_weights_that_it_began_with_alone(
    begun: tuple[CompareConfig, RunFolder],
) -> None:
    options, folder = begun
    assert options.weights is not None
    tensors = safetensors.torch.load_file(options.weights)
    tensors["conv1.weight"] += 0.01
    safetensors.torch.save_file(tensors, options.weights)
    with pytest.raises(ConfigError, match=r"run was begun with other weights than .*net.safetens"):
        workplace(options, folder)


def test_a_run_goes_on_with_the_images_that_it_began_with_alone(
    begun: tuple[CompareConfig, RunFolder],
) -> None:
    options, folder = begun
    record = json.loads(folder.file("dense.json").read_text())
    folder.file("dense.json").write_text(json.dumps(record | {"images_of_the_run": "0" * 16}))
    with pytest.raises(ConfigError, match="run was begun with other data of digits"):
        workplace(options, folder)


def test_weights_that_saw_other_images_are_warned_of(
    begun: tuple[CompareConfig, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    options, folder = begun
    assert options.weights is not None
    warn_of_network(workplace(options, folder).contexts[0], Console(plain=True))
    assert "search images may be among them" not in capsys.readouterr().out
    beside = options.weights.with_suffix(".json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"train_images": "0" * 16}))
    warn_of_network(workplace(options, folder).contexts[0], Console(plain=True))
    assert "search images may be among them" in capsys.readouterr().out
