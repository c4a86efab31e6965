"""The networks of the benchmark ``structure.py``, with random weights, by list."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import structure_nets
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

TIMM = (
    "resnet50",
    "resnext50_32x4d",
    "convnext_tiny",
    "efficientnet_b0",
    "mobilenetv3_large_100",
    "regnety_008",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mixer_s32_224",
)
DETECTION = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "retinanet_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)
NO_AUXILIARY: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
SIDES = {"inception_v3": 299, "ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}
SIDE = 224


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network.

    Attributes:
        build: makes it.
        shape: of its example input, the batch included.
        tokens: size of the vocabulary, for networks that eat integers.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int | None = None

    def example(self, batch: int = 1) -> Tensor:
        """Return random inputs."""
        shape = (batch, *self.shape[1:])
        return torch.randn(shape) if self.tokens is None else torch.randint(self.tokens, shape)


class Outputs(nn.Module):
    """Returns the tensors of interest of a network that returns a dictionary or a record.

    Args:
        network: what is wrapped.
        key: name of the one output; None = all, as a tuple.
    """

    def __init__(self, network: nn.Module, key: str | None) -> None:
        super().__init__()
        self.network, self.key = network, key

    def forward(self, x: Tensor) -> Any:
        """Return the output, or a tuple of all."""
        outputs = self.network(x)
        return tuple(outputs.values()) if self.key is None else outputs[self.key]


def build(case: Case) -> nn.Module:
    """Build a network, in eval mode, whose outputs depend on its inputs.

    Layers of zeros, such as the head of torchvision's vit, are drawn anew, and batch norms get the
    statistics of random inputs: else signals vanish in some untrained networks, and differences
    would be compared with nothing.
    """
    torch.manual_seed(0)
    model = case.build().eval()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not bool(module.weight.any()):
            nn.init.normal_(module.weight, std=0.02)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    if norms:
        with torch.no_grad():
            model(case.example(batch=4))
    for norm, before in zip(norms, momentum, strict=True):
        norm.eval().momentum = before
    return model


def _classifier(name: str) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, **NO_AUXILIARY.get(name, {}))


def _segmentation(name: str) -> nn.Module:
    network = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    return Outputs(network, "out")


def _backbone(name: str) -> nn.Module:
    detector = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    return Outputs(detector.backbone, None)


def _vit() -> nn.Module:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(**sizes, intermediate_size=128, image_size=32, patch_size=8)
    return Outputs(transformers.ViTForImageClassification(config), "logits")


def _bert() -> nn.Module:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=128, **sizes, intermediate_size=128, num_labels=5)
    return Outputs(transformers.BertForSequenceClassification(config), "logits")


def _llama() -> nn.Module:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = transformers.LlamaConfig(
        vocab_size=128, **sizes, num_key_value_heads=2, intermediate_size=160, use_cache=False
    )
    return Outputs(transformers.LlamaForCausalLM(config), "logits")


def _images(name: str) -> tuple[int, ...]:
    side = SIDES.get(name, SIDE)
    return (1, 3, side, side)


def _zoo(names: tuple[str, ...] | list[str], maker: Callable[[str], nn.Module]) -> dict[str, Case]:
    return {name: Case(build=partial(maker, name), shape=_images(name)) for name in names}


def lists() -> dict[str, dict[str, Case]]:
    """Return every list of networks: list -> name -> case."""
    models = torchvision.models
    return {
        "torchvision": _zoo(models.list_models(module=models), _classifier),
        "segmentation": _zoo(models.list_models(module=models.segmentation), _segmentation),
        "detection": _zoo(DETECTION, _backbone),
        "timm": _zoo(TIMM, timm.create_model),
        "hf": {
            "vit": Case(build=_vit, shape=(1, 3, 32, 32)),
            "bert": Case(build=_bert, shape=(1, 12), tokens=128),
            "llama": Case(build=_llama, shape=(1, 12), tokens=128),
        },
        "own": {
            name: Case(build=network, shape=shape)
            for name, (network, shape) in structure_nets.NETS.items()
        },
    }
