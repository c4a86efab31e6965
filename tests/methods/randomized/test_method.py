"""Levels of masks: nested, of equal steps, resumed, selected on rows of their own, refused."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ArtefactError, BudgetError, ConfigError
from prunegraph.core.splits import Dataset, TestSplit
from prunegraph.core.weight_mask import WeightMask
from prunegraph.methods.context import Context
from prunegraph.methods.method import Problem
from prunegraph.methods.obs.magnitude import magnitude_mask
from prunegraph.methods.randomized import run
from prunegraph.methods.randomized.method import Levels, Randomized, levels_to
from prunegraph.methods.registry import RANDOMIZED, make_method
from prunegraph.tasks.image_classification import ImageClassification
from prunegraph.training.loop import finetune
from support.tasks import language_task

SMALL: dict[str, Any] = {"candidates": 3, "early": 2, "steps": 5, "batch_size": 16, "lr": 5e-3}


def make_task(digits: Dataset) -> ImageClassification:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10)]
    return ImageClassification(
        model=nn.Sequential(nn.Flatten(), *layers).eval(),
        example_inputs=torch.zeros(1, 1, 8, 8),
        train=digits.train.take(torch.arange(60)),
        search=digits.search.take(torch.arange(50)),
    )


def pose(digits: Dataset, seed: int = 0, folder: Path | None = None, **given: Any) -> Problem:
    task = given.pop("task", None) or make_task(digits)
    context = Context(task=task, structure=None, seed=seed, reconstruct=False)
    budget = Budget(sparsity=0.9) if "budget" not in given else given.pop("budget")
    return replace(context.problem(budget, folder=folder), **given)


def small(name: str) -> Levels:
    method = make_method(name)
    assert isinstance(method, Levels)
    return replace(method, **SMALL)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[WeightMask, int, str]]]:
    """Note the mask and the samples of every training, and which samples they are."""
    seen: list[tuple[WeightMask, int, str]] = []

    def noting(model: nn.Module, task: Any, config: Any, **given: Any) -> Any:
        mask = given["masks"].masks
        seen.append((mask, len(task.train), task.train.fingerprint()))
        return finetune(model, task, config, **given)

    monkeypatch.setattr(run, "finetune", noting)
    yield seen


@pytest.mark.parametrize("name", RANDOMIZED)
def test_levels_are_nested_and_all_rows_have_equal_steps(
    name: str, digits: Dataset, trainings: list[tuple[WeightMask, int, str]]
) -> None:
    problem = pose(digits)
    result = small(name).prune(problem)
    assert isinstance(result.mask, WeightMask)
    assert result.model is not None
    result.mask.check_zeros(result.model)
    several = name in ("randomized", "randomized_shares")
    assert result.networks == (9 if several else 0)
    chosen = {mask.sparsity: mask for mask, *_ in trainings}  # the last of a level is the chosen
    assert [round(sparsity, 2) for sparsity in sorted(chosen)] == [0.54, 0.83, 0.9]
    first, second, third = (chosen[sparsity] for sparsity in sorted(chosen))
    assert third == result.mask
    assert third.nested(second)
    assert second.nested(first)
    own = trainings if not several else [*trainings[:8], *trainings[8:11], trainings[-1]]
    assert sum(count for _, count, _ in own) == 3 * (3 * 2 + 5) * 16
    assert ("selection" in result.details) == several


def test_candidates_are_of_one_level_and_learn_from_the_same_samples(
    digits: Dataset, trainings: list[tuple[WeightMask, int, str]]
) -> None:
    small("randomized").prune(pose(digits))
    early = trainings[:3]
    assert len({mask.digest() for mask, *_ in early}) == 3
    assert len({samples for *_, samples in early}) == 1
    last = trainings[-3:]
    assert len({mask.digest() for mask, *_ in last}) == 3  # all are trained to the end
    assert len({samples for *_, samples in last}) == 1


def test_the_record_tells_whether_early_losses_foretell_the_final_ones(digits: Dataset) -> None:
    record = small("randomized_shares").prune(pose(digits)).details["selection"]
    assert record["levels"] == [0.54, 0.83, 0.9]
    assert [len(losses) for losses in record["early"]] == [3, 3, 3]
    assert -1.0 <= record["rank_correlation"] <= 1.0
    chosen = min(range(3), key=record["early"][-1].__getitem__)
    assert record["gain"][-1] == record["final"][chosen]
    assert record["gain"][0] == pytest.approx(sum(record["final"]) / 3)
    few = replace(small("randomized"), candidates=2).prune(pose(digits)).details["selection"]
    assert few["rank_correlation"] is None


def test_candidates_are_judged_on_search_samples_of_their_own(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = replace(make_task(digits), test=TestSplit(digits.train.source, torch.tensor([10**9])))
    rows: list[set[int]] = []

    def noting(self: ImageClassification, split: Any, size: int, **given: Any) -> Any:
        rows.append(set(split.index.tolist()))
        return split.batches(size)

    monkeypatch.setattr(ImageClassification, "batches", noting)
    small("randomized").prune(pose(digits, task=task))
    first, last = rows[0], rows[-1]
    assert first.isdisjoint(last)
    assert first | last == set(task.search.index.tolist())
    assert rows.count(last) == 3  # final losses
    assert set(map(frozenset, rows)) == {frozenset(first), frozenset(last)}


def test_without_early_steps_candidates_are_judged_as_they_are(
    digits: Dataset, trainings: list[tuple[WeightMask, int, str]]
) -> None:
    replace(small("randomized"), early=0).prune(pose(digits))
    assert len(trainings) == 3 + 2


def test_one_candidate_of_many_draws_is_the_control(digits: Dataset) -> None:
    given = {**SMALL, "candidates": 1}
    own = Randomized(**given, draws=2**62).prune(pose(digits))
    control = replace(small("randomized_magnitude"), candidates=1).prune(pose(digits))
    assert own.mask == control.mask
    model = make_task(digits).model
    first = small("randomized_magnitude")._candidate(
        model, WeightMask({n: torch.ones_like(b) for n, b in own.mask.keep.items()}), 0.54
    )
    assert first(None) == magnitude_mask(model, Budget(sparsity=0.54))


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["randomized", "randomized_magnitude"])
def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_result(
    name: str, digits: Dataset, tmp_path: Path
) -> None:
    method, steps = small(name), []
    whole = method.prune(pose(digits, progress=lambda done, _: steps.append(done)))
    assert steps == sorted(steps)
    assert steps[-1] == 100
    resumed = None
    for number in range(len(steps)):

        def stop(*_: object) -> None:
            raise Stop

        with pytest.raises(Stop):  # after each step in turn: none is done twice
            method.prune(pose(digits, folder=tmp_path, progress=stop))
        assert (tmp_path / f"{name}.safetensors").is_file(), number
    resumed = method.prune(pose(digits, folder=tmp_path))
    assert resumed.mask == whole.mask
    assert resumed.details == whole.details
    assert resumed.model is not None
    assert whole.model is not None
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key])
    for other in (pose(digits, seed=1, folder=tmp_path), pose(digits, folder=tmp_path)):
        changed = method if other.seed else replace(method, steps=7)
        with pytest.raises(ArtefactError, match="another run"):
            changed.prune(other)
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtefactError):
        method.prune(pose(digits, folder=tmp_path))


def test_a_task_whose_score_looks_at_data_of_its_own(digits: Dataset) -> None:
    problem = pose(digits, task=language_task(), budget=Budget(sparsity=0.8))
    result = small("randomized").prune(problem)
    assert isinstance(result.mask, WeightMask)
    assert result.mask.sparsity == pytest.approx(0.8, abs=1e-3)


def test_a_network_that_is_sparse_already_is_pruned_further(digits: Dataset) -> None:
    task = make_task(digits)
    half = magnitude_mask(task.model, Budget(sparsity=0.6))
    sparse = replace(task, model=half.apply(task.model))
    result = small("randomized").prune(pose(digits, task=sparse))
    assert isinstance(result.mask, WeightMask)
    assert result.mask.nested(half)
    with pytest.raises(BudgetError, match="zero already") as refused:
        small("randomized").check(pose(digits, task=sparse, budget=Budget(sparsity=0.5)))
    assert "\n" not in str(refused.value)


def test_levels() -> None:
    assert levels_to(Budget(sparsity=0.9375), 0.0) == (0.54, 0.83, 0.92, 0.9375)
    assert levels_to(Budget(sparsity=0.9), 0.0) == (0.54, 0.83, 0.9)
    assert levels_to(Budget(sparsity=0.99), 0.6) == (0.83, 0.92, 0.9375, 0.99)
    assert levels_to(Budget(sparsity=0.3), 0.0) == (0.3,)


@pytest.mark.parametrize(
    "given",
    [
        {"candidates": 0},
        {"early": -1},
        {"steps": 0},
        {"batch_size": 1},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"distill": 1.5},
    ],
)
def test_options_out_of_range_are_refused(given: dict[str, Any]) -> None:
    for name in RANDOMIZED:
        with pytest.raises(ConfigError, match=f"{next(iter(given))}=") as refused:
            replace(small(name), **given)
        assert "\n" not in str(refused.value)


def test_what_cannot_be_served_is_refused_before_any_work(digits: Dataset) -> None:
    for given in ({"draws": 0}, {"exponent": -1.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(given))}="):
            Randomized(**given)
    with pytest.raises(ConfigError, match="spread="):
        replace(make_method("randomized_shares"), spread=-1.0)
    for budget in (Budget(keep_macs=0.5), Budget(pattern="2:4")):
        with pytest.raises(BudgetError, match="sparsity"):
            small("randomized").check(pose(digits, budget=budget))
    with pytest.raises(BudgetError, match="without a weight"):
        small("randomized").check(pose(digits, budget=Budget(sparsity=0.9995)))


def test_identities_hold_every_option() -> None:
    assert {"candidates", "draws", "exponent", "lr"} <= asdict(Randomized()).keys()
