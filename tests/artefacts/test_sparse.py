"""Small files of networks with zeros in place."""

from pathlib import Path

import pytest
import torch
from torch import nn

from prunegraph.artefacts.sparse import load_sparse, save_sparse
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ArtefactError
from prunegraph.core.tensors import state_tensors, to_safetensors
from prunegraph.methods.obs.magnitude import magnitude_mask
from support.speech import tiny_recogniser


def test_a_file_brings_network_and_mask_back(tmp_path: Path) -> None:
    model = tiny_recogniser(width=64, convolutions=4)
    mask = magnitude_mask(model, Budget(sparsity=0.9))
    small = mask.apply(model)
    save_sparse(tmp_path / "small", small, mask)
    again = tiny_recogniser(width=64, convolutions=4)
    assert load_sparse(tmp_path / "small", again) == mask
    for name, value in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    dense = len(to_safetensors(state_tensors(model)))
    assert (tmp_path / "small").stat().st_size < 0.14 * dense


def test_the_pattern_of_a_mask_comes_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    mask = magnitude_mask(model, Budget(pattern="2:4"))
    save_sparse(tmp_path / "small", mask.apply(model), mask)
    assert load_sparse(tmp_path / "small", model) == mask


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, path = tiny_recogniser(), tmp_path / "small"
    mask = magnitude_mask(model, Budget(sparsity=0.5))
    with pytest.raises(ArtefactError, match="apply the mask first"):
        save_sparse(path, model, mask)
    save_sparse(path, mask.apply(model), mask)
    for other in (tiny_recogniser(width=32), tiny_recogniser(attentions=0)):
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(ArtefactError, match="small does not fit Recogniser"):
            load_sparse(path, other)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    path.write_bytes(path.read_bytes().replace(mask.digest().encode(), b"0" * 16))
    with pytest.raises(ArtefactError, match="its mask has digest"):
        load_sparse(path, model)
