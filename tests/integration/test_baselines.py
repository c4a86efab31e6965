"""The searches that the agent is compared with, when they are interrupted."""

from pathlib import Path

import pytest
from torch import Tensor

from prunegraph.agent.options import AgentOptions
from prunegraph.core.console import Console
from prunegraph.core.errors import ArtefactError
from prunegraph.core.files import write_text
from prunegraph.core.masks import ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.evaluation import log
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.evaluation.log import OutcomeLog
from prunegraph.methods.registry import SEARCHES
from prunegraph.runs.choose import choose_job
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.compare import CompareConfig
from prunegraph.runs.parallel.jobs import Workplace, load_targets, make_workplace

NETWORKS, EVERY = 14, 4
"""Networks of a search, and after how many its log is written."""


def workplace(weights: Path, folder: Path) -> Workplace:
    agent = AgentOptions(subset=64)
    config = CompareConfig(
        weights=weights, keep_macs=0.5, calibration_images=64, agent=agent, networks=NETWORKS
    )
    folders = [RunFolder(path=folder)]
    return make_workplace(config, load_targets(config), folders, Console(plain=True))


@pytest.mark.parametrize("name", sorted({*SEARCHES} - {"sampler"}))  # which keeps checkpoints
def test_an_interrupted_search_runs_no_network_twice(
    name: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, runs, allowed = Evaluator._measure, [0], 2 * NETWORKS

    def counted(self: Evaluator, mask: ChannelMask, subset: Tensor | None) -> Outcome:
        if runs[0] == allowed:
            raise KeyboardInterrupt
        runs[0] += 1
        return measure(self, mask, subset)

    monkeypatch.setattr(log, "WRITE_EVERY", EVERY)
    monkeypatch.setattr(Evaluator, "_measure", counted)
    (whole,) = choose_job(workplace(weights, tmp_path / "whole"), (0,), name, 0).candidates
    total, allowed, runs[0] = runs[0], min(EVERY + 2, runs[0] - 1), 0
    with pytest.raises(KeyboardInterrupt):
        choose_job(workplace(weights, tmp_path / "killed"), (0,), name, 0)
    allowed, runs[0] = 2 * NETWORKS, 0
    (again,) = choose_job(workplace(weights, tmp_path / "killed"), (0,), name, 0).candidates
    assert runs[0] == total - EVERY
    assert again.mask == whole.mask
    assert again.networks_evaluated == whole.networks_evaluated
    assert again.search_accuracy == whole.search_accuracy
    assert again.seconds > 0.0


def test_a_damaged_log_is_refused(tmp_path: Path) -> None:
    content = '{"search": {}, "outcomes": {"a": {"accuracy": "high"}}}'
    write_text(tmp_path / "log.json", content)
    with pytest.raises(ArtefactError, match=r"log\.json: outcomes\.a\.accuracy"):
        OutcomeLog(tmp_path / "log.json")
