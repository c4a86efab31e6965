"""Masks of several groups on one set of weights: counts, files, networks that use them."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call

from prunegraph.core.errors import ArtefactError, MaskError
from prunegraph.core.weight_mask import GroupedMask, WeightMask, weights_for


def masks() -> dict[str, WeightMask]:
    first = torch.tensor([[True, True, False, False]])
    return {"en": WeightMask({"weight": first}), "uk": WeightMask({"weight": first.roll(1)})}


def test_it_keeps_the_union_and_counts_what_one_group_runs_with() -> None:
    mask = GroupedMask.of(masks())
    assert isinstance(mask, GroupedMask)
    assert mask.keep["weight"].tolist() == [[True, True, True, False]]
    assert (mask.density, mask.sparsity) == (0.75, 0.5)
    assert list(mask.groups) == ["en", "uk"]


def test_equal_masks_are_one() -> None:
    own = masks()["en"]
    assert GroupedMask.of({"en": own, "uk": masks()["en"]}) == own
    assert own.groups == {"": own}


def test_masks_of_other_weights_are_refused() -> None:
    with pytest.raises(MaskError, match="different networks"):
        GroupedMask.of(masks() | {"gu": WeightMask({"bias": torch.ones(2, dtype=torch.bool)})})


def test_a_file_brings_back_every_group(tmp_path: Path) -> None:
    mask = GroupedMask.of(masks())
    mask.save(tmp_path / "mask.safetensors")
    again = WeightMask.load(tmp_path / "mask.safetensors")
    assert again == mask
    assert again.digest() == mask.digest()
    swapped = GroupedMask.of(dict(zip(("en", "uk"), reversed(masks().values()), strict=True)))
    assert swapped != mask
    assert swapped.digest() != mask.digest()
    assert mask != WeightMask(mask.keep)


def test_a_file_that_lacks_a_group_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    path.write_bytes(GroupedMask.of(masks()).to_file().replace(b"1.weight", b"2.weight"))
    with pytest.raises(ArtefactError, match="lacks its shape or its bits"):
        WeightMask.load(path)


def test_a_network_uses_the_weights_of_a_group() -> None:
    torch.manual_seed(0)
    dense, x = nn.Linear(4, 1), torch.randn(3, 4)
    assert weights_for(dense, "en") == {}
    shared = GroupedMask.of(masks()).apply(dense)
    assert shared.weight[0, 3] == 0.0
    for name, mask in masks().items():
        own = functional_call(shared, weights_for(shared, name), (x,))
        assert torch.equal(own, mask.apply(dense)(x))
    with pytest.raises(MaskError, match="no mask for 'bn'; it has: en, uk"):
        weights_for(shared, "bn")
