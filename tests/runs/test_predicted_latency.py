"""The latency that searches go by: measured once, kept, and of this network."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.console import Console
from prunegraph.core.errors import ArtefactError, BudgetError
from prunegraph.graph.costs import latency as latency_table
from prunegraph.graph.costs.clock import Latency
from prunegraph.runs import predicted_latency as prediction
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.config import NetworkConfig
from prunegraph.runs.predicted_latency import predicting, with_prediction
from prunegraph.runs.target import Target
from prunegraph.runs.tasks.registry import load_target

Clock = Callable[..., Latency]

CONSOLE = Console(json_only=True, plain=True)


@pytest.fixture
def target(parameter_clock: Clock) -> Target:
    del parameter_clock  # is at work
    torch.manual_seed(0)
    return load_target(NetworkConfig(arch="digits_resnet8_w8", threads=1))


def test_layers_are_timed_once_and_the_prediction_comes_back(
    target: Target, parameter_clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0.5 * parameter_clock(target.model).least
    budget, folder = Budget(max_latency=asked), RunFolder(path=tmp_path)
    first = with_prediction(target, budget, folder, CONSOLE)
    monkeypatch.setattr(prediction, "measure_latency_table", pytest.fail)
    again = with_prediction(target, budget, folder, CONSOLE)
    masks = np.random.default_rng(0).random((5, target.graph.num_units)) < 0.7
    predictions = [t.graph.latency_model for t in (first, again)]
    assert predictions[0] is not None
    assert predictions[1] is not None
    values = [model.expected(masks.astype(float)) for model in predictions if model is not None]
    assert np.array_equal(*values)
    mask = first.graph.project(np.arange(target.graph.num_units, dtype=np.float32), budget)
    assert 0.9 < first.graph.cost_ratio(mask.keep, budget) <= 1.0
    assert with_prediction(target, Budget(keep_macs=0.5), folder, CONSOLE) is target


def test_a_network_that_is_fast_enough_or_never_will_be_is_refused(
    target: Target, parameter_clock: Clock, tmp_path: Path
) -> None:
    folder, dense = RunFolder(path=tmp_path), parameter_clock(target.model).least
    with pytest.raises(BudgetError, match=rf"takes {dense:.3g} ms, which meets max_latency=100"):
        with_prediction(target, Budget(max_latency=100.0), folder, CONSOLE)
    both = Budget(max_latency=100.0, keep_macs=0.5)  # a guard, and a limit that binds
    graph = with_prediction(target, both, RunFolder(path=tmp_path / "both"), CONSOLE).graph
    mask = graph.project(np.arange(graph.num_units, dtype=np.float32), both)
    assert 0.45 < graph.cost(mask).macs / graph.dense_cost.macs <= 0.5
    with pytest.raises(BudgetError, match=r"max_latency=0\.5 ms cannot be met"):
        with_prediction(target, Budget(max_latency=0.5), folder, CONSOLE)
    assert not folder.file(RunFolder.LATENCY).exists()


def test_a_busy_machine_is_told_when_the_layers_are_timed(
    target: Target,
    parameter_clock: Clock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def busy(models: Sequence[nn.Module], *_: object) -> list[Latency]:
        return [dataclasses.replace(parameter_clock(model), ran=0.4) for model in models]

    monkeypatch.setattr(latency_table, "measure_latencies", lambda *args, **_: busy(*args))
    budget = Budget(max_latency=0.5 * parameter_clock(target.model).least)
    with_prediction(target, budget, RunFolder(path=tmp_path), Console(json_only=False, plain=True))
    said = capsys.readouterr().out
    assert "warning: other processes had the processor for 60 % of the fastest run" in said


def test_a_damaged_or_foreign_file_is_told(
    target: Target, parameter_clock: Clock, tmp_path: Path
) -> None:
    folder = RunFolder(path=tmp_path)
    budget = Budget(max_latency=0.5 * parameter_clock(target.model).least)
    with_prediction(target, budget, folder, CONSOLE)
    path = folder.file(RunFolder.LATENCY)
    content = json.loads(path.read_text())
    damages = {
        "times": content["times"][:-1],
        "widths": [],
        "positions": [[10**6], [0], [1]],
        "scale": None,
        "offset": float("nan"),
    }
    for name, value in damages.items():
        path.write_text(json.dumps({**content, name: value}))
        with pytest.raises(ArtefactError, match=RunFolder.LATENCY):
            predicting(target, path)
