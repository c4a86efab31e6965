"""A pruner of the user's own in a comparison: named as ``package.module:factory``."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from prunegraph.cli.main import main

METHODS = '''
import numpy as np

from prunegraph.methods.method import Result
from prunegraph.core.budget import Budget


class Mine:
    """Tries two products of importances, keeps the better mask."""

    name = "mine"
    powers = (0.5, 2.0)

    def prune(self, problem):
        best = None
        for power in self.powers:
            scores = problem.statistics["l1"] ** power * problem.statistics["activation_mean"]
            mask = problem.project(scores)
            accuracy = problem.evaluator.evaluate(mask).accuracy
            if best is None or accuracy > best[0]:
                best = accuracy, mask
        return Result(mask=best[1])  # what it ran is counted all the same


class Greedy:
    def prune(self, problem):
        for seed in range(40):
            scores = np.random.default_rng(seed).random(problem.graph.num_units)
            mask = problem.project(scores.astype(np.float32))
            problem.evaluator.evaluate(mask)
        return Result(mask=mask)


class Glutton:
    def prune(self, problem):
        return Result(mask=problem.graph.dense_mask())


class Odd:
    def prune(self, problem):
        return problem.graph.dense_mask()


class Nothing:
    pass


class InPlace:
    def prune(self, problem):
        scores = problem.statistics["fpgm"]
        scores *= 2.0
        return Result(mask=problem.project(scores))


class Forgetful:
    def prune(self, problem):
        problem.task.model.train()
        problem.task.model(problem.task.example_inputs)
        return Result(mask=problem.project(problem.statistics["l1"]))


class Own:
    def prune(self, problem):
        return Result(mask=problem.project(problem.statistics["l1"]), networks=30)


class Needy:
    def __init__(self, setting):
        pass


class Misspelt:
    def prune(self, problem):
        return problem.statistics["l3"]


class Unreachable:
    def prune(self, problem):
        scores = np.zeros(problem.graph.num_units, dtype=np.float32)
        return Result(mask=problem.graph.project(scores, Budget(keep_macs=0.001)))
'''


@pytest.fixture
def module(write_module: Callable[[str], str]) -> str:
    return write_module(METHODS)


def words(weights: Path, *methods: str) -> list[str]:
    return [
        *("compare", "--no-agent", "--weights", str(weights), "--methods", *methods),
        *("--seeds", "2", "--networks", "24", "--agent.subset", "64", "--threads", "1"),
        *("--calibration-images", "64", "--finetune-epochs", "0", "--out", "run"),
    ]


def test_it_is_compared_counted_and_verified(module: str, weights: Path) -> None:
    name = f"{module}:Mine"
    assert main(words(weights, name, "l1/uniform")) == 0
    rows = json.loads(Path("run/report.json").read_text())["methods"]
    own = [row for row in rows if row["name"] == name]
    assert [row["seed"] for row in own] == [0, 1]
    assert [row["networks_evaluated"] for row in own] == [2, 2]
    assert main(["verify", "run", "--threads", "1"]) == 0


def test_a_file_of_options_does_not_run_it_by_itself(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = tmp_path / "options.yaml"
    options.write_text(f'methods: ["{module}:Mine"]\n')
    assert main(["compare", "--config", str(options)]) == 2
    assert f"trust it with --methods {module}:Mine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("Greedy", "ran 25 networks where 24 are allowed"),
        ("Glutton", "over the budget"),
        ("Odd", "returned ChannelMask, not a Result: return Result(mask=...)"),
        ("Nothing", "which has no method prune"),
        ("Absent", "has no callable 'Absent'; it has: Mine, Greedy, Glutton, Odd, Nothing"),
        ("InPlace", "ValueError: output array is read-only"),
        ("Forgetful", "prune changed problem.task.model"),
        ("Own", "ran 30 networks where 24 are allowed"),
        ("Needy", "failed: TypeError: Needy.__init__() missing 1 required positional argument"),
        ("Misspelt", "no statistic 'l3'; there are"),
        ("Misspelt", ".py:74)"),
        ("Unreachable", "keep_macs=0.001 cannot be met"),
    ],
)
def test_what_breaks_the_rules_ends_in_one_line(
    attribute: str, message: str, module: str, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(weights, f"{module}:{attribute}")) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1


def test_a_failing_pruner_leaves_what_was_finished(module: str, weights: Path) -> None:
    assert main([*words(weights, "cem", f"{module}:Unreachable"), "--workers", "1"]) == 2
    assert json.loads(Path("run/checkpoints/candidates.json").read_text())
