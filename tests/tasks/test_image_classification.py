"""Image classification from splits, tensors and loaders; what is wrong with them is one line."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import prunegraph as pg
from prunegraph.core.errors import DataError, ModelError
from prunegraph.core.splits import Dataset, SearchSplit, TrainSplit
from prunegraph.models import build_model

IMAGES, LABELS = torch.randn(12, 1, 8, 8), torch.arange(12) % 10


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model("digits_resnet8_w8", num_classes=10, image_shape=(1, 8, 8)).eval()


def test_splits_stay_as_they_are(digits: Dataset) -> None:
    task = pg.tasks.image_classification(
        network(), train=digits.train, search=digits.search, test=digits.test
    )
    assert (task.train, task.search, task.test) == (digits.train, digits.search, digits.test)
    assert task.example_inputs.shape == (1, 1, 8, 8)
    assert (task.kind, task.score_name, task.higher_is_better) == (
        "image_classification",
        "accuracy",
        True,
    )


def test_tensors_are_taken_whole_and_loaders_as_far_as_asked() -> None:
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=5)
    whole = pg.tasks.image_classification(
        network(), train=(IMAGES, LABELS), search=loader, num_images=7
    )
    assert torch.equal(whole.train.labels, LABELS)
    assert torch.equal(whole.search.labels, LABELS[:7])
    images, labels = next(task_batches(whole))
    assert torch.equal(images, IMAGES[:5])
    assert torch.equal(labels, LABELS[:5])


def task_batches(task: Any) -> Any:
    return task.batches(task.train, 5)


def test_without_search_images_later_ones_of_the_loader_are_searched_on() -> None:
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=5)
    task = pg.tasks.image_classification(network(), train=loader, num_images=6)
    assert torch.equal(task.train.labels, LABELS[:6])
    assert torch.equal(task.search.labels, LABELS[6:])
    assert isinstance(task.search, SearchSplit)
    few = pg.tasks.image_classification(network(), train=loader, num_images=9)
    assert (len(few.train), len(few.search)) == (9, 9)
    halves = pg.tasks.image_classification(network(), train=(IMAGES, LABELS))
    assert torch.equal(torch.cat([halves.train.labels, halves.search.labels]), LABELS)


def test_images_without_labels_get_the_networks_answers() -> None:
    model = network()
    task = pg.tasks.image_classification(model, train=[IMAGES[:6], IMAGES[6:]])
    assert torch.equal(task.train.labels, model(IMAGES).argmax(1))


def test_batches_are_shuffled_by_a_seed() -> None:
    task = pg.tasks.image_classification(network(), train=(IMAGES, torch.arange(12) % 10))
    orders = [
        torch.cat([images for images, _ in task.batches(task.train, 4, seed=seed)])
        for seed in (None, 0, 0, 1)
    ]
    assert torch.equal(orders[0], IMAGES[:6])
    assert torch.equal(orders[1], orders[2])
    assert not torch.equal(orders[1], orders[3])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"picture": IMAGES}], "train holds batches of dict, not images"),
        ([(IMAGES, LABELS.float())], r"labels of torch.float32 and shape \[12\]"),
        ([(IMAGES, torch.zeros(12, 10))], "leave the labels out"),
        ([(IMAGES, LABELS[:3])], "holds 3 labels for 12 images"),
        ([(IMAGES, LABELS + 7)], "labels from 7 to 16, and .* 0 to 9"),
        ([(IMAGES, LABELS - 1)], "labels from -1 to 8"),
        ([(IMAGES, list(range(12)))], r"batches of \(Tensor, list\), not images"),
        ([IMAGES, IMAGES[..., :4]], "resize or crop them to one size"),
        ([IMAGES[0]], r"batches of shape \[1, 8, 8\], not images"),
        ([()], r"batches of \(\), not images"),
        ([], "train holds no images"),
        (IMAGES, "train is one tensor, without labels: give"),
        (TensorDataset(IMAGES, LABELS), r"train is a data set \(TensorDataset\), .*DataLoader"),
        (5, "train is a int: give a loader"),
    ],
)
def test_wrong_images_are_one_line(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pg.tasks.image_classification(network(), train=data)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_images_that_are_no_numbers_are_named(value: float) -> None:
    images = IMAGES.clone()
    images[7, 0, 3, 3] = value
    with pytest.raises(DataError, match="image 7 of train holds NaN or infinite values: repair"):
        pg.tasks.image_classification(network(), train=[(images[:5], LABELS[:5]), images[5:]])

    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x.nan_to_num(0.0, 0.0, 0.0))

    assert len(pg.tasks.image_classification(Filled(), train=(images, LABELS)).search) == 6


def test_other_channels_than_the_example_are_one_line() -> None:
    with pytest.raises(DataError, match=r"not images \[b, 3, h, w\]"):
        pg.tasks.image_classification(
            network(), train=[IMAGES], example_inputs=torch.zeros(1, 3, 8, 8)
        )


def test_splits_of_another_kind_are_refused(digits: Dataset) -> None:
    with pytest.raises(DataError, match="search is a TestSplit, not a SearchSplit"):
        pg.tasks.image_classification(
            network(),
            train=digits.train,
            search=digits.test,  # type: ignore[arg-type]
        )
    with pytest.raises(DataError, match="give search="):
        pg.tasks.image_classification(network(), train=digits.train)


def test_what_is_no_classifier_is_told_of_custom_tasks() -> None:
    class Detector(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"boxes": x}

    with pytest.raises(ModelError, match=r"returns dict, .* prunegraph\.tasks\.custom"):
        pg.tasks.image_classification(Detector(), train=[IMAGES])


def test_a_loader_of_images_is_not_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunegraph.data.stored.IN_MEMORY", 0)
    task = pg.tasks.image_classification(network(), train=[(IMAGES, LABELS)], num_images=12)
    assert task.train.source._parts == []  # type: ignore[attr-defined]
    assert torch.equal(next(iter(task.train.batches(12)))[0], IMAGES)
    assert isinstance(task.train, TrainSplit)
