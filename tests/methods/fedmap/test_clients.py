"""Samples of clients: each sample once, typed, by class or at random; bad input in one line."""

import itertools

import pytest
import torch
from torch import nn

from prunegraph.core.errors import ConfigError
from prunegraph.core.splits import Dataset, SearchSplit, TrainSplit
from prunegraph.methods.fedmap.clients import ClientData, client_data
from prunegraph.tasks import custom
from prunegraph.tasks.image_classification import ImageClassification


def task_of(digits: Dataset, train: TrainSplit | None = None) -> ImageClassification:
    return ImageClassification(
        model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        example_inputs=torch.zeros(1, 1, 8, 8),
        train=digits.train if train is None else train,
        search=digits.search,
    )


def classes(data: ClientData) -> torch.Tensor:
    counts = torch.bincount(data.train.labels, minlength=10)
    return counts / counts.sum()


@pytest.mark.parametrize("dirichlet", [None, 0.3])
def test_every_sample_is_of_one_client(digits: Dataset, dirichlet: float | None) -> None:
    task = task_of(digits)
    data = client_data(task, 10, dirichlet, seed=1)
    assert len(data) == 10
    for kind, name in ((TrainSplit, "train"), (SearchSplit, "search")):
        parts = [getattr(each, name) for each in data]
        assert all(type(part) is kind for part in parts)
        whole = torch.cat([part.index for part in parts]).sort().values
        assert torch.equal(whole, getattr(task, name).index.sort().values)
    again = client_data(task, 10, dirichlet, seed=1)
    other = client_data(task, 10, dirichlet, seed=2)
    assert all(torch.equal(a.train.index, b.train.index) for a, b in zip(data, again, strict=True))
    assert any(
        not torch.equal(a.train.index, b.train.index) for a, b in zip(data, other, strict=True)
    )


def test_dirichlet_gives_clients_other_classes_and_the_search_samples_follow(
    digits: Dataset,
) -> None:
    def distance(dirichlet: float | None) -> float:
        data = client_data(task_of(digits), 6, dirichlet, seed=0)
        pairs = itertools.combinations(map(classes, data), 2)
        return float(torch.stack([(a - b).abs().sum() for a, b in pairs]).mean())

    assert distance(None) < 0.6 < 1.0 < distance(0.1)
    assert distance(1000.0) < 0.6
    for each in client_data(task_of(digits), 6, 0.3, seed=0):
        assert each.search is not None
        there = torch.bincount(each.search.labels, minlength=10) / max(len(each.search), 1)
        assert (classes(each) - there).abs().sum() < 0.5


@pytest.mark.parametrize(
    ("clients", "dirichlet", "message"),
    [(2000, None, "too many for"), (50, 0.001, "without data")],
)
def test_clients_without_data_are_refused(
    digits: Dataset, clients: int, dirichlet: float | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        client_data(task_of(digits), clients, dirichlet, seed=0)
    assert "\n" not in str(refused.value)


def test_samples_without_classes_are_divided_at_random_alone() -> None:
    model = nn.Linear(4, 2)
    batches = [{"x": torch.randn(8, 4), "y": torch.randn(8, 2)} for _ in range(5)]
    task = custom(
        model,
        example_inputs=torch.zeros(1, 4),
        train=batches,
        loss=lambda net, batch: (net(batch["x"]) - batch["y"]).square().mean(),
        score=lambda net: 0.0,
        higher_is_better=True,
    )
    assert sum(len(each.train) for each in client_data(task, 3, None, seed=0)) == 5
    with pytest.raises(ConfigError, match="no class for each sample"):
        client_data(task, 3, 0.5, seed=0)
    with pytest.raises(ConfigError, match="too many for 5 batches"):
        client_data(task, 6, None, seed=0)
