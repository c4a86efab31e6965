"""Batches of any form as one."""

from collections import UserDict, namedtuple
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
import torch

from prunegraph.tasks.batches import joined, num_samples

Sample = namedtuple("Sample", ["images", "labels"])  # as loaders give them


def pair(size: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(start, start + size)
    return labels[:, None].expand(size, 3).float(), labels


def test_the_first_batches_become_one_of_so_many_samples() -> None:
    batches = [pair(4, 4 * number) for number in range(5)]
    images, labels = joined(batches, most=14)
    assert labels.tolist() == list(range(12))
    assert torch.equal(images[:, 0], labels.float())
    assert joined(batches, most=2)[1].tolist() == [0, 1, 2, 3]


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
    whole = joined(batches, most=100)
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
    assert len(joined([first, other], most=100)[0]) == 2


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
        assert joined([batch, batch], 100) is batch
    assert len(images) == 2


def test_names_and_values_that_differ_do_not_join() -> None:
    first = {"images": torch.zeros(2, 3), "width": 3}
    assert joined([first, {"images": torch.zeros(2, 3)}], 9) is first
    assert joined([first, {"images": torch.zeros(2, 3), "width": 4}], 9) is first
