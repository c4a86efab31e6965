"""A comparison of baselines alone: no agent, the report is about the best of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunegraph.errors import ConfigError
from prunegraph.experiment import compare
from prunegraph.experiment.bench import Bench
from prunegraph.experiment.candidates import Candidate, choose
from prunegraph.experiment.cells import RULES, plan_cells
from prunegraph.experiment.cli import main
from prunegraph.experiment.compare_config import CompareConfig
from prunegraph.experiment.setup import load_target
from prunegraph.types import KeepMask

METHODS = ("cem", "random_search", "taylor/uniform", "l1/uniform")


@pytest.fixture(scope="module")
def compared(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("baselines") / "run"
    words = [
        *("compare", "--no-agent", "--weights", str(weights), "--methods", *METHODS),
        *("--seeds", "2", "--networks", "24", "--subset", "64", "--threads", "1"),
        *("--calibration-images", "64", "--finetune-epochs", "1", "--finetune-best"),
    ]
    assert main([*words, "--out", str(path)]) == 0
    return path


def test_the_report_is_about_the_best_baseline(compared: Path) -> None:
    report = json.loads((compared / "report.json").read_text())
    rows = report["methods"]
    assert {row["name"] for row in rows} == {*METHODS, "dense"}
    searched = {
        name: np.mean([row["search_accuracy"] for row in rows if row["name"] == name])
        for name in METHODS
    }
    best = max(searched, key=lambda name: searched[name])
    tuned = {row["name"] for row in rows if row["test_accuracy_finetuned"] is not None}
    assert tuned == {best, "dense"}
    own = [row for row in rows if row["digest"] == report["pruned"]["mask_digest"]]
    assert best in {row["name"] for row in own}
    assert report["pruned"]["test_accuracy_finetuned"] is not None
    assert report["search"] is None
    assert report["verdict"] is None
    assert "rows of the agent" in report["verdict_reason"]
    page = (compared / "report.html").read_text()
    assert f"Pruned = {best}" in page
    assert "What the search cost" not in page
    assert not (compared / "policy.json").exists()


def test_it_is_verified_exported_and_shown_again(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(compared), "--threads", "1"]) == 0
    report = json.loads((compared / "report.json").read_text())
    digest = report["pruned"]["mask_digest"]
    cells = [row["cell"] for row in report["methods"] if row["digest"] == digest]
    cell = next(filter(None, cells))
    out = tmp_path / "pruned.pt2"
    assert (
        main(["export", str(compared / cell), "--format", "torch-export", "--out", str(out)]) == 0
    )
    capsys.readouterr()
    assert main(["compare", "--config", str(compared / "config.yaml"), "--out", str(compared)]) == 0
    assert "is finished" in capsys.readouterr().out


def test_its_plan_counts_no_agent(weights: Path) -> None:
    options = CompareConfig(
        weights=weights, agent=False, methods=METHODS, seeds=2, networks=16, finetune_epochs=1
    )
    bench = Bench(target=load_target(options, options.budget()), options=options, seed=0)
    plan = compare.make_plan(bench, options)
    assert plan.searches == 2 * 2
    assert plan.finetunes == 2 * len((*METHODS, "dense"))
    alone = compare.make_plan(bench, replace(options, finetune_best=True))
    assert alone.finetunes == 2 * len(("the best", "dense"))


def candidate(name: str, seed: int, accuracy: float) -> Candidate:
    return Candidate(
        name=name,
        seed=seed,
        mask=KeepMask(np.ones(1, dtype=bool)),
        networks_evaluated=0,
        search_accuracy=accuracy,
    )


def planned(weights: Path, found: list[Candidate], rules: int = RULES, **more: Any) -> set[str]:
    options = CompareConfig(weights=weights, seeds=3, finetune_epochs=1, **more)
    bench = Bench(target=load_target(options, options.budget()), options=options, seed=0)
    cells = plan_cells(bench, found, options, rules)
    assert len(cells) == len({(cell.name, cell.seed) for cell in cells})
    return {cell.name for cell in cells}


@pytest.mark.parametrize("seeds", [None, 3])
def test_heuristics_alone_are_finetuned(seeds: int | None, weights: Path) -> None:
    found = [candidate("l1/uniform", 0, 0.6), candidate("fpgm/uniform", 0, 0.7)]
    options = {"agent": False, "finetune_seeds": seeds}
    assert planned(weights, found, **options) == {"l1/uniform", "fpgm/uniform", "dense"}
    assert planned(weights, found, **options, finetune_best=True) == {"fpgm/uniform", "dense"}


@pytest.mark.parametrize("best", [False, True])
def test_the_start_of_the_search_is_finetuned_if_no_baseline_is_better(
    best: bool, weights: Path
) -> None:
    found = [
        *(candidate("agent/best", seed, 0.9) for seed in range(3)),
        *(candidate("cem", seed, 0.6) for seed in range(3)),
        candidate("untrained", 0, 0.8),
        candidate("initial", 0, 0.7),
    ]
    names = planned(weights, found, finetune_best=best)
    assert names == {"agent/best", "untrained", "dense"} | (set() if best else {"cem"})
    assert planned(weights, found, rules=1, finetune_best=best) == {"agent/best", "cem", "dense"}
    worse = [*found[:6], candidate("untrained", 0, 0.5)]
    assert planned(weights, worse, finetune_best=best) == {"agent/best", "cem", "dense"}


def test_the_best_baseline_is_the_best_on_average() -> None:
    found = [candidate("cem", 0, 0.9), candidate("cem", 1, 0.2), candidate("l1/uniform", 0, 0.6)]
    assert choose(found).name == "l1/uniform"
    found.append(candidate("agent/best", 3, 0.1))
    assert choose(found).name == "agent/best"
    steady = [candidate("cem", seed, 0.7) for seed in (2, 1)]
    assert choose([*steady, candidate("l1/uniform", 0, 0.6)]).seed == 1


def test_of_equal_heuristics_older_reports_fine_tuned_the_last(weights: Path) -> None:
    found = [candidate("agent/best", 0, 0.9), candidate("cem", 0, 0.8)]
    found += [candidate(f"{name}/uniform", 0, 0.7) for name in ("l2", "lamp")]
    tuned = [planned(weights, found, rules) & {"l2/uniform", "lamp/uniform"} for rules in (1, 2)]
    assert tuned == [{"lamp/uniform"}, {"l2/uniform"}]


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is left to compare"):
        CompareConfig(agent=False, methods=())


def test_a_policy_without_an_agent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-agent"):
        CompareConfig(agent=False, policy=tmp_path)
