import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunegraph.core.errors import DataError, ModelError
from prunegraph.core.masks import ChannelMask
from prunegraph.core.splits import Dataset
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.graph import StructureGraph
from prunegraph.graph.apply import apply_mask
from prunegraph.layerwise.recalibrate import recalibrate_bn
from prunegraph.layerwise.reconstruct import Reconstruction
from prunegraph.tasks.classification import WORST, evaluate, place_images, place_model
from support.tasks import image_task

MakeMask = Callable[..., ChannelMask]


@pytest.fixture
def make_evaluator(
    digits: Dataset, digits_net: nn.Module, digits_graph: StructureGraph
) -> Callable[..., Evaluator]:
    def make(**options: Any) -> Evaluator:
        defaults = {"num_calibration": 128, "autocast": False}
        return Evaluator(
            image_task(digits_net, digits.train, digits.search),
            digits_graph,
            **{**defaults, **options},
        )

    return make


class Constant(nn.Module):
    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


def test_scores_by_hand() -> None:
    images, labels = torch.zeros(5, 1, 2, 2), torch.tensor([0, 1, 1, 2, 1])
    model = Constant([0.0, math.log(2.0), 0.0])
    dense = torch.zeros(5, 3)
    scores = evaluate(model, (images, labels), batch_size=2, dense_logits=dense)
    assert scores.accuracy == pytest.approx(3 / 5)
    assert scores.loss == pytest.approx((3 * math.log(2) + 2 * math.log(4)) / 5)
    uniform = -math.log(3) - (math.log(0.25) + math.log(0.5) + math.log(0.25)) / 3
    assert scores.kl == pytest.approx(uniform, rel=1e-5)
    assert scores.soft_accuracy == pytest.approx((3 * 0.5 + 2 * 0.25) / 5)
    assert evaluate(model, (images, labels)).kl is None


def test_a_split_and_its_tensors_score_alike(digits: Dataset, digits_net: nn.Module) -> None:
    digits_net.train()
    split = digits.search
    images = torch.cat([batch for batch, _ in split.batches(64)])
    one = evaluate(digits_net, split, autocast=False, batch_size=64)
    other = evaluate(digits_net, (images, split.labels), autocast=False, batch_size=64)
    assert one == other
    assert digits_net.training


@pytest.mark.parametrize("options", [{}, {"metric": "kl"}, {"metric": "soft_accuracy"}])
def test_a_mask_whose_network_overflows_is_the_worst_and_ends_no_search(
    options: dict[str, str],
    make_evaluator: Callable[..., Evaluator],
    digits_graph: StructureGraph,
    make_mask: MakeMask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluator = make_evaluator(**options)
    sound = evaluator.evaluate(make_mask(digits_graph, 0))
    monkeypatch.setattr(evaluator, "prune", lambda *_: Constant([math.nan] * 10))
    broken = evaluator.evaluate(make_mask(digits_graph, 1))
    assert broken.rank < sound.rank
    assert broken.accuracy == 0.0 and math.isfinite(broken.loss)
    assert (broken.kl is None) == (sound.kl is None)


def test_bad_input_is_refused() -> None:
    nothing = torch.zeros(0, 1, 2, 2), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(DataError, match="no images"):
        evaluate(Constant([0.0, 1.0]), nothing)
    image = torch.zeros(1, 1, 2, 2), torch.tensor([0])
    with pytest.raises(ModelError, match="NaN"):
        evaluate(Constant([float("nan"), 1.0]), image)
    broken = image[0] + torch.nan, image[1]
    mean = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    for worst in (None, WORST):
        with pytest.raises(DataError, match="images to evaluate on hold NaN or infinite"):
            evaluate(mean, broken, worst=worst)


def test_an_outcome_is_that_of_the_pruned_recalibrated_network(
    make_evaluator: Callable[..., Evaluator],
    digits: Dataset,
    digits_net: nn.Module,
    digits_graph: StructureGraph,
    make_mask: MakeMask,
) -> None:
    evaluator, mask = make_evaluator(), make_mask(digits_graph, 0)
    before = {name: value.clone() for name, value in digits_net.state_dict().items()}
    outcome = evaluator.evaluate(mask)
    pruned = apply_mask(digits_net, digits_graph, mask)
    order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(0))[:128]
    images = digits.train.take(order)
    recalibrate_bn(pruned, images.equal_batches(1))
    expected = evaluate(pruned, digits.search, autocast=False)
    assert outcome.loss == pytest.approx(expected.loss, rel=1e-5)
    assert outcome.accuracy == pytest.approx(expected.accuracy, abs=1e-6)
    assert outcome.cost == digits_graph.cost(mask)
    assert (outcome.digest, outcome.num_images) == (mask.digest(), len(digits.search))
    assert outcome.seconds > 0.0
    after = digits_net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_cached_outcome_costs_no_network(
    make_evaluator: Callable[..., Evaluator], digits_graph: StructureGraph, make_mask: MakeMask
) -> None:
    evaluator, mask = make_evaluator(), make_mask(digits_graph, 0)
    subset = evaluator.draw_subset(40, seed=1)
    told: list[int] = []
    with evaluator.watched(told.append):
        first = evaluator.evaluate(mask, subset)
        assert evaluator.is_cached(mask, subset)
        seconds = evaluator.seconds
        assert evaluator.evaluate(mask, subset.clone()) is first
    assert told == [1]
    assert (evaluator.num_networks, evaluator.seconds) == (1, seconds)
    assert not evaluator.is_cached(mask)
    assert evaluator.evaluate(mask).num_images > first.num_images
    evaluator.evaluate(make_mask(digits_graph, 1), subset)
    assert evaluator.num_networks == 3
    everything = evaluator.draw_subset(10**6, seed=2)
    assert evaluator.evaluate(mask, everything) is evaluator.evaluate(mask)
    assert told == [1]  # no longer watched
    assert evaluator.seconds > seconds


def test_subsets_follow_their_seed(make_evaluator: Callable[..., Evaluator]) -> None:
    evaluator = make_evaluator()
    first = evaluator.draw_subset(50, seed=3)
    assert torch.equal(first, evaluator.draw_subset(50, seed=3))
    assert not torch.equal(first, evaluator.draw_subset(50, seed=4))
    assert len(first.unique()) == 50
    assert len(evaluator.draw_subset(10**6, seed=0)) == len(evaluator.search)


def test_a_subset_scores_its_own_images(
    make_evaluator: Callable[..., Evaluator],
    digits: Dataset,
    digits_graph: StructureGraph,
    make_mask: MakeMask,
) -> None:
    evaluator, mask = make_evaluator(), make_mask(digits_graph, 0)
    subset = evaluator.draw_subset(50, seed=3)
    expected = evaluate(evaluator.prune(mask), digits.search.take(subset), autocast=False)
    assert evaluator.evaluate(mask, subset).loss == pytest.approx(expected.loss, rel=1e-5)


def test_a_search_recalibrates_on_few_images(
    make_evaluator: Callable[..., Evaluator],
    digits_graph: StructureGraph,
    make_mask: MakeMask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mask, few = make_mask(digits_graph, 0), 32
    evaluator = make_evaluator(num_calibration=64)
    subset = evaluator.draw_subset(50, seed=3)
    images = evaluator.search.take(subset)
    monkeypatch.setattr("prunegraph.evaluation.evaluator.QUICK_CALIBRATION", few)
    for scored, data, count in ((subset, images, few), (None, evaluator.search, 64)):
        expected = evaluate(evaluator.prune(mask, None, count), data, autocast=False)
        assert evaluator.evaluate(mask, scored).loss == pytest.approx(expected.loss, rel=1e-5)


def test_streamed_images_score_as_preloaded_ones(
    make_evaluator: Callable[..., Evaluator],
    digits_graph: StructureGraph,
    make_mask: MakeMask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mask = make_mask(digits_graph, 0)
    preloaded, streamed = make_evaluator(batch_size=50), make_evaluator(batch_size=50)
    subset = preloaded.draw_subset(70, seed=0)
    expected = preloaded.evaluate(mask, subset)
    monkeypatch.setattr("prunegraph.evaluation.evaluator.PRELOAD_LIMIT", 0)
    found = streamed.evaluate(mask, subset)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.accuracy == pytest.approx(expected.accuracy, abs=0.02)


def test_kl_is_zero_for_the_dense_network_only(
    make_evaluator: Callable[..., Evaluator],
    digits: Dataset,
    digits_graph: StructureGraph,
    make_mask: MakeMask,
) -> None:
    evaluator = make_evaluator(metric="kl")
    same = evaluate(
        evaluator.model, digits.search, autocast=False, dense_logits=evaluator.dense_outputs
    )
    assert same.kl == pytest.approx(0.0, abs=1e-6)
    assert evaluator.num_networks == 0
    subset = evaluator.draw_subset(60, seed=0)
    outcome = evaluator.evaluate(make_mask(digits_graph, 0), subset)
    assert outcome.kl is not None
    assert outcome.kl > 1e-3


def test_outcomes_hold_the_soft_accuracy_where_it_is_compared(
    make_evaluator: Callable[..., Evaluator], digits_graph: StructureGraph, make_mask: MakeMask
) -> None:
    mask = make_mask(digits_graph, 0)
    plain, soft = (
        make_evaluator().evaluate(mask),
        make_evaluator(metric="soft_accuracy").evaluate(mask),
    )
    assert plain.steady is None
    assert soft.steady == soft.soft_accuracy
    assert 0.0 < (soft.soft_accuracy or 0.0) < 1.0
    assert soft.rank > dataclasses.replace(soft, soft_accuracy=0.0, accuracy=1.0).rank


def test_a_compensated_network_is_nearer_to_the_dense_one(
    make_evaluator: Callable[..., Evaluator],
    digits: Dataset,
    digits_net: nn.Module,
    digits_graph: StructureGraph,
    make_mask: MakeMask,
) -> None:
    images = digits.train.take(torch.arange(256))
    reconstruction = Reconstruction.on_samples(
        image_task(digits_net, digits.train), digits_graph, images
    )
    plain, reconstructed = (
        make_evaluator(metric="kl"),
        make_evaluator(metric="kl", reconstruction=reconstruction),
    )
    masks = [make_mask(digits_graph, seed, 0.7) for seed in range(3)]
    before, after = (
        sum(evaluator.evaluate(mask).kl or 0.0 for mask in masks)
        for evaluator in (plain, reconstructed)
    )
    assert after < 0.7 * before


def test_calibration_images_are_shuffled_and_seeded(
    make_evaluator: Callable[..., Evaluator], digits: Dataset
) -> None:
    one, same, other = (make_evaluator(seed=seed).calibration for seed in (0, 0, 1))
    assert torch.equal(one.index, same.index)
    assert not torch.equal(one.index, other.index)
    everything = make_evaluator(num_calibration=10**6).calibration
    assert len(everything) == len(digits.train)
    assert not torch.equal(everything.index, digits.train.index)
    assert len(everything.labels[:64].unique()) > 5


class Viewed(nn.Module):
    """Flattens what a convolution gives by ``view``, which channels last does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(x.view(x.size(0), -1))


def test_a_network_that_cannot_run_channels_last_runs_in_the_usual_layout() -> None:
    images, device = torch.randn(2, 3, 8, 8), torch.device("cpu")
    last = place_model(nn.Conv2d(3, 4, 3), device, images)
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
    assert place_images(images, last).is_contiguous(memory_format=torch.channels_last)
    usual = place_model(Viewed(), device, images)
    assert usual.conv.weight.is_contiguous()
    assert place_images(images, usual).is_contiguous()
    assert evaluate(usual, (images, torch.zeros(2, dtype=torch.long))).loss > 0.0
    flat = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Flatten(), nn.Linear(192, 2))
    assert place_images(images, place_model(flat, device, images)).is_contiguous()


def test_test_images_cannot_enter_a_search(
    digits: Dataset, digits_net: nn.Module, digits_graph: StructureGraph
) -> None:
    with pytest.raises(DataError, match="TestSplit is no SearchSplit"):
        image_task(digits_net, digits.train, digits.test)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="SearchSplit is no TrainSplit"):
        image_task(digits_net, digits.search)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="TestSplit is no SearchSplit"):
        Evaluator(image_task(digits_net, digits.train), digits_graph, search=digits.test)  # type: ignore[arg-type]


def test_tensors_of_five_axes_are_left_in_their_layout() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(1, 1, 3))
    model.register_buffer("anchors", torch.zeros(1, 1, 1, 1, 2))
    place_model(model, torch.device("cpu"))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[1].weight.is_contiguous()


def test_a_network_that_returns_no_logits_is_told_so() -> None:
    class Answers(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": x.mean((2, 3))}

    with pytest.raises(ModelError, match="returns dict, not logits"):
        evaluate(Answers(), (torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)))
