"""Which of many numbers are least, exactly."""

import pytest
import torch

from prunegraph.core import tensors


@pytest.mark.parametrize("kind", ["apart", "few values", "sorted", "mostly zero"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_the_least_of_many_numbers_are_those_of_sorting(
    monkeypatch: pytest.MonkeyPatch, kind: str, share: float
) -> None:
    monkeypatch.setattr(tensors, "MANY", 1000)
    monkeypatch.setattr(tensors, "SAMPLE", 200)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(5000, generator=generator)
    if kind == "few values":
        numbers = (numbers * 4).floor()
    elif kind == "sorted":
        numbers = numbers.sort().values
    elif kind == "mostly zero":
        numbers = numbers.masked_fill(numbers < 0.9, 0.0)
    zeros = round(share * len(numbers))
    keep = tensors.all_but_least(numbers, zeros)
    wanted = torch.ones(len(numbers), dtype=torch.bool)
    order = torch.stack([numbers.double(), -torch.arange(5000.0, dtype=torch.double)]).T.tolist()
    wanted[sorted(range(5000), key=order.__getitem__)[:zeros]] = False
    assert torch.equal(keep, wanted)
