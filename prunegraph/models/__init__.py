"""Target networks by name, and their weights files."""

from prunegraph.models.build import KNOWN_MODELS, build_model, check_arch
from prunegraph.models.configs import resized_network, within_config
from prunegraph.models.library import (
    load,
    pretrained_folder,
    published_info,
    published_weights,
    settled,
)
from prunegraph.models.pretrained import (
    load_encoder,
    load_pretrained,
    load_tokenizer,
    save_pretrained_layout,
)
from prunegraph.models.weights import (
    WeightsInfo,
    check_weights_file,
    load_weights,
    save_weights,
    weights_info,
)

__all__ = [
    "KNOWN_MODELS",
    "WeightsInfo",
    "build_model",
    "check_arch",
    "check_weights_file",
    "load",
    "load_encoder",
    "load_pretrained",
    "load_tokenizer",
    "load_weights",
    "pretrained_folder",
    "published_info",
    "published_weights",
    "resized_network",
    "save_pretrained_layout",
    "save_weights",
    "settled",
    "weights_info",
    "within_config",
]
