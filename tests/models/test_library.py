"""Networks of libraries by name: from their caches, without a network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import prunegraph as pg
from prunegraph.cli.main import main
from prunegraph.core.errors import ModelError
from prunegraph.models import build_model, published_info, published_weights
from prunegraph.models.library import repository

SMALL = "torchvision:shufflenet_v2_x0_5"


@pytest.fixture
def torch_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Return a network whose weights lie in torch's cache as if they were the published ones."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    model = torchvision.models.shufflenet_v2_x0_5()
    url = torchvision.models.get_model_weights("shufflenet_v2_x0_5").DEFAULT.url
    path = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(model.state_dict(), path)
    return model


def in_hub(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a repository in a cache of the Hugging Face Hub."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(folder))
    commit = 40 * "0"
    repository = folder / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def no_network(*_: Any, **__: Any) -> None:
    msg = "Name or service not known"
    raise OSError(msg)


def test_weights_of_torchvision_come_from_its_cache(torch_cache: nn.Module) -> None:
    model = pg.load(SMALL)
    assert not model.training
    assert torch.equal(model.fc.weight, torch_cache.fc.weight)
    assert pg.load(SMALL, weights=False, num_classes=7).fc.out_features == 7


def test_without_a_network_one_sentence_says_where_weights_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(
        ModelError, match=r"not in the cache and cannot be fetched .*: put .*pth"
    ) as e:
        pg.load("torchvision:resnet18")
    assert str(tmp_path) in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet19", "the nearest: resnet18, resnet1"),
        ("timm:resnet19", "the nearest: resnet18"),
        ("resnet18", "is of no library that is known here"),
        ("hf:nowhere/at-all", "cannot be fetched .*: give a folder"),
    ],
)
def test_a_typo_is_one_sentence(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not name.startswith(("torch", "resnet")):
        pytest.importorskip("timm")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=message) as error:
        pg.load(name)
    assert "\n" not in str(error.value)


def test_weights_of_timm_come_from_the_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    save_file = pytest.importorskip("safetensors.torch").save_file
    snapshot = in_hub(tmp_path, "timm/resnet10t.c3_in1k", monkeypatch)
    torch.manual_seed(0)
    dense = timm.create_model("resnet10t")
    save_file(dense.state_dict(), snapshot / "model.safetensors")
    model = pg.load("timm:resnet10t")
    assert torch.equal(model.fc.weight, dense.fc.weight)
    assert published_weights("timm:resnet10t") == snapshot / "model.safetensors"


def test_weights_of_timm_say_how_they_want_their_images() -> None:
    pytest.importorskip("timm")
    info = published_info("timm:vit_tiny_patch16_224")
    assert info is not None
    assert (info.mean, info.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert info.extra == {"image_size": 224}
    assert published_info(SMALL) is None


@pytest.mark.parametrize("name", ["timm:resnet10t", "timm:vit_tiny_patch16_224"])
def test_a_network_of_timm_is_built_for_the_images(name: str) -> None:
    pytest.importorskip("timm")
    model = build_model(name, num_classes=7, image_shape=(1, 32, 32))
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_folder_of_transformers_is_loaded_by_its_own_class(llama: Path) -> None:
    model = pg.load(f"hf:{llama}")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training


def test_a_repository_in_the_cache_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = in_hub(tmp_path / "hub", "someone/small", monkeypatch)
    assert repository("someone/small", "hf:someone/small") == snapshot


def test_inspect_shows_a_network_of_transformers(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--arch", f"hf:{llama}"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.1.mlp.gate_proj" in out
    assert "logits" in out or "model output" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arch", "timm:resnet19"], "the nearest: resnet18"),
        (["--arch", "hf:nowhere"], "give a folder, or copy the repository nowhere into"),
    ],
)
def test_bad_names_on_the_command_line_are_one_sentence(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("timm")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["inspect", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("processor", "mean", "std", "side"),
    [
        ({"size": {"height": 48, "width": 48}}, 0.5, 0.25, 48),
        ({"size": {"shortest_edge": 64}, "crop_size": 40}, 0.5, 0.25, 40),
        ({"do_normalize": False}, 0.0, 1.0, None),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, 0.5, 0.2, None),
        ({"rescale_factor": 1 / 127.5, "rescale_offset": True}, 0.75, 0.125, None),
    ],
)
def test_a_folder_of_transformers_says_how_it_wants_its_images(
    processor: dict[str, Any], mean: float, std: float, side: int | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    numbers = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(numbers | processor))
    info = published_info(f"hf:{tmp_path}", "folder")
    assert info is not None
    assert info.dataset == "folder"
    assert info.mean == pytest.approx([mean] * 3)
    assert info.std == pytest.approx([std] * 3)
    assert info.extra.get("image_size") == side


def test_a_damaged_image_processor_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": "x", "image_std": [1.0]}')
    with pytest.raises(ModelError, match=r"preprocessor_config\.json: image_mean"):
        published_info(f"hf:{tmp_path}")
