import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegraph.artefacts.pruned import (
    MASK_FILE,
    WEIGHTS_FILE,
    PrunedInfo,
    checksum,
    load_pruned,
    read_info,
    save_pruned,
)
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ArtefactError, ConfigError, MaskError, ModelError
from prunegraph.core.masks import ChannelMask
from prunegraph.core.splits import Dataset
from prunegraph.core.tensors import state_tensors
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.apply import apply_mask
from prunegraph.models import build_model

INFO = PrunedInfo(
    arch="digits_resnet",
    num_classes=10,
    example_shape=(1, 1, 8, 8),
    mean=(0.5,),
    std=(0.25,),
    extra={"seed": 3},
)


def build() -> nn.Module:
    return build_model("digits_resnet", num_classes=10, image_shape=(1, 8, 8))


@pytest.fixture
def saved(
    tmp_path: Path,
    digits: Dataset,
    digits_net: nn.Module,
    digits_graph: StructureGraph,
    make_mask: Callable[..., ChannelMask],
) -> tuple[Path, nn.Module, ChannelMask]:
    mask = make_mask(digits_graph, 0)
    pruned = apply_mask(digits_net, digits_graph, mask)
    pruned.train()(torch.randn(16, *digits.image_shape))  # other batch-norm buffers
    pruned.eval().to(memory_format=torch.channels_last)
    save_pruned(tmp_path / "run", model=pruned, mask=mask, graph=digits_graph, info=INFO)
    return tmp_path / "run", pruned, mask


Saved = tuple[Path, nn.Module, ChannelMask]


def test_a_saved_network_comes_back(saved: Saved, digits_graph: StructureGraph) -> None:
    directory, pruned, mask = saved
    before = torch.random.get_rng_state()
    loaded = load_pruned(directory, build)
    assert torch.equal(before, torch.random.get_rng_state())
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(loaded.model(x), pruned(x))
    expected = pruned.state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in loaded.model.state_dict().items())
    assert loaded.mask == mask
    assert loaded.info == INFO == read_info(directory)
    assert loaded.graph.fingerprint() == digits_graph.fingerprint()
    assert sorted(file.name for file in directory.iterdir()) == [MASK_FILE, WEIGHTS_FILE]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.8, 0.97])
def test_a_changed_byte_in_the_mask_file_is_named(saved: Saved, share: float) -> None:
    path = saved[0] / MASK_FILE
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ArtefactError, match=r"mask\.json is damaged"):
        load_pruned(saved[0], build)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_changed_byte_in_the_weights_is_named(saved: Saved, share: float) -> None:
    path = saved[0] / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ArtefactError, match=r"pruned\.safetensors"):
        load_pruned(saved[0], build)


def test_truncated_and_missing_files_are_named(saved: Saved) -> None:
    weights, mask = saved[0] / WEIGHTS_FILE, saved[0] / MASK_FILE
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtefactError, match=r"pruned\.safetensors is truncated"):
        load_pruned(saved[0], build)
    weights.unlink()
    with pytest.raises(ArtefactError, match=r"no file .*pruned\.safetensors"):
        load_pruned(saved[0], build)
    mask.unlink()
    with pytest.raises(ArtefactError, match=r"no file .*mask\.json"):
        load_pruned(saved[0], build)


def rewrite(directory: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change ``mask.json`` and make its checksum right again: a forger, not an accident."""
    path = directory / MASK_FILE
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps({**record, "checksum": checksum(record)}))


def test_nan_in_the_weights_is_named(saved: Saved, digits_graph: StructureGraph) -> None:
    directory, pruned, mask = saved
    with torch.no_grad():
        pruned.fc.weight[0, 0] = float("nan")
    save_pruned(directory, model=pruned, mask=mask, graph=digits_graph, info=INFO)
    with pytest.raises(ArtefactError, match=r"pruned\.safetensors.*fc\.weight holds NaN"):
        load_pruned(directory, build)


def test_another_network_is_refused(saved: Saved) -> None:
    def wider() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))

    with pytest.raises(ArtefactError, match=r"mask\.json describes .* another structure"):
        load_pruned(saved[0], wider)
    with pytest.raises(ConfigError, match="build_model is a Sequential: give a function"):
        load_pruned(saved[0], wider())


def test_what_the_mask_did_not_leave_is_not_written(
    saved: Saved, digits_net: nn.Module, digits_graph: StructureGraph, tmp_path: Path
) -> None:
    with pytest.raises(ArtefactError, match="give the network that apply_mask returned"):
        save_pruned(tmp_path / "b", model=digits_net, mask=saved[2], graph=digits_graph, info=INFO)
    zeros = WeightMask({"conv1.weight": torch.ones(16, 1, 3, 3, dtype=torch.bool)})
    with pytest.raises(MaskError, match="not of channels: save_masked writes it"):
        save_pruned(tmp_path / "b", model=saved[1], mask=zeros, graph=digits_graph, info=INFO)  # type: ignore[arg-type]
    assert not (tmp_path / "b").exists()


def test_forged_bits_are_refused(saved: Saved, digits_graph: StructureGraph) -> None:
    def swap(record: dict[str, object]) -> None:
        bits = bytearray(bytes.fromhex(record["mask"]["keep"]))
        bits[5] ^= 1
        record["mask"]["keep"] = bits.hex()

    rewrite(saved[0], swap)
    with pytest.raises(ArtefactError, match=r"mask\.json.*(digest|legal mask)"):
        load_pruned(saved[0], build)


def test_weights_of_another_mask_are_refused(
    saved: Saved,
    digits_net: nn.Module,
    digits_graph: StructureGraph,
    make_mask: Callable[..., ChannelMask],
    tmp_path: Path,
) -> None:
    directory, _, mask = saved
    other = make_mask(digits_graph, 1)
    pruned = apply_mask(digits_net, digits_graph, other)
    save_pruned(tmp_path / "b", model=pruned, mask=other, graph=digits_graph, info=INFO)
    content = (tmp_path / "b" / WEIGHTS_FILE).read_bytes()
    (directory / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(ArtefactError, match=r"pruned\.safetensors is not the file"):
        load_pruned(directory, build)

    def adopt(record: dict[str, object]) -> None:
        record["weights"]["sha256"] = hashlib.sha256(content).hexdigest()

    rewrite(directory, adopt)
    assert mask != other
    with pytest.raises(ArtefactError, match=r"pruned\.safetensors does not fit the network"):
        load_pruned(directory, build)


def test_missing_keys_and_future_schemas_are_named(saved: Saved) -> None:
    rewrite(saved[0], lambda record: record.pop("arch"))
    with pytest.raises(ArtefactError, match=r"mask\.json: arch is missing"):
        read_info(saved[0])
    rewrite(saved[0], lambda record: record.update(schema=99))
    with pytest.raises(ArtefactError, match=r"mask\.json has schema 99"):
        read_info(saved[0])


def test_tied_parameters_are_written_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.two = nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    assert sorted(state_tensors(Tied())) == ["one.bias", "one.weight", "two.bias"]


def test_example_inputs_that_could_not_be_read_back_are_refused(
    tmp_path: Path, digits_net: nn.Module, digits_graph: StructureGraph
) -> None:
    large = dataclasses.replace(INFO, example_shape=(128, 3, 224, 224))
    with pytest.raises(ArtefactError, match="analyse it on one image"):
        save_pruned(
            tmp_path / "run",
            model=digits_net,
            mask=digits_graph.dense_mask(),
            graph=digits_graph,
            info=large,
        )
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_written_leaves_the_earlier_files_alone(
    saved: Saved, digits_net: nn.Module, digits_graph: StructureGraph
) -> None:
    folder, *_ = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def save(model: nn.Module, info: PrunedInfo) -> None:
        mask = digits_graph.dense_mask()
        save_pruned(folder, model=model, mask=mask, graph=digits_graph, info=info)

    with pytest.raises(ArtefactError, match=r"mask\.json cannot hold .*float32.*plain numbers"):
        save(digits_net, dataclasses.replace(INFO, extra={"accuracy": np.float32(0.9)}))

    class Tempered(type(digits_net)):  # type: ignore[misc]  # of any class
        def get_extra_state(self) -> dict[str, float]:
            return {"temperature": 3.0}

    tempered = copy.deepcopy(digits_net)
    tempered.__class__ = Tempered

    with pytest.raises(ArtefactError, match="_extra_state of the network's state is of type dict"):
        save(tempered, INFO)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


class Tokens(nn.Module):
    """A network that takes whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one = nn.Embedding(32, 8), nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.one(self.embed(tokens)).relu().mean(1))


def test_a_network_of_tokens_comes_back_with_its_example(tmp_path: Path) -> None:
    net, tokens = Tokens().eval(), torch.arange(12).view(2, 6)
    graph = analyse(net, tokens)
    mask = graph.project(np.arange(graph.num_units, dtype=np.float32), Budget(keep_macs=0.6))
    pruned = apply_mask(net, graph, mask)
    info = dataclasses.replace(INFO, example_shape=(2, 6))
    save_pruned(tmp_path / "run", model=pruned, mask=mask, graph=graph, info=info)
    with pytest.raises(ModelError):
        load_pruned(tmp_path / "run", Tokens)
    loaded = load_pruned(tmp_path / "run", Tokens, tokens)
    torch.testing.assert_close(loaded.model(tokens), pruned(tokens))
