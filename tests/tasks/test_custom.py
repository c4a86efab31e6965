"""Tasks of a user's own: their arguments, the default loss, scores that are no numbers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunegraph as pg
from prunegraph.core.errors import ConfigError, DataError, ModelError
from prunegraph.core.splits import SearchSplit
from prunegraph.tasks.custom import cross_entropy

IMAGES, LABELS = torch.randn(8, 3, 8, 8), torch.arange(8)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))


def make(**given: Any) -> Any:
    options: dict[str, Any] = {
        "train": [(IMAGES, LABELS)],
        "score": lambda _: 0.5,
        "higher_is_better": True,
    }
    return pg.tasks.custom(network(), IMAGES[:1], **{**options, **given})


def test_whether_higher_is_better_must_be_said() -> None:
    with pytest.raises(TypeError, match="higher_is_better"):
        pg.tasks.custom(  # type: ignore[call-arg]
            network(), IMAGES[:1], train=[(IMAGES, LABELS)], score=lambda _: 0.5
        )
    with pytest.raises(ConfigError, match="higher_is_better='yes' must be True or False"):
        make(higher_is_better="yes")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"score": 0.5}, ConfigError, "score is a float, not a function"),
        ({"loss": torch.zeros(1)}, ConfigError, "loss is a Tensor, not a function"),
        ({"train": []}, DataError, "train holds no batches"),
    ],
)
def test_wrong_arguments_are_one_line(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**given)


def test_another_split_is_no_train_split() -> None:
    split = make().train
    with pytest.raises(DataError, match="train is a SearchSplit, not a TrainSplit"):
        make(train=SearchSplit(split.source, split.index))


@pytest.mark.parametrize("answer", [math.nan, math.inf])
def test_the_dense_network_must_have_a_score(answer: float) -> None:
    with pytest.raises(ModelError, match="score of the whole network is"):
        _ = make(score=lambda _: answer).dense_score


@pytest.mark.parametrize("answer", [None, "good", torch.zeros(2)])
def test_a_score_is_one_number(answer: Any) -> None:
    task = make(score=lambda _: answer)
    with pytest.raises(ModelError, match=r"the score is .*: return a number"):
        task.score(task.model)


def test_a_pruned_network_without_a_score_is_the_worst() -> None:
    scores = iter([0.9, math.nan])
    task = make(score=lambda _: next(scores))
    assert task.dense_score.value == 0.9
    found = task.measure(task.model, (), autocast=False)
    assert found.accuracy == -1.0
    assert found.kl == pytest.approx(1.9)


def test_a_score_sees_a_network_in_eval_mode_that_stays_as_it_was() -> None:
    seen: list[bool] = []
    task = make(score=lambda net: float(seen.append(net.training) or 0.5))
    model = network().train()
    assert task.score(model).value == 0.5
    assert seen == [False]
    assert model.training


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda net, batch: net(batch[0]), r"shape \[8, 10\], not one number: reduce"),
        (lambda net, batch: 0.5, "returns 0.5, not one number"),
    ],
)
def test_a_loss_is_one_number(loss: Any, message: str) -> None:
    task = make(loss=loss)
    with pytest.raises(ModelError, match=message):
        task.loss(task.model, (IMAGES, LABELS))


def test_the_outputs_are_those_of_the_forward_for_the_loss() -> None:
    task = make()
    torch.testing.assert_close(task.forward(task.model, (IMAGES, LABELS)), task.model(IMAGES))
    assert not task.model._forward_hooks
    dense = task.model(IMAGES).detach()
    assert float(task.divergence(dense, dense)) == 0.0
    assert float(task.divergence(torch.zeros_like(dense) + dense.mean(), dense)) == pytest.approx(
        1.0, rel=1e-4
    )


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": IMAGES}, "batches of dict, not .inputs, class numbers.: give your own as loss="),
        (IMAGES, "batches of Tensor"),
        ((IMAGES, LABELS, LABELS), "batches of tuple"),
        ((IMAGES, list(range(8))), "batches of tuple"),
        ((IMAGES, LABELS.float()), r"labels \[8\] of torch.float32, which do not fit"),
        ((IMAGES, LABELS + 5), r"do not fit logits of \[8, 10\] .*out of bounds"),
        ((IMAGES[:, :1], LABELS), r"fails on train inputs of \[8, 1, 8, 8\]"),
    ],
)
def test_batches_that_the_default_loss_cannot_take_are_one_line(batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        cross_entropy(network(), batch)


def test_the_default_loss_takes_logits_alone_and_numbers_of_tokens() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": x}

    with pytest.raises(ModelError, match="Named returns dict, not logits"):
        cross_entropy(Named(), (IMAGES, LABELS))
    embedding = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    tokens = torch.arange(8)
    expected = nn.functional.cross_entropy(embedding(tokens), LABELS)
    assert torch.equal(cross_entropy(embedding, (tokens, LABELS)), expected)
