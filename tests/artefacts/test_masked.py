import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from prunegraph.artefacts.masked import BITS_FILE, bits_path, load_masked, save_masked
from prunegraph.artefacts.pruned import (
    MASK_FILE,
    WEIGHTS_FILE,
    PrunedInfo,
    checksum,
    load_pruned,
    read_info,
    save_pruned,
)
from prunegraph.core.errors import ArtefactError, ConfigError
from prunegraph.core.masks import ChannelMask
from prunegraph.core.pattern import Pattern
from prunegraph.core.tensors import to_safetensors
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import StructureGraph
from prunegraph.graph.apply import apply_mask
from prunegraph.models import build_model

INFO = PrunedInfo(arch="digits_resnet", num_classes=10, example_shape=(1, 1, 8, 8), extra={"a": 1})


def build() -> nn.Module:
    return build_model("digits_resnet", num_classes=10, image_shape=(1, 8, 8))


def draw(model: nn.Module, seed: int = 0) -> WeightMask:
    generator = torch.Generator().manual_seed(seed)
    keep = {
        name: torch.rand(weight.shape, generator=generator) < 0.5
        for name, weight in model.named_parameters()
        if weight.ndim > 1
    }
    return WeightMask(keep)


@pytest.fixture
def saved(tmp_path: Path, digits_net: nn.Module) -> tuple[Path, nn.Module, WeightMask]:
    mask = draw(digits_net)
    model = mask.apply(digits_net)
    model.train()(torch.randn(16, 1, 8, 8))  # other batch-norm buffers
    save_masked(tmp_path / "run", model=model, mask=mask, info=INFO)
    return tmp_path / "run", model.eval(), mask


Saved = tuple[Path, nn.Module, WeightMask]


def test_a_saved_network_comes_back_with_its_zeros(saved: Saved) -> None:
    folder, model, mask = saved
    before = torch.random.get_rng_state()
    loaded = load_masked(folder, build)
    assert torch.equal(before, torch.random.get_rng_state())
    expected = model.state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in loaded.model.state_dict().items())
    assert not loaded.model.training
    assert loaded.mask == mask
    assert loaded.info == read_info(folder) == INFO
    loaded.mask.check_zeros(loaded.model)
    files = [BITS_FILE, MASK_FILE, WEIGHTS_FILE]
    assert sorted(file.name for file in folder.iterdir()) == sorted(files)
    assert "keep" not in json.loads((folder / MASK_FILE).read_text())["mask"]


def test_any_name_is_a_place_too(saved: Saved, tmp_path: Path) -> None:
    _, model, mask = saved
    save_masked(tmp_path / "net.safetensors", model=model, mask=mask, info=INFO)
    assert bits_path(tmp_path / "net.safetensors") == tmp_path / "net.mask.safetensors"
    assert load_masked(tmp_path / "net.safetensors", build).mask == mask


def test_a_network_without_the_zeros_is_not_saved(tmp_path: Path, digits_net: nn.Module) -> None:
    with pytest.raises(ArtefactError, match=r"weights that are not zero .*; apply the mask first"):
        save_masked(tmp_path / "run", model=digits_net, mask=draw(digits_net), info=INFO)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [MASK_FILE, WEIGHTS_FILE, BITS_FILE])
def test_changed_and_missing_files_are_named(saved: Saved, name: str) -> None:
    path = saved[0] / name
    content = path.read_bytes()
    for share in (0.02, 0.5, 0.999):
        changed = bytearray(content)
        changed[int(share * len(content))] ^= 1
        path.write_bytes(bytes(changed))
        with pytest.raises(ArtefactError, match=name) as caught:
            load_masked(saved[0], build)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ArtefactError, match=f"no file .*{name}"):
        load_masked(saved[0], build)


def sign(folder: Path, **weights: str) -> None:
    """Make the recipe fit changed files: a forger, not an accident."""
    record = json.loads((folder / MASK_FILE).read_text())
    record["weights"].update(weights)
    (folder / MASK_FILE).write_text(json.dumps({**record, "checksum": checksum(record)}))


def test_a_weight_that_grew_back_is_found(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model, mask = saved
    with monkeypatch.context() as patch:
        patch.setattr(WeightMask, "check_zeros", lambda *_: None)
        name, bits = next(iter(mask.keep.items()))
        place = (~bits).nonzero()[0]
        with torch.no_grad():
            model.get_parameter(name)[tuple(place)] = 1e-9
        save_masked(folder, model=model, mask=mask, info=INFO)
    with pytest.raises(ArtefactError, match=f"{WEIGHTS_FILE} does not fit its mask: .* 1 weights"):
        load_masked(folder, build)


def test_the_mask_of_another_network_is_found(saved: Saved) -> None:
    folder, model, mask = saved
    WeightMask(mask.keep, Pattern.parse("columns")).save(folder / BITS_FILE)
    with pytest.raises(ArtefactError, match=r"holds the mask .* names .*: copy the files of one"):
        load_masked(folder, build)
    mask.save(folder / BITS_FILE)
    (folder / WEIGHTS_FILE).write_bytes(to_safetensors(dict(model.named_parameters())))
    with pytest.raises(ArtefactError, match="is not the file that its recipe was written with"):
        load_masked(folder, build)


def test_the_two_kinds_of_networks_are_told_apart(
    saved: Saved,
    tmp_path: Path,
    digits_net: nn.Module,
    digits_graph: StructureGraph,
    make_mask: Callable[..., ChannelMask],
) -> None:
    with pytest.raises(ArtefactError, match="read it with load_masked"):
        load_pruned(saved[0], build)
    mask = make_mask(digits_graph, 0)
    model = apply_mask(digits_net, digits_graph, mask)
    save_pruned(tmp_path / "cut", model=model, mask=mask, graph=digits_graph, info=INFO)
    with pytest.raises(ArtefactError, match="read it with load_pruned"):
        load_masked(tmp_path / "cut", build)
    sign(saved[0], file="elsewhere")  # names in a recipe are not followed
    assert load_masked(saved[0], build).mask == saved[2]


def test_a_network_in_place_of_a_builder_is_refused(saved: Saved) -> None:
    with pytest.raises(ConfigError, match="give a function that makes one"):
        load_masked(saved[0], saved[1])  # type: ignore[arg-type]  # what a user may do
