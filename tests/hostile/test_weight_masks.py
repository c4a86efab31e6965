"""The reader of weight masks on hostile files."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from prunegraph.core.errors import ArtefactError
from prunegraph.core.weight_mask import WeightMask


def test_a_hostile_mask_is_read_or_told_in_one_line(
    tmp_path: Path, mutators: dict[str, Callable[[bytes, Random], bytes]]
) -> None:
    keep = {"a.weight": torch.rand(5, 9) < 0.5, "b.weight": torch.rand(4, 2, 3, 3) < 0.5}
    path, mask = tmp_path / "mask.safetensors", WeightMask(keep)
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
