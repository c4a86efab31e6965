"""Statistics, reconstruction, recalibration, scores and training of tasks that classify no images.

A toy language model, whose score is a perplexity, and a segmentation, whose score is an error.
"""

import copy
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ArtefactError, DataError
from prunegraph.core.masks import ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.core.splits import SearchSplit, TrainSplit
from prunegraph.core.task import Scores, Task
from prunegraph.evaluation.evaluator import Evaluator, metric_of
from prunegraph.evaluation.log import WRITE_EVERY, OutcomeLog
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.apply import apply_mask
from prunegraph.layerwise.recalibrate import recalibrate_bn
from prunegraph.layerwise.reconstruct import Reconstruction
from prunegraph.layerwise.sequential import LayerwiseReconstruction
from prunegraph.methods.allocation import sensitivity
from prunegraph.methods.criteria.measured import costly_names, measure_costly
from prunegraph.methods.criteria.taylor import STATISTIC_NAMES, measure
from prunegraph.methods.prior import measure_divergence
from prunegraph.tasks.custom import CustomTask
from prunegraph.training.distributed import Ranks
from prunegraph.training.loop import FinetuneConfig, finetune
from support.tasks import language_task, segmentation_task, texts

Case = tuple[CustomTask, StructureGraph]


@pytest.fixture(scope="module", params=[language_task, segmentation_task])
def case(request: pytest.FixtureRequest) -> Case:
    torch.set_num_threads(1)
    task = request.param()
    return task, analyse(task.model, task.example_inputs)


def masks(graph: StructureGraph, count: int = 4, keep: float = 0.7) -> list[ChannelMask]:
    scores = np.random.default_rng(0).random((count, graph.num_units)).astype(np.float32)
    return [graph.project(row, Budget(keep_macs=keep)) for row in scores]


def test_an_error_is_never_maximised(case: Case) -> None:
    task, graph = case
    evaluator = Evaluator(task, graph)
    chosen = [graph.dense_mask(), *masks(graph), *masks(graph, 2, 0.4)]
    outcomes = evaluator.evaluate_all(chosen)
    errors = [task.score(evaluator.prune(mask)).value for mask in chosen]
    by_rank = sorted(range(len(chosen)), key=lambda place: outcomes[place].rank)
    assert [errors[place] for place in by_rank] == sorted(errors, reverse=True)
    assert outcomes[0].accuracy == max(found.accuracy for found in outcomes)
    assert all(0.0 <= found.accuracy <= 1.05 for found in outcomes)
    assert max(errors) > 1.5 * errors[0]


def test_a_mask_is_run_once_whatever_the_subset(case: Case) -> None:
    task, graph = case
    evaluator = Evaluator(task, graph)
    mask = masks(graph)[0]
    first = evaluator.evaluate(mask, evaluator.draw_subset(10, seed=0))
    assert evaluator.evaluate(mask) is first
    assert evaluator.is_cached(mask)
    assert (evaluator.num_networks, evaluator.num_samples) == (1, 0)


def test_the_divergence_is_the_fall_of_the_utility(case: Case) -> None:
    task, graph = case
    mask = masks(graph)[0]
    found = Evaluator(task, graph, metric="kl").evaluate(mask)
    dense = task.dense_score.relative_to(task.dense_score)
    assert found.kl == pytest.approx(dense - found.accuracy)
    assert Evaluator(task, graph).evaluate(mask).kl is None
    judge = Evaluator(task, graph, metric="kl")
    assert measure_divergence(judge, mask) == found.kl
    gains = sensitivity(judge, graph, measure(task, graph)["taylor"])
    assert gains.max() > 0.0


def test_a_log_is_of_one_search(case: Case, tmp_path: Path) -> None:
    task, graph = case
    identity = {"budget": Budget(keep_macs=0.5).as_dict(), "seed": 0}
    chosen = masks(graph, WRITE_EVERY)
    log = OutcomeLog(tmp_path / "log.json", identity)
    first = Evaluator(task, graph, log=log).evaluate_all(chosen)
    log.write()
    again = Evaluator(task, graph, log=OutcomeLog(tmp_path / "log.json", identity))
    again._measure = None  # type: ignore[assignment, method-assign]
    assert again.evaluate_all(chosen) == first
    assert again.recalled == pytest.approx(again.seconds)
    with pytest.raises(ArtefactError, match="of a search with seed 0, not 1: give another"):
        OutcomeLog(tmp_path / "log.json", {**identity, "seed": 1})


def test_statistics_find_what_can_leave(case: Case) -> None:
    task, graph = case
    before = copy.deepcopy(task.model.state_dict())
    statistics = measure(task, graph)
    assert tuple(statistics) == STATISTIC_NAMES
    assert all(np.isfinite(values).all() for values in statistics.values())
    taylor = statistics["taylor"]
    assert (taylor[graph.free] > 0.0).all()
    evaluator = Evaluator(task, graph)
    kept, lost = (
        evaluator.evaluate(graph.project((sign * taylor).astype(np.float32), Budget(keep_macs=0.6)))
        for sign in (1.0, -1.0)
    )
    assert kept.accuracy > lost.accuracy + 0.05
    after = task.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(item.grad is not None for item in task.model.parameters())


@pytest.mark.parametrize("name", costly_names())
def test_costly_statistics_take_any_task(case: Case, name: str) -> None:
    task, graph = case
    values = measure_costly(name, task, graph, num_samples=64)
    assert np.isfinite(values).all()
    assert not values[graph.frozen].any()
    maps_are_columns = name == "hrank" and not any(op.kind == "conv" for op in graph.ops)
    assert (values[graph.free].std() == 0.0) == maps_are_columns


@pytest.mark.parametrize("kind", [Reconstruction, LayerwiseReconstruction])
def test_reconstruction_brings_the_score_back(case: Case, kind: type[Reconstruction]) -> None:
    task, graph = case
    fitted = kind.on_samples(task, graph, task.train)
    plain, better = Evaluator(task, graph), Evaluator(task, graph, reconstruction=fitted)
    whole = plain.evaluate(graph.dense_mask()).accuracy
    before, after = (
        sum(whole - found.accuracy for found in evaluator.evaluate_all(masks(graph, keep=0.6)))
        for evaluator in (plain, better)
    )
    assert after < 0.8 * before


def test_the_nearest_network_is_the_better_one_and_no_way_need_succeed(case: Case) -> None:
    task, graph = case
    mask, evaluator = masks(graph)[0], Evaluator(task, graph)
    plain = task.score(evaluator.prune(mask)).value

    def fail() -> Reconstruction:
        msg = "out of memory"
        raise RuntimeError(msg)

    def fit() -> Reconstruction:
        return LayerwiseReconstruction.on_samples(task, graph, task.train)

    assert task.score(evaluator.nearest(mask, fail, fit)).value < plain
    with pytest.warns(UserWarning, match="not reconstructed layer by layer: .*out of memory"):
        assert task.score(evaluator.nearest(mask, fail)).value == plain


def test_norms_are_recalibrated_by_the_forwards_of_the_loss() -> None:
    task = segmentation_task()
    graph = analyse(task.model, task.example_inputs)
    mask = masks(graph)[0]
    found = Evaluator(task, graph).prune(mask)
    expected = apply_mask(task.model, graph, mask)
    recalibrate_bn(expected, [images for images, _ in task.train.batches(64)])
    torch.testing.assert_close(found.state_dict(), expected.state_dict())
    assert not torch.allclose(
        found[1].running_var, apply_mask(task.model, graph, mask)[1].running_var
    )


def pruned(case: Case) -> nn.Module:
    task, graph = case
    return Evaluator(task, graph).prune(masks(graph)[0])


CONFIG = FinetuneConfig(epochs=6, peak_lr=0.05)


def test_a_pruned_network_is_trained_by_the_tasks_loss(case: Case, tmp_path: Path) -> None:
    task, _ = case
    network = pruned(case)
    before, again = task.score(network).value, copy.deepcopy(network)
    result = finetune(network, task, CONFIG, seed=0)
    assert len(result.losses) == 6
    assert result.losses[-1] < result.losses[0]
    assert task.score(network).value < before

    def stop(done: int, *_: float) -> None:
        if done == 2:
            raise KeyboardInterrupt

    path, resumed = tmp_path / "training.safetensors", copy.deepcopy(again)
    with pytest.raises(KeyboardInterrupt):
        finetune(again, task, CONFIG, seed=0, checkpoint=path, progress=stop)
    assert finetune(resumed, task, CONFIG, seed=0, checkpoint=path).resumed_epochs == 2
    ends = network.state_dict(), resumed.state_dict()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_network_learns_from_the_outputs_of_the_dense_one(case: Case) -> None:
    task, _ = case
    network, batch = pruned(case), next(task.batches(task.train, 64))
    config = FinetuneConfig(epochs=20, peak_lr=0.05, distill_weight=1.0)

    def distance() -> float:
        with torch.no_grad():
            outputs = (task.forward(each, batch) for each in (network, task.model))
            return float(task.divergence(*outputs))

    before = distance()
    finetune(network, task, config, seed=0, teacher=task.model)
    assert distance() < 0.7 * before


def test_a_score_that_is_no_number_ends_no_search(case: Case) -> None:
    task, graph = case
    answers: list[float] = []

    def score(network: nn.Module) -> float:
        answers.append(math.nan if answers else 38.0)
        return answers[-1]

    broken = dataclasses.replace(task, score_function=score)
    outcome = Evaluator(broken, graph).evaluate(masks(graph)[0])
    assert outcome.accuracy == -1.0
    assert math.isfinite(outcome.loss)


class Tokens:
    """Sequences in memory, loaded by position as named tensors."""

    def __init__(self, sequences: Tensor) -> None:
        self.sequences = sequences

    def load(self, index: Tensor, augment: torch.Generator | None = None) -> dict[str, Tensor]:
        del augment
        return {"input_ids": self.sequences[index], "place": index}

    def fingerprint(self) -> str:
        return "tokens"


class LanguageTask(CustomTask):
    """A language model that is scored on a search split: what a built-in task would be."""

    search = SearchSplit(Tokens(texts(200, seed=1)), torch.arange(200))  # type: ignore[misc]

    def dense_outputs(self, model: nn.Module, batches: Any, *, autocast: bool) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.forward(model, batch)["logits"][:, -1] for batch in batches])

    def measure(
        self, model: nn.Module, batches: Any, *, autocast: bool, dense_outputs: Any = None
    ) -> Scores:
        losses, divergences, places = [], [], []
        for batch in batches:
            own = self.dense_outputs(model, [batch], autocast=autocast)
            losses.append(float(self.loss(model, batch).detach()) * len(own))
            if dense_outputs is not None:
                dense, dense_outputs = dense_outputs[: len(own)], dense_outputs[len(own) :]
                divergences.append((own - dense).square().sum().item())
            places.append(batch["place"])
        count = len(torch.cat(places))
        kl = sum(divergences) / count if divergences else None
        loss = sum(losses) / count
        return Scores(accuracy=math.exp(-loss), loss=loss, kl=kl, soft_accuracy=None)


def test_a_task_of_named_tensors_is_scored_on_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    own = language_task()
    fields = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
    fields["train"] = TrainSplit(Tokens(texts(100, seed=0)), torch.arange(100))
    task = LanguageTask(**fields)
    graph = analyse(task.model, task.example_inputs)
    mask, dense = masks(graph)[0], graph.dense_mask()

    def outcomes() -> list[Outcome]:
        evaluator = Evaluator(task, graph, metric="kl", batch_size=64)
        subset = evaluator.draw_subset(30, seed=0)
        assert evaluator.num_samples == 200
        given = ((dense, None), (mask, None), (mask, subset), (mask, torch.arange(200)))
        return [evaluator.evaluate(*pair) for pair in given]

    whole, pruned_, few, again = outcomes()
    assert whole.kl == pytest.approx(0.0, abs=1e-9)
    assert (pruned_.kl or 0.0) > 0.01
    assert (few.num_images, pruned_.num_images) == (30, 200)
    assert few.loss != pruned_.loss
    assert again is pruned_
    assert pruned_.accuracy < whole.accuracy
    monkeypatch.setattr("prunegraph.evaluation.evaluator.PRELOAD_LIMIT", 0)
    assert [found.loss for found in outcomes()] == pytest.approx(
        [whole.loss, pruned_.loss, few.loss, pruned_.loss]
    )
    assert len(measure(task, graph, num_samples=50, batch_size=20)) == len(STATISTIC_NAMES)
    result = finetune(pruned((task, graph)), task, FinetuneConfig(epochs=1, batch_size=48), seed=0)
    assert len(result.losses) == 1


def test_ranks_share_batches_of_any_form() -> None:
    batch = {"input_ids": torch.arange(10).view(5, 2), "rest": (torch.arange(5), 3)}
    first, second = (Ranks(rank=rank, size=2).share(batch) for rank in (0, 1))
    assert first[0]["input_ids"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert second[0]["rest"][0].tolist() == [3, 4]
    assert (first[1], second[1]) == (0.6, 0.4)
    assert second[0]["rest"][1] == 3
    whole, weight = Ranks(rank=1, size=8).share(batch)
    assert whole is batch
    assert weight == 1 / 8
    with pytest.raises(DataError, match="several lengths: train it in one process"):
        Ranks(rank=0, size=2).share((torch.zeros(2), torch.zeros(3)))


def test_networks_without_classes_are_compared_by_the_divergence() -> None:
    searched = SimpleNamespace(search=object(), score_name="perplexity")
    classes = SimpleNamespace(search=object(), score_name="accuracy")
    own = SimpleNamespace(search=None, score_name="perplexity")  # a score of the user's
    found = [metric_of(cast(Task, task), "soft_accuracy") for task in (searched, classes, own)]
    assert found == ["kl", "soft_accuracy", "accuracy"]
    assert metric_of(cast(Task, searched), "accuracy") == "accuracy"
