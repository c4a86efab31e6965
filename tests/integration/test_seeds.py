"""Searches of other seeds share the measure, not the luck of one start."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunegraph.cli.main import main
from prunegraph.core.masks import FloatArray
from prunegraph.methods import context as context_module
from prunegraph.methods.criteria.taylor import measure
from prunegraph.runs.context import RunContext
from prunegraph.runs.options.compare import CompareConfig
from prunegraph.runs.tasks.registry import load_target


@pytest.fixture
def context(weights: Path) -> RunContext:
    options = CompareConfig(weights=weights, calibration_images=256, keep_macs=0.4)
    return RunContext(target=load_target(options, options.budget()), options=options, seed=0)


def test_another_seed_measures_other_images_and_judges_masks_alike(context: RunContext) -> None:
    own, other = (context.measures.problem(context.budget, seed=seed) for seed in (0, 1))
    assert not np.allclose(other.statistics["taylor"], own.statistics["taylor"])
    assert other.priors()[0].divergence != own.priors()[0].divergence
    mask = own.project(own.statistics["l1"])
    assert other.evaluator.evaluate(mask).loss == own.evaluator.evaluate(mask).loss
    assert other.evaluator.reconstruction is own.evaluator.reconstruction
    quick = own.evaluator.quick_reconstruction
    assert other.evaluator.quick_reconstruction is quick is not None


def test_the_seed_of_the_run_measures_what_the_run_measures(context: RunContext) -> None:
    assert (
        context.measures.problem(context.budget, seed=0).statistics is context.measures.statistics
    )
    other = context.measures.problem(context.budget, seed=1)
    assert other.statistics is context.measures.problem(context.budget, seed=1).statistics
    assert other.unlabelled is context.measures.problem(context.budget, seed=1).unlabelled


def test_every_search_of_a_comparison_has_a_start_of_its_own(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def noted(*networks: Any, seed: int, **options: Any) -> Mapping[str, FloatArray]:
        measured.append(seed)
        return measure(*networks, seed=seed, **options)

    monkeypatch.setattr(context_module, "measure", noted)
    words = [
        *("compare", "--weights", str(weights), "--methods", "cem", "sampler", "l1/uniform"),
        *("--seeds", "2", "--networks", "24", "--agent.update-size", "4", "--agent.subset", "64"),
        *("--agent.surrogate-steps", "2", "--agent.distill-steps", "1", "--workers", "1"),
        *("--calibration-images", "64", "--finetune-epochs", "0"),
        *("--threads", "1", "--out", str(tmp_path / "run")),
    ]
    assert main(words) == 0
    counts: Mapping[int, int] = {seed: measured.count(seed) for seed in measured}
    assert counts == {0: 1, 1: 1}  # all searches of a seed share its own
