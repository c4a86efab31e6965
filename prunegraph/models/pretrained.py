"""Networks in folders of transformers (``from_pretrained``): safetensors only."""

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunegraph.core.errors import ArtefactError, ConfigError, ModelError, is_panic, one_line
from prunegraph.core.extras import library
from prunegraph.core.reading import MAX_IMAGE_SIZE, checked, read_json, read_text
from prunegraph.core.seeding import seeded

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

ADAPTER = "adapter_config.json"
"""What peft writes in place of a config."""

PROCESSOR = "preprocessor_config.json"
"""What says how a folder's network wants its images."""

IMAGES_KIND = "AutoModelForImageClassification"

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""A tokenizer's folder holds at least one of them."""

TOKENIZER_FILES = (
    *VOCABULARIES,
    *("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", PROCESSOR),
)
"""What ``save_pretrained_layout`` copies, where there is such a file."""


def transformers() -> Any:
    """Return the library, which is loaded when it is first needed; it shows no progress.

    Raises:
        ConfigError: it is not installed.
    """
    found = library("networks in folders need", "transformers", "lm")
    found.utils.logging.disable_progress_bar()
    return found


def load_pretrained(
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    kind: str = "AutoModelForCausalLM",
) -> nn.Module:
    """Return the network of a folder, in eval mode, on the CPU.

    Nothing is downloaded, unpickled or run that the folder holds.

    Args:
        folder: what ``save_pretrained`` of transformers has written.
        dtype: type of its weights.
        kind: the class of transformers that loads it; default: that of causal language models.

    Raises:
        ConfigError: transformers is not installed.
        ModelError: the folder is missing, holds no safetensors, a quantised or incomplete network,
            one that needs code of its own, or weights of another network.
    """
    causal = kind == "AutoModelForCausalLM"
    what = "a causal language model" if causal else f"a {kind.removeprefix('AutoModelFor')}"
    model, missing = _load(folder, kind, what, dtype)
    if missing:
        msg = (
            f"{folder}: weights are of another network (missing_keys: {missing[0]}): copy it again"
        )
        raise ModelError(msg)
    return model


def build_image_classifier(
    folder: Path | str, num_classes: int, image_shape: tuple[int, int, int]
) -> nn.Module:
    """Return a classifier of images of a folder's config, with fresh weights, on the CPU.

    Args:
        folder: whose config is taken.
        num_classes: of its output.
        image_shape: (channels, height, width) of its images, where the config says them.

    Raises:
        ConfigError: transformers is not installed.
        ModelError: the folder has no config of such a network.
    """
    read_config(Path(folder))
    found = transformers()
    channels, height, width = image_shape
    sizes = {
        "num_labels": num_classes,
        "num_channels": channels,
        "image_size": height if height == width else [height, width],
    }
    try:
        config = found.AutoConfig.from_pretrained(folder, local_files_only=True)
        for name, size in sizes.items():
            if hasattr(config, name):
                setattr(config, name, size)
        model: nn.Module = getattr(found, IMAGES_KIND).from_config(config)
    except Exception as error:  # transformers raises about anything
        msg = f"{folder} is of no classifier of images {image_shape}: {one_line(error, 160)}"
        raise ModelError(msg) from error
    return model


def images_of(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...], int | None]:
    """Return mean and deviation of each channel, for pixels in [0, 1], and the side of images.

    The folder's image processor says the former, its config the latter, or else the processor.

    Raises:
        ModelError: a file is missing or damaged.
    """
    where, config = folder / PROCESSOR, read_config(folder)
    if not where.is_file():
        msg = (
            f"{folder} holds no {PROCESSOR}, which says how images are normalised: put one there, "
            'as {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
        )
        raise ModelError(msg)
    try:
        numbers = {"image_mean": tuple[float, ...], "image_std": tuple[float, ...]}
        told = checked(read_json(where), numbers, str(where))
        factor = 255 * (checked(told.get("rescale_factor", 1 / 255), float, str(where)) or 1.0)
    except ArtefactError as error:
        raise ModelError(str(error)) from error
    mean, std = told["image_mean"], told["image_std"]
    if told.get("do_normalize") is False:
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    factor = 255.0 if told.get("do_rescale") is False else factor
    shift = 1.0 if told.get("rescale_offset") is True else 0.0
    side = config.get("image_size") or told.get("crop_size") or told.get("size")
    if isinstance(side, dict):
        side = side.get("height", side.get("shortest_edge"))
    return (
        tuple((value + shift) / factor for value in mean),
        tuple(value / factor for value in std),
        side if isinstance(side, int) and 1 <= side <= MAX_IMAGE_SIZE else None,
    )


def load_encoder(folder: Path | str, num_outputs: int, seed: int) -> tuple[nn.Module, bool]:
    """Return a classifier of sequences, in eval mode, on the CPU, and whether its head is fresh.

    Args:
        folder: of a classifier, or of an encoder alone, whose head then gets weights of the seed.
        num_outputs: classes; 1 = a number.
        seed: of fresh weights.

    Raises:
        ConfigError: transformers is not installed.
        ModelError: see ``load_pretrained``, or it is a classifier of other classes.
    """
    with seeded(seed):
        model, missing = _load(
            folder,
            "AutoModelForSequenceClassification",
            "a classifier of sequences",
            torch.float32,
            num_labels=num_outputs,
        )
    body = f"{model.base_model_prefix}."
    within = [name for name in missing if name.startswith(body) and ".pooler." not in name]
    if within:
        msg = f"{folder}: weights are of another network (missing_keys: {within[0]}): copy it again"
        raise ModelError(msg)
    return model, bool(missing)


def _load(
    folder: Path | str, kind: str, what: str, dtype: torch.dtype, **given: Any
) -> tuple[nn.Module, list[str]]:
    """Return the network of a folder, and the names of weights that the folder lacks."""
    folder = Path(folder)
    _check_folder(folder)
    found = transformers()
    verbosity = found.utils.logging.get_verbosity()
    found.utils.logging.set_verbosity_error()  # missing weights are told by the caller
    try:
        model, info = getattr(found, kind).from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **given,
        )
    except Exception as error:  # transformers raises about anything
        msg = f"{folder} cannot be loaded as {what}: {one_line(error, 200)}; give the folder of one"
        raise ModelError(msg) from error
    finally:
        found.utils.logging.set_verbosity(verbosity)
    for wrong in ("mismatched_keys", "error_msgs"):
        if names := sorted(map(str, info.get(wrong) or ())):
            msg = f"{folder}: weights are of another network ({wrong}: {names[0]}): copy it again"
            raise ModelError(msg)
    return model.eval(), sorted(info["missing_keys"])


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config of a folder.

    Raises:
        ModelError: there is none that can be used, or it asks for code of its own.
    """
    if not folder.is_dir():
        msg = f"there is no folder {folder}: give one that save_pretrained has written"
        raise ModelError(msg)
    if (folder / ADAPTER).is_file() and not (folder / CONFIG).is_file():
        msg = (
            f"{folder} holds adapters (LoRA) and no whole network: merge them into the dense one, "
            "with merge_and_unload() of peft, and give the folder of that"
        )
        raise ModelError(msg)
    try:
        config = json.loads(read_text(folder / CONFIG))  # some hold Infinity
    except ArtefactError as error:
        raise ModelError(str(error)) from error
    except (ValueError, RecursionError) as error:
        msg = f"{folder / CONFIG} is damaged: it is no JSON ({one_line(error, 100)}); copy it again"
        raise ModelError(msg) from error
    _check_config(folder, config)
    return config  # type: ignore[no-any-return]  # checked to be one


def _check_folder(folder: Path) -> None:
    read_config(folder)
    try:
        index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    except ArtefactError as error:
        raise ModelError(str(error)) from error
    if (folder / WEIGHTS).is_file():
        return
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards:
        msg = f"{folder} holds no {WEIGHTS}"
        if any(folder.glob("*.bin")):
            msg += " but a pickle (.bin), which is never read: convert it to safetensors"
        else:
            msg += ": give the folder that holds the weights"
        raise ModelError(msg)
    for shard in sorted({str(name) for name in shards.values()}):
        if Path(shard).name != shard or not (folder / shard).is_file():
            msg = f"{folder} lacks the shard {ascii(shard)[:80]} of its weights: copy it too"
            raise ModelError(msg)


def _check_config(folder: Path, config: Any) -> None:
    where = folder / CONFIG
    if not isinstance(config, dict) or "model_type" not in config:
        msg = f"{where} names no model_type: give a folder that save_pretrained has written"
        raise ModelError(msg)
    if "auto_map" in config:
        msg = f"{where} asks for code of its own (auto_map), which is not run: build it yourself"
        raise ModelError(msg)
    if "quantization_config" in config or "compression_config" in config:
        msg = f"{where} is of a quantised network: give its float weights"
        raise ModelError(msg)


def has_tokenizer(folder: Path | str) -> bool:
    """Tell whether a folder holds the files of a tokenizer."""
    return any(Path(folder, name).is_file() for name in VOCABULARIES)


def load_tokenizer(folder: Path | str) -> Any:
    """Return the tokenizer of a folder.

    Raises:
        ConfigError: transformers is not installed.
        ModelError: the folder holds none, or one that needs code of its own.
    """
    folder = Path(folder)
    if not has_tokenizer(folder):
        msg = (
            f"{folder} holds no tokenizer ({', '.join(VOCABULARIES)}): copy its files there, or in "
            "Python give tokenizer="
        )
        raise ModelError(msg)
    settings = folder / "tokenizer_config.json"
    try:
        if settings.is_file() and '"auto_map"' in read_text(settings):
            msg = f"{settings} asks for code of its own (auto_map), which is not run"
            raise ModelError(msg)
        return transformers().AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (ModelError, ConfigError):
        raise
    except BaseException as error:  # transformers raises about anything
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        msg = f"the tokenizer in {folder} cannot be loaded: {one_line(error, 300)}"
        raise ModelError(msg) from error


def save_pretrained_layout(model: nn.Module, tokenizer: Any, out: Path | str) -> None:
    """Write a network of transformers as a folder that ``from_pretrained`` reads.

    It holds ``config.json``, ``generation_config.json``, ``model.safetensors`` (or its shards) and
    the tokenizer's files. ``AutoModelForCausalLM.from_pretrained(out)`` gives equal logits. Each
    file takes its place in one step.

    Args:
        model: the network.
        tokenizer: the folder whose files of a tokenizer are copied as they are, or a tokenizer of
            transformers; of another kind, or of None, nothing is kept.
        out: the folder to write; made if missing.

    Raises:
        ArtefactError: the network's config cannot hold it, or the files cannot be written.
    """
    out = Path(out)
    if misfit := config_misfit(model):
        msg = f"{out} cannot hold the network as a from_pretrained folder: {misfit}"
        raise ArtefactError(msg)
    transformers()  # shows no progress, in any process
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as made:
            model.save_pretrained(made)  # type: ignore[operator]  # of transformers
            _save_tokenizer(tokenizer, Path(made))
            out.mkdir(exist_ok=True)
            for file in sorted(Path(made).iterdir()):
                file.replace(out / file.name)
    except Exception as error:  # a full disk, a generation config that transformers refuses
        msg = f"cannot write {out}: {one_line(error, 300)}"
        raise ArtefactError(msg) from error


def _save_tokenizer(tokenizer: Any, out: Path) -> None:
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(out)
    for name in TOKENIZER_FILES if isinstance(tokenizer, str | Path) else ():
        if Path(tokenizer, name).is_file():
            shutil.copyfile(Path(tokenizer, name), out / name)


def config_misfit(model: nn.Module) -> str | None:
    """Say why a network cannot be made again from its own config; None if it can.

    Channels that were cut out where the config has one width for all layers do not fit, nor does an
    output layer that is no longer tied to the embedding.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        return f"{type(model).__name__} is no network of transformers"
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(config))
    expected, state = fresh.state_dict(), model.state_dict()
    if expected.keys() != state.keys():
        return f"{min(expected.keys() ^ state.keys())} is in one and not in the other"
    for name, value in expected.items():
        if state[name].shape != value.shape:
            return f"{name} has shape {list(state[name].shape)}, config says {list(value.shape)}"
    head, embedding = _tied(fresh)
    if head is not None and head is embedding:
        own_head, own_embedding = _tied(model)
        if not torch.equal(own_head, own_embedding):  # type: ignore[arg-type]  # both are there
            return "its output layer differs from the embedding that the config ties it to"
    return None


def _tied(model: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the weights of output layer and embedding."""
    layers = model.get_output_embeddings(), model.get_input_embeddings()
    head, embedding = (getattr(layer, "weight", None) for layer in layers)
    return head, embedding
