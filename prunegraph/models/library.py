"""Networks of libraries by name, with the weights that were published with them.

Weights are read from the library's own cache, and fetched into it where there is a network. No
pickle is unpacked, and no code of a file is run.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from prunegraph.core.errors import ModelError, nearest, one_line
from prunegraph.core.extras import Late, library
from prunegraph.core.user_code import HF_PREFIX, TIMM_PREFIX, TORCHVISION_PREFIX
from prunegraph.models.pretrained import images_of, load_pretrained, read_config, transformers
from prunegraph.models.weights import WeightsInfo, load_weights

torchvision = Late("torchvision")

NEEDED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""Files of a repository that are fetched: weights, config, tokenizer."""

# Auxiliary heads return tuples in training and are dropped in use; init_weights=None warns; their
# published weights were trained on images in [-1, 1], which transform_input makes.
GOOGLENETS = {"aux_logits": False, "init_weights": True, "transform_input": True}
TORCHVISION_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": GOOGLENETS,
    "inception_v3": GOOGLENETS,
}


def load(name: str, *, weights: bool = True, num_classes: int | None = None) -> nn.Module:
    """Return a network of a library, in eval mode, on the CPU.

    Args:
        name: ``"torchvision:NAME"``, ``"timm:NAME"``, or ``"hf:FOLDER_OR_NAME"``, a folder that
            ``save_pretrained`` of transformers has written, or a repository of the Hugging Face
            Hub. Nothing is fetched that the library's cache holds.
        weights: whether it gets the published weights; a network of ``hf:`` always does.
        num_classes: outputs of a classifier of images, where it gets none.

    Raises:
        ConfigError: the library is not installed.
        ModelError: there is no such network; its weights are not in the cache, and there is no
            network to fetch them by; or they cannot be read.
    """
    if weights and num_classes is not None:
        msg = f"{name}: published weights have their own classes: give weights=False too"
        raise ModelError(msg)
    given = {} if num_classes is None else {"num_classes": num_classes}
    if name.startswith(HF_PREFIX):
        return _load_hf(name.removeprefix(HF_PREFIX))
    check_library_name(name)
    if name.startswith(TIMM_PREFIX):
        overlay = {"file": str(published_weights(name))} if weights else None
        network = create_timm(name, pretrained=weights, pretrained_cfg_overlay=overlay, **given)
        return network.eval()
    plain = name.removeprefix(TORCHVISION_PREFIX)
    arguments = TORCHVISION_ARGUMENTS.get(plain, {}) | given
    model: nn.Module = torchvision.models.get_model(plain, weights=None, **arguments)
    if weights:
        load_weights(model, published_weights(name))
    return model.eval()


def check_library_name(name: str) -> None:
    """Raise ModelError if a library has no network of a name; the nearest are named."""
    if name.startswith(HF_PREFIX):
        read_config(pretrained_folder(name))
        return
    for prefix, names in ((TORCHVISION_PREFIX, torchvision_names), (TIMM_PREFIX, timm_names)):
        if name.startswith(prefix):
            own, known = name.removeprefix(prefix), names()
            if own.partition(".")[0] not in known:
                near = nearest(own, known)
                msg = f"{prefix[:-1]} has no classification network {own!r}; the nearest: {near}"
                raise ModelError(msg)
            return
    msg = (
        f"{name!r} is of no library that is known here: give torchvision:NAME, timm:NAME, "
        "hf:FOLDER or hf:NAME"
    )
    raise ModelError(msg)


def torchvision_names() -> list[str]:
    """Return the names of torchvision's classification networks."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def timm_names() -> list[str]:
    """Return the names of timm's networks."""
    names: list[str] = _timm().list_models()
    return names


def create_timm(name: str, **arguments: Any) -> nn.Module:
    """Return a network of timm.

    Args:
        name: with the library's prefix.
        arguments: of ``timm.create_model``.

    Raises:
        ModelError: it cannot be made so.
    """
    try:
        model: nn.Module = _timm().create_model(name.removeprefix(TIMM_PREFIX), **arguments)
    except Exception as error:  # timm raises about anything
        msg = f"{name} cannot be built: {one_line(error, 300)}"
        raise ModelError(msg) from error
    return model


def published_weights(name: str) -> Path:
    """Return the file of the weights that a library publishes for a network; of ``hf:`` a folder.

    Args:
        name: with the library's prefix.

    Raises:
        ModelError: there are none, or they are not in the cache and cannot be fetched.
    """
    if name.startswith(HF_PREFIX):
        return pretrained_folder(name)
    if name.startswith(TIMM_PREFIX):
        config = _timm().get_pretrained_cfg(name.removeprefix(TIMM_PREFIX))
        if config is None or not config.hf_hub_id:
            msg = f"timm publishes no weights for {name}: give a weights file of your own"
            raise ModelError(msg)
        return repository(config.hf_hub_id, name) / "model.safetensors"
    weights = torchvision.models.get_model_weights(name.removeprefix(TORCHVISION_PREFIX))
    if not len(weights):
        msg = f"torchvision publishes no weights for {name}: give a weights file of your own"
        raise ModelError(msg)
    address: str = weights.DEFAULT.url
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(address).path).name)
    if not path.is_file():
        begin = re.search(r"-([0-9a-f]{8,})\.", path.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(
            name,
            f"put {path.name} into {path.parent}",
            lambda: torch.hub.download_url_to_file(
                address, str(path), hash_prefix=begin and begin[1], progress=False
            ),
        )
    return path


def published_info(name: str, dataset: str | None = "imagenet") -> WeightsInfo | None:
    """Return how published weights want their images; None = as all of ImageNet.

    Args:
        name: with the library's prefix.
        dataset: what the weights are for.

    Raises:
        ModelError: a folder of ``hf:`` does not say it.
    """
    if name.startswith(HF_PREFIX):
        mean, std, side = images_of(pretrained_folder(name))
    elif name.startswith(TIMM_PREFIX):
        config = _timm().get_pretrained_cfg(name.removeprefix(TIMM_PREFIX))
        mean, std, side = tuple(config.mean), tuple(config.std), config.input_size[1]
    else:
        return None
    size = {} if side is None else {"image_size": side}
    return WeightsInfo(arch=name, dataset=dataset, mean=mean, std=std, extra=size)


def repository(hub_name: str, name: str) -> Path:
    """Return the folder of a repository of the Hugging Face Hub, from its cache if it is there.

    Args:
        hub_name: of the repository.
        name: what errors call it.

    Raises:
        ConfigError: the library ``huggingface_hub`` is not installed.
        ModelError: it is not in the cache and cannot be fetched.
    """
    hub = library(f"{name} needs", "huggingface_hub", "lm")
    try:
        return Path(hub.snapshot_download(hub_name, local_files_only=True))
    except Exception:  # it is not there, or no name of a repository
        where = Path(hub.constants.HF_HUB_CACHE)
        return Path(
            _fetch(
                name,
                f"give a folder, or copy the repository {hub_name} into {where}",
                lambda: hub.snapshot_download(hub_name, allow_patterns=NEEDED),
            )
        )


def pretrained_folder(name: str) -> Path:
    """Return the folder of ``hf:FOLDER_OR_NAME``, or of a name without the prefix."""
    plain = name.removeprefix(HF_PREFIX)
    folder = Path(plain).expanduser()
    return folder if folder.is_dir() else repository(plain, f"{HF_PREFIX}{plain}")


def settled(name: str) -> str:
    """Return a network's name with the path of ``hf:FOLDER`` made absolute."""
    folder = Path(name.removeprefix(HF_PREFIX)).expanduser()
    of_folder = name.startswith(HF_PREFIX) and folder.is_dir()
    return f"{HF_PREFIX}{folder.absolute()}" if of_folder else name


def _load_hf(plain: str) -> nn.Module:
    folder = pretrained_folder(plain)
    config = read_config(folder)
    names = config.get("architectures") or ["AutoModel"]
    kind = str(names[0])
    if not kind.isidentifier() or not hasattr(transformers(), kind):
        msg = f"{folder} is of the class {ascii(kind)[:80]}, which transformers does not have"
        raise ModelError(msg)
    return load_pretrained(folder, kind=kind)


def _fetch(name: str, otherwise: str, get: Callable[[], Any]) -> Any:
    """Return what is fetched; ``otherwise`` says what to do where that cannot be."""
    try:
        return get()
    except Exception as error:  # of sockets, of the server, of the Hub
        msg = (
            f"the weights of {name} are not in the cache and cannot be fetched "
            f"({one_line(error, 120)}): {otherwise}"
        )
        raise ModelError(msg) from error


def _timm() -> Any:
    """Return the library, which is loaded when it is first needed.

    Raises:
        ConfigError: it is not installed.
    """
    return library("timm:NAME needs", "timm", "timm")
