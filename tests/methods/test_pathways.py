"""Pathways and its controls: exact counts for each language, starts, resume, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError, ConfigError
from prunegraph.core.splits import Dataset
from prunegraph.core.weight_mask import GroupedMask, WeightMask
from prunegraph.layerwise.weights import prunable_weights
from prunegraph.methods.context import Context
from prunegraph.methods.method import Method, Problem, Result
from prunegraph.methods.pathways import (
    LanguageSpecific,
    MaskedTraining,
    OneMask,
    OneMaskByScore,
    OneMaskOfUnion,
    Pathways,
    languages_of,
)
from prunegraph.methods.registry import PATHWAYS, make_method
from prunegraph.tasks.image_classification import ImageClassification
from prunegraph.testing import WeightMethodConformance
from support.speech import tiny_speech, tiny_task

SMALL: dict[str, Any] = {"epochs": 2, "batch_size": 8, "every": 2}
BUDGET = Budget(sparsity=0.8)


def pose(
    seed: int = 0, folder: Path | None = None, budget: Budget = BUDGET, **given: Any
) -> Problem:
    context = Context(task=tiny_task(), structure=None, seed=seed, reconstruct=False)
    return replace(context.problem(budget, folder=folder), **given)


def kept(result: Result) -> list[int]:
    assert isinstance(result.mask, WeightMask)
    return [mask.num_kept for mask in result.mask.groups.values()]


@pytest.mark.parametrize("name", PATHWAYS)
class TestPathways(WeightMethodConformance):
    @pytest.fixture(autouse=True)
    def _choose(self, name: str) -> None:
        self.name = name

    def make_method(self) -> Method:
        return replace(make_method(self.name), **SMALL)  # type: ignore[type-var]

    def make_problem(self, seed: int, max_networks: int) -> Problem:
        del max_networks
        return pose(seed)

    def check_budget(self, problem: Problem, result: Result) -> None:
        """For each language, exactly; the union's control keeps more, and is none to choose."""
        size = sum(weight.size for weight in prunable_weights(problem.task.model).values())
        asked = size - round(0.8 * size)
        if self.name == OneMaskOfUnion.name:
            assert self.make_method().role == "control"
            assert kept(result)[0] > asked
        else:
            assert set(kept(result)) == {asked}


def test_languages_share_some_weights_and_have_others_alone() -> None:
    result = Pathways(**SMALL).prune(pose())
    assert isinstance(result.mask, GroupedMask)
    told = result.details["groups"]
    assert told["active"] == pytest.approx(0.2, abs=1e-3)
    assert told["active"] < told["stored"] == result.mask.density < 0.4
    assert 0.0 < told["overlap"] < 1.0
    assert set(told["scores"]) == {"ab", "xy"}
    union = OneMaskOfUnion(**SMALL).prune(pose())
    assert kept(union) == [result.mask.num_kept]


def test_the_unions_control_begins_as_the_pathways_of_its_run() -> None:
    random = Pathways(**SMALL, start="random", reselect=True).prune(pose())
    union = OneMaskOfUnion(**SMALL, start="random", reselect=True).prune(pose())
    assert kept(union) == [random.mask.num_kept]
    with pytest.raises(ConfigError, match="give reselect as well"):
        OneMaskOfUnion(start="random")
    for kind in (OneMaskByScore, OneMaskOfUnion):
        with pytest.raises(ConfigError, match=r"emphasis=-1\.0 must be at least 0"):
            kind(emphasis=-1.0)


def test_the_network_of_a_language_is_the_shared_one_with_its_mask() -> None:
    problem = pose()
    result = Pathways(**SMALL).prune(problem)
    assert result.model is not None
    assert isinstance(result.mask, GroupedMask)
    task = tiny_task()
    scores = task.group_scores(result.model)
    for name, mask in result.mask.groups.items():
        alone = mask.apply(result.model)
        assert task.group_scores(alone)[name] == scores[name]
    assert scores == result.details["groups"]["scores"]


@pytest.mark.parametrize("start", ["magnitude", "random"])
def test_masks_that_begin_at_the_final_sparsity_adapt(start: Any) -> None:
    method = Pathways(**SMALL, start=start, reselect=True)
    first = method.plan(pose()).masks
    assert isinstance(first, dict)
    result = method.prune(pose())
    assert isinstance(result.mask, GroupedMask)
    assert {m.num_kept for m in first.values()} == set(kept(result))
    for name, mask in result.mask.groups.items():
        assert mask.overlap(first[name]) < 1.0
    history = result.details["groups"]["history"]
    assert history[0][0] > 0  # the first steps train with the masks that they begin with
    assert {row[1] for row in history} == {result.mask.groups["ab"].density}


@pytest.mark.parametrize("batch_size", [7, 10, 13, 20, 30, 40])
def test_the_last_choice_is_of_the_sparsity_that_is_asked_for(batch_size: int) -> None:
    task = tiny_task()
    for epochs in (1, 2, 3):
        method = OneMask(epochs=epochs, batch_size=batch_size)
        plan = method.rising(task, 0.8)
        assert plan.schedule is not None
        assert plan.until is not None
        steps = epochs * -(-len(task.train) // batch_size)
        choices = range(0, min(plan.until, steps), plan.every)
        assert plan.schedule(choices[-1]) == 0.8
    with pytest.raises(ConfigError, match="1 step on 80 utterances, and needs 2"):
        OneMask(epochs=1, batch_size=80).rising(task, 0.8)


def test_one_language_alone_gets_a_plain_mask() -> None:
    task = tiny_task()
    own = replace(task, **{n: getattr(task, n).take(torch.arange(10)) for n in ("train", "search")})
    assert list(languages_of(own)) == ["ab"]
    result = Pathways(**SMALL).prune(pose(task=own))
    assert not isinstance(result.mask, GroupedMask)
    assert result.details["groups"]["overlap"] == 1.0


@pytest.mark.parametrize("name", ["language_masks", "one_mask_of_union"])
def test_progress_of_several_trainings_rises_to_a_hundred_once(name: str) -> None:
    told: list[int] = []
    method = replace(make_method(name), **SMALL)  # type: ignore[type-var]
    method.prune(pose(progress=lambda percent, _: told.append(percent)))
    assert told == sorted(told)
    assert told.count(100) == 1


@pytest.mark.parametrize("name", ["pathways", "language_masks"])
def test_a_method_that_is_stopped_goes_on_to_the_same_result(tmp_path: Path, name: str) -> None:
    class Stop(Exception):
        pass

    def stop(percent: int, _: str) -> None:
        if percent == 50:
            raise Stop

    method = replace(make_method(name), **{**SMALL, "epochs": 4})  # type: ignore[type-var]
    wanted = method.prune(pose())
    with pytest.raises(Stop):
        method.prune(pose(folder=tmp_path, progress=stop))
    assert list(tmp_path.iterdir())
    found = method.prune(pose(folder=tmp_path))
    assert found.mask == wanted.mask
    assert found.model is not None
    assert wanted.model is not None
    for key, value in wanted.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[key], value)


def test_what_cannot_be_served_is_refused(digits: Dataset) -> None:
    method = Pathways(**SMALL)
    for budget in (Budget(pattern="2:4"), Budget(keep_macs=0.5)):
        with pytest.raises(BudgetError, match="sparsity"):
            method.check(pose(budget=budget))
    with pytest.raises(BudgetError, match=r"sparsity=0\.9999 leaves none of 4,928 weights: give"):
        OneMaskOfUnion(**SMALL).prune(pose(budget=Budget(sparsity=0.9999)))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    images = ImageClassification(
        model=model,
        example_inputs=torch.zeros(1, 1, 8, 8),
        train=digits.train,
        search=digits.search,
    )
    with pytest.raises(ConfigError, match="batches that know their language"):
        method.check(pose(task=images))
    task = tiny_task()
    sparse = replace(task, model=Pathways(**SMALL).prune(pose(budget=Budget(sparsity=0.9))).model)
    with pytest.raises(BudgetError, match=r"are zero already, sparsity=0\.5 asks"):
        method.check(pose(task=sparse, budget=Budget(sparsity=0.5)))
    odd: dict[str, Any]
    for odd, message in (
        ({"start": "lottery"}, "none of one, magnitude, random"),
        ({"start": "random"}, "give reselect as well"),
        ({"emphasis": -1.0}, "emphasis=-1.0 must be at least 0"),
        ({"every": 0}, "every=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 2"),
        ({"lr": -1.0}, r"lr=-1\.0 must be positive"),
    ):
        with pytest.raises(ConfigError, match=message):
            Pathways(**odd)
    with pytest.raises(ConfigError, match="epochs=1 is too few for language_masks"):
        LanguageSpecific(epochs=1)
    with pytest.raises(ConfigError, match="epochs=1 is too few for pathways"):
        Pathways(epochs=1, start="magnitude", reselect=True)
    with pytest.raises(ConfigError, match="1 step on 80 utterances, and needs 2"):
        OneMask(epochs=1, batch_size=80).check(pose())


def test_every_row_is_made_by_name_and_trains_alike() -> None:
    made = [make_method(name) for name in PATHWAYS]
    assert all(isinstance(method, MaskedTraining) for method in made)
    assert {(m.epochs, m.batch_size, m.lr, m.every) for m in made} == {(8, 32, 2e-3, 20)}  # type: ignore[attr-defined]
    assert set(Pathways.beside) <= set(PATHWAYS)
    assert tiny_speech().languages == ("ab", "xy")
