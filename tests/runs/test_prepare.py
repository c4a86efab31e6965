"""Weights that options name, or that a library publishes."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from prunegraph.core.errors import ConfigError, ModelError
from prunegraph.runs.options.config import NetworkConfig, PruneConfig
from prunegraph.runs.options.yaml_file import parse, to_dict
from prunegraph.runs.target import measure_cost, pretrain_recipe
from prunegraph.runs.tasks.image_classification import with_published_weights
from prunegraph.runs.tasks.kind import pretraining_of
from prunegraph.runs.tasks.registry import with_folder


def test_a_network_of_a_library_gets_its_published_weights_on_imagenet_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.get_model_weights("resnet18").DEFAULT.url
    path = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save({}, path)
    arch, other = "torchvision:resnet18", Path("other.pth")
    assert with_published_weights(NetworkConfig(arch=arch, dataset="imagenet")).weights == path
    for config in (
        NetworkConfig(arch=arch, dataset="cifar10"),
        NetworkConfig(arch=arch, dataset="imagenet", pretrain_epochs=1),
        NetworkConfig(arch=arch, dataset="imagenet", weights=other),
        NetworkConfig(arch="resnet20", dataset="imagenet"),
    ):
        assert with_published_weights(config) == config


def test_a_folder_of_transformers_may_be_named_as_elsewhere(tmp_path: Path) -> None:
    words = ["magnitude", "--task", "causal_lm", "--weights", f"hf:{tmp_path}"]
    config = parse(PruneConfig, words)
    assert isinstance(config, PruneConfig)
    assert with_folder(config).weights == tmp_path
    assert to_dict(config)["weights"] == f"hf:{tmp_path}"
    plain = NetworkConfig(weights=Path("a.safetensors"))
    assert with_folder(plain) == plain


def test_a_name_that_is_nowhere_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="give a folder, or copy the repository") as error:
        with_folder(NetworkConfig(weights=Path("hf:no/where")))
    assert "\n" not in str(error.value)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        queries = self.query(tokens)[:, None]
        return functional.scaled_dot_product_attention(queries, queries, queries, is_causal=True)


def test_the_products_of_a_fused_attention_count() -> None:
    cost = measure_cost(Attention(), torch.randn(1, 5, 8))
    assert cost.macs == 5 * 8 * 8 + 2 * 5 * 5 * 8
    assert cost.params == 72


def test_a_network_without_weights_is_trained_for_as_many_epochs_as_asked() -> None:
    recipe = pretrain_recipe(40)
    assert pretraining_of(NetworkConfig(), recipe) == recipe
    asked = pretraining_of(NetworkConfig(pretrain_epochs=2), recipe)
    assert asked == pretrain_recipe(2)
    assert pretraining_of(NetworkConfig(pretrain_epochs=0), recipe) is None
    weights = Path("a.safetensors")
    assert pretraining_of(NetworkConfig(weights=weights), recipe) is None
    with pytest.raises(ConfigError, match="--weights and --pretrain-epochs exclude each other"):
        pretraining_of(NetworkConfig(weights=weights, pretrain_epochs=2), recipe)
