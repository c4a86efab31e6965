from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from prunegraph.core.errors import DataError
from prunegraph.data import Images, from_images


class Recorded:
    """Items that tell which of them were read."""

    def __init__(self, items: Sequence[tuple[Any, Any]], targets: Any = None) -> None:
        self.items = items
        self.read: list[int] = []
        if targets is not None:
            self.targets = targets

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> tuple[Any, Any]:
        self.read.append(position)
        return self.items[position]


class Drifting(Recorded):
    """Items that are augmented when they are read."""

    def __getitem__(self, position: int) -> tuple[Any, Any]:
        image, label = super().__getitem__(position)
        return image + len(self.read), label


class Flipping(Recorded):
    """Items of which every second one, by chance, is changed when it is read."""

    def __getitem__(self, position: int) -> tuple[Any, Any]:
        image, label = super().__getitem__(position)
        return (-image if torch.rand(()) < 0.5 else image), label


def numbered(start: int, count: int, classes: int = 2) -> list[tuple[Tensor, int]]:
    """Return images that hold their number."""
    return [
        (torch.full((1, 2, 2), float(number)), number % classes)
        for number in range(start, start + count)
    ]


def make_images(**changed: Any) -> Images:
    given = {"train": numbered(0, 20), "test": numbered(100, 4)}
    return Images(**{**given, **changed})


def held(split: Any) -> list[int]:
    """Return the numbers of a split's images."""
    images, _ = next(split.batches(1000))
    return [int(value) for value in images[:, 0, 0, 0]]


def test_the_search_split_is_cut_from_train_unless_it_is_given() -> None:
    dataset = from_images("mine", make_images(), search_share=0.2)
    assert len(dataset.search) == 4
    assert sorted(held(dataset.train) + held(dataset.search)) == list(range(20))
    assert held(dataset.test) == [100, 101, 102, 103]
    given = from_images("mine", make_images(search=numbered(50, 3)))
    assert [held(given.train), held(given.search)] == [list(range(20)), [50, 51, 52]]
    images, labels = next(given.search.batches(2))
    assert (images.shape, labels.tolist()) == ((2, 1, 2, 2), [0, 1])


def test_targets_spare_reading_the_images() -> None:
    train = Recorded(numbered(0, 20), targets=[number % 2 for number in range(20)])
    dataset = from_images("mine", make_images(train=train), search_share=0.2)
    assert set(train.read) == {0, 10, 19}
    assert dataset.train.labels.float().mean() == 0.5


def test_augmentation_is_drawn_from_the_generator_alone() -> None:
    def noise(image: Tensor) -> Tensor:
        image += 0.5 * torch.rand(1)  # what it is given is its own
        return image

    dataset = from_images("mine", make_images(augment=noise))
    state = torch.random.get_rng_state()
    first, again, other = (
        next(dataset.train.batches(8, augment=torch.Generator().manual_seed(seed)))[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(set((first - first.round(decimals=0))[:, 0, 0, 0].tolist())) > 1
    assert torch.equal(torch.random.get_rng_state(), state)
    plain, _ = next(dataset.train.batches(8))
    assert torch.equal(plain, plain.round())


def test_a_fingerprint_tells_images_and_labels_apart() -> None:
    prints = {
        from_images("mine", images).train.source.fingerprint()
        for images in (
            make_images(),
            make_images(),
            make_images(train=numbered(1, 20)),
            make_images(train=numbered(0, 20, classes=1) + numbered(0, 1)),
            make_images(class_names=("a", "b", "c")),
        )
    }
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": []}, "mine: train holds no images"),
        ({"train": [(torch.zeros(1, 2, 2), 0)] * 3, "test": []}, "mine: test holds no images"),
        ({"train": [torch.zeros(1, 2, 2)] * 4}, r"an item is a Tensor, not \(image \[c, h, w\]"),
        ({"train": [("x.png", 0)] * 4}, "an item is a str with its class"),
        ({"train": [(torch.zeros(2, 2), 0)] * 4}, r"a tensor \[2, 2\] of torch.float32"),
        (
            {"train": [(torch.zeros(1, 2, 2, dtype=torch.uint8), 0)] * 4},
            r"a tensor \[1, 2, 2\] of torch.uint8",
        ),
        ({"class_names": ("one",)}, "class numbers go from 0 to 1, not from 0 to 0"),
        ({"mean": (0.5,)}, "has mean and std"),
        ({"mean": (0.5, 0.5)}, "have not a value for each of 1 channels"),
        ({"train": [(torch.zeros(1, 2, 2), "cat")] * 4}, "a class is 'cat'"),
        ({"train": [(torch.zeros(1, 2, 2), 0.5)] * 4}, "a class is 0.5, not a number"),
        (
            {"train": Recorded(numbered(0, 20), targets=[1] * 20)},
            "targets says 1 where an item has 0",
        ),
        ({"train": Recorded(numbered(0, 20), targets=[[0, 1]] * 20)}, r"targets \[20, 2\]"),
        ({"train": Recorded(numbered(0, 20), targets=[0.5] * 20)}, "are no class numbers"),
        ({"test": [(torch.full((1, 2, 2), torch.nan), 0)] * 4}, "image 0 of test holds NaN"),
        ({"train": Drifting(numbered(0, 20))}, "differs from one reading to the next"),
    ],
)
def test_what_cannot_be_used_is_one_clear_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_images("mine", make_images(**change), mean=(0.0,), std=(1.0,))


def test_images_of_another_shape_are_found_when_they_are_read() -> None:
    train = [*numbered(0, 4), (torch.zeros(1, 3, 3), 1), *numbered(4, 15)]
    dataset = from_images("mine", make_images(train=train, search=numbered(0, 2)))
    message = r"image 4 of train has shape \[1, 3, 3\], the first image \[1, 2, 2\]"
    with pytest.raises(DataError, match=message):
        held(dataset.train)


def test_test_images_of_another_shape_are_found_at_once() -> None:
    with pytest.raises(DataError, match=r"mine: image 0 of test has shape \[1, 3, 3\]"):
        from_images("mine", make_images(test=[(torch.zeros(1, 3, 3), 1)] * 4))


def test_what_torch_calls_a_dataset_will_do() -> None:
    train = TensorDataset(torch.rand(10, 3, 4, 4), torch.arange(10) % 5)
    make: Callable[..., Any] = from_images
    dataset = make("mine", make_images(train=train, test=train), search_share=0.5)
    assert dataset.image_shape == (3, 4, 4)
    assert dataset.class_names == ("0", "1", "2", "3", "4")


def test_augmentation_of_every_second_image_is_found() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        with pytest.raises(DataError, match="differs from one reading to the next"):
            from_images("mine", make_images(train=Flipping(numbered(1, 20))))
