"""The reader of weight masks on hostile files."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn

from prunegraph.artefacts.sparse import load_sparse, save_sparse
from prunegraph.core.errors import ArtefactError
from prunegraph.core.weight_mask import GroupedMask, WeightMask

Mutators = dict[str, Callable[[bytes, Random], bytes]]


def drawn() -> WeightMask:
    keep = {"a.weight": torch.rand(5, 9) < 0.5, "b.weight": torch.rand(4, 2, 3, 3) < 0.5}
    return WeightMask(keep)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_hostile_mask_is_read_or_told_in_one_line(
    tmp_path: Path, mutators: Mutators, groups: int
) -> None:
    path = tmp_path / "mask.safetensors"
    mask = GroupedMask.of({str(number): drawn() for number in range(groups)})
    mask.save(path)
    content, told = path.read_bytes(), 0
    for seed in range(600):
        with contextlib.suppress(OverflowError):  # a number times 1.5 that no float holds
            path.write_bytes(mutators["safetensors"](content, Random(seed)))
        try:
            assert WeightMask.load(path) == mask  # what is read is what was written
        except ArtefactError as error:
            assert "\n" not in str(error)
            assert str(path) in str(error)
            told += 1
    assert told > 500


def test_a_hostile_small_file_is_read_or_told_in_one_line(
    tmp_path: Path, mutators: Mutators
) -> None:
    path, model = tmp_path / "small", nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 3))
    mask = WeightMask({f"{at}.weight": torch.rand_like(model[at].weight) < 0.3 for at in (0, 1)})
    save_sparse(path, mask.apply(model), mask)
    content, told = path.read_bytes(), 0
    for seed in range(600):
        with contextlib.suppress(OverflowError):
            path.write_bytes(mutators["safetensors"](content, Random(seed)))
        try:
            assert load_sparse(path, model) == mask
        except ArtefactError as error:
            assert "\n" not in str(error)
            assert str(path) in str(error)
            told += 1
    assert told > 400
