"""Batches of any form as one."""

import itertools
from collections import UserDict, namedtuple
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from prunegraph.core.errors import DataError
from prunegraph.tasks.batches import joined, num_samples, ready_split, singles

Sample = namedtuple("Sample", ["images", "labels"])  # as loaders give them


def pair(size: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(start, start + size)
    return labels[:, None].expand(size, 3).float(), labels


def test_batches_become_one() -> None:
    images, labels = joined([pair(4, 4 * number) for number in range(3)])
    assert labels.tolist() == list(range(12))
    assert torch.equal(images[:, 0], labels.float())


def test_ready_batches_are_sampled_whole() -> None:
    split = ready_split([pair(4, 4 * number) for number in range(5)], "train", 8)
    assert [labels.tolist() for _, labels in split.sample(11, 0).batches(1)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    assert len(split.sample(1, 0)) == 1
    assert len(split.sample(100, 0)) == len(split) == 5
    assert len(list(split.equal_batches(2))) == 5
    order = torch.Generator().manual_seed(1)
    first = [int(labels[0]) for _, labels in split.batches(64, shuffle=order)]
    assert sorted(first) == [0, 4, 8, 12, 16] != first


def test_of_a_loader_the_first_batches_are_taken_and_a_list_is_whole() -> None:
    endless = (pair(2, number) for number in itertools.count())
    assert len(ready_split(endless, "train", 3)) == 3
    lists = ready_split([pair(2, number) for number in range(9)], "train", 3)
    assert len(lists) == 9
    again = ready_split([pair(2, number) for number in range(9)], "train", 3)
    other = ready_split([pair(2, number + 1) for number in range(9)], "train", 3)
    assert lists.fingerprint() == again.fingerprint() != other.fingerprint()


def test_samples_come_one_by_one_where_they_can_be_told() -> None:
    batch = {"input_ids": torch.arange(6).view(3, 2), "width": 2}
    assert [each["input_ids"].tolist() for each in singles(batch)] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    odd = (torch.zeros(2, 3), torch.zeros(3))
    assert [each is odd for each in singles(odd)] == [True]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TensorDataset(torch.zeros(4, 2)), r"train is a data set \(TensorDataset\), .*DataLoader"),
        (torch.zeros(4, 2), "train is one tensor, without labels"),
        (5, "train is a int: give a loader"),
        ("train.csv", "train is a str: give a loader"),
        ([], "train holds no batches"),
    ],
)
def test_what_holds_no_batches_is_one_line(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ready_split(data, "train", 8)


@pytest.mark.parametrize(
    "make",
    [
        lambda pair: Sample(*pair),
        lambda pair: list(pair),
        lambda pair: {"images": pair[0], "labels": pair[1], "width": 3},
        lambda pair: UserDict(images=pair[0], labels=pair[1]),
        lambda pair: ({"images": [pair[0]]}, pair[1], None),
    ],
)
def test_nested_containers_keep_their_form(make: Any) -> None:
    batches = [make(pair(2)), make(pair(3))]
    whole = joined(batches)
    assert type(whole) is type(batches[0])
    assert num_samples(whole) == 5
    assert num_samples(batches[0]) == 2  # which is left as it is


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(2, 4), torch.zeros(2)),  # longer sentences
        [torch.zeros(2, 3), torch.zeros(2)],
        (torch.zeros(2, 3), torch.zeros(2), torch.zeros(2)),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3), {"labels": torch.zeros(2)}),
        (torch.zeros(3, 3), torch.zeros(2)),  # images of three channels one after the other
        (torch.zeros(2, 3), "two"),
    ],
)
def test_what_does_not_join_is_the_first_alone(other: Any) -> None:
    first = (torch.zeros(2, 3), torch.zeros(2))
    assert len(joined([first, other])[0]) == 2


def test_lists_of_samples_and_strangers_mappings_are_the_first_alone() -> None:
    class Own(MutableMapping):
        def __init__(self, **items: Any) -> None:
            self.items_ = items

        def __getitem__(self, name: str) -> Any:
            return self.items_[name]

        def __setitem__(self, name: str, value: Any) -> None:
            self.items_[name] = value

        def __delitem__(self, name: str) -> None:
            del self.items_[name]

        def __iter__(self) -> Iterator[str]:
            return iter(self.items_)

        def __len__(self) -> int:
            return len(self.items_)

    series, images = [torch.zeros(20, 5)] * 4, torch.zeros(2, 3, 8, 8)
    for batch in (series, tuple(series), (images, [(8, 8)] * 2), Own(images=images)):
        assert joined([batch, batch]) is batch
    assert len(images) == 2


def test_names_and_values_that_differ_do_not_join() -> None:
    first = {"images": torch.zeros(2, 3), "width": 3}
    assert joined([first, {"images": torch.zeros(2, 3)}]) is first
    assert joined([first, {"images": torch.zeros(2, 3), "width": 4}]) is first
