"""Weights files: safetensors, or a state dict read without unpickling code; JSON beside them."""

import math
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from prunegraph.core.errors import ArtefactError
from prunegraph.core.files import write_bytes, write_json
from prunegraph.core.reading import MAX_IMAGE_SIZE, checked, read_json
from prunegraph.core.tensors import FLOATS, holds_numbers, read_safetensors
from prunegraph.models.pretrained import load_pretrained

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt", ".tar")
AVERAGES = ("state_dict_ema", "model_ema")  # moving averages, which training scripts validate
WRAPPERS = (*AVERAGES, "state_dict", "model_state_dict", "model", "net")  # what they put it under
PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel's, torch.compile's, Lightning's
AVERAGED = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, beside the network
BN_COUNTER = "num_batches_tracked"
AUXILIARY_HEADS = ("AuxLogits.", "aux1.", "aux2.")  # of torchvision's GoogLeNets


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """What the JSON beside a weights file says.

    Attributes:
        arch: the network's name for ``build_model``.
        dataset: the data set it was trained on, or None.
        mean: per-channel mean subtracted from its inputs, or None.
        std: per-channel standard deviation, or None.
        extra: every other key of the file.
    """

    arch: str
    dataset: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Load weights into ``model`` in place, or leave it untouched and say why not.

    ``.safetensors`` files and state dicts in files of ``torch.save`` (``TORCH_SUFFIXES``) are read;
    the latter by ``torch.load(weights_only=True)``, which runs no code. A ``state_dict`` wrapper is
    taken off (a moving average beside it is preferred, as timm does), and so are ``module.``,
    ``_orig_mod.`` and ``model.`` before all names, until the network knows one; missing BN counters
    are no error. Names that a network calls otherwise (``OTHER_NAMES``) are its own; auxiliary
    heads, which torchvision's networks have in training, are left out where the network has none.
    The folder of a network of transformers is read by that library.

    Args:
        model: the network.
        path: the weights file, or such a folder.

    Raises:
        ArtefactError: the file is missing, truncated, a pickle, of another network, or holds NaN.
    """
    path = Path(path)
    expected = model.state_dict()
    state = _strip_prefix(_read_state(path, model), expected)
    for other, own in getattr(model, "OTHER_NAMES", {}).items():
        state = {
            own + name.removeprefix(other) if name.startswith(other) else name: value
            for name, value in state.items()
        }
    state = {
        name: value
        for name, value in state.items()
        if name in expected or not name.startswith(AUXILIARY_HEADS)
    }
    _check_same_network(path, state, expected)
    _check_finite(path, state, expected)
    model.load_state_dict({**expected, **state})


def save_weights(model: nn.Module, path: Path | str, info: WeightsInfo) -> None:
    """Write the weights as safetensors and ``info`` as JSON beside them, each atomically.

    Args:
        model: the network.
        path: the weights file to write; must end in ``.safetensors``.
        info: what the JSON says.

    Raises:
        ArtefactError: the suffix is another one, or the files cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        msg = f"{path}: weights are written as safetensors; give a name ending in .safetensors"
        raise ArtefactError(msg)
    state = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    content: dict[str, Any] = {"arch": info.arch, "dataset": info.dataset}
    if info.mean is not None and info.std is not None:
        content["normalisation"] = {"mean": list(info.mean), "std": list(info.std)}
    # The weights come last: where they are, the JSON is too, whenever the writer is killed.
    write_json(path.with_suffix(".json"), {**content, **info.extra})
    write_bytes(path, safetensors.torch.save(state))


def weights_info(path: Path | str) -> WeightsInfo | None:
    """Read the JSON beside a weights file (``W.json`` for ``W.safetensors``).

    Returns:
        What it says, or None if there is no such file.

    Raises:
        ArtefactError: it is not JSON, or its keys are malformed.
    """
    path = Path(path)
    if path.is_dir():
        msg = (
            f"{path} is a folder: name the weights file in it, or give --arch hf:{path} if "
            "save_pretrained of transformers has written it"
        )
        raise ArtefactError(msg)
    path = path.with_suffix(".json")
    if not path.is_file():
        return None
    content = read_json(path)
    if isinstance(content, dict) and "network" in content and "arch" not in content:
        msg = f"{path} describes a trained policy, not a network: give it as --policy"
        raise ArtefactError(msg)
    content = checked(content, {"arch": str}, str(path))
    dataset = content.get("dataset")
    mean, std = _normalisation(path, content.get("normalisation"))
    size = content.get("image_size")
    if size is not None and not 1 <= checked(size, int, f"{path}: image_size") <= MAX_IMAGE_SIZE:
        msg = f"{path}: image_size is {size}, it must lie in 1 to {MAX_IMAGE_SIZE}"
        raise ArtefactError(msg)
    known = ("arch", "dataset", "normalisation")
    return WeightsInfo(
        arch=content["arch"],
        dataset=dataset if isinstance(dataset, str) else None,
        mean=mean,
        std=std,
        extra={key: value for key, value in content.items() if key not in known},
    )


def _normalisation(
    path: Path, value: object
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Check and return the mean and std of a weights JSON."""
    if value is None:
        return None, None
    shape = {"mean": tuple[float, ...], "std": tuple[float, ...]}
    both = checked(value, shape, f"{path}: normalisation")
    mean, std = both["mean"], both["std"]
    if not (len(mean) == len(std) > 0 and all(map(math.isfinite, mean + std)) and min(std) > 0):
        msg = f"{path}: mean {mean} and std {std} must be finite, of one length, and std above 0"
        raise ArtefactError(msg)
    return mean, std


def check_weights_file(path: Path) -> None:
    """Raise ArtefactError if there is no such file."""
    if not path.is_file():
        msg = f"no weights file {path}; check the path, or make one with `prunegraph pretrain`"
        raise ArtefactError(msg)


def _read_state(path: Path, model: nn.Module) -> Mapping[str, Tensor]:
    """Read the tensors of a file, or of a folder of a network, without running any code in it."""
    if path.is_dir():
        return load_pretrained(path, kind=type(model).__name__).state_dict()
    check_weights_file(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    if path.suffix not in TORCH_SUFFIXES:
        suffixes = ", ".join((".safetensors", *TORCH_SUFFIXES))
        msg = f"{path}: weights files end in one of {suffixes}"
        raise ArtefactError(msg)
    _check_unpacked_size(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old formats warn; what matters is raised
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        msg = (
            f"{path} is truncated or holds more than tensors, such as a pickled model, which could "
            "run code and is not read; save model.state_dict(), best as .safetensors"
        )
        raise ArtefactError(msg) from error
    return _unwrap(path, content)


def _check_unpacked_size(path: Path) -> None:
    """Refuse a zip whose members are larger than the file: torch stores them as they are."""
    if not zipfile.is_zipfile(path):
        return  # the format of torch before 1.6
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        msg = f"{path} is truncated or no file of torch ({error}); fetch it again"
        raise ArtefactError(msg) from error
    if size > path.stat().st_size:
        msg = f"{path} is packed: its {size:,} bytes may be a trap; save it with torch.save"
        raise ArtefactError(msg)


def _unwrap(path: Path, content: object) -> Mapping[str, Tensor]:
    """Return the state dict inside a training script's checkpoint."""
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict) and content[key]:
            content = content[key]
            break
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(name, str) for name in content)
        or not all(isinstance(value, Tensor) for value in content.values())
    ):
        msg = f"{path} holds no state dict (tensors by name); save model.state_dict()"
        raise ArtefactError(msg)
    return content


def _strip_prefix(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off what wrappers put before every name, in any order, until the network knows one."""
    names = {name: value for name, value in state.items() if name != AVERAGED or name in expected}
    for prefix in PREFIXES * 2:
        known = not names.keys().isdisjoint(expected)
        if not known and all(name.startswith(prefix) for name in names):
            names = {name.removeprefix(prefix): value for name, value in names.items()}
    return names


def _check_same_network(
    path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Compare names and shapes; name the first difference."""
    differences = [
        f"{name} is missing"
        for name in expected
        if name not in state and not name.endswith(BN_COUNTER)
    ]
    differences += [f"{name} is unexpected" for name in state if name not in expected]
    differences += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    differences += [
        f"{name} is {_describe(state[name])} instead of {_describe(value)}"
        for name, value in expected.items()
        if name in state and not _loadable(state[name], value)
    ]
    strange = next((name for name in state if name not in expected), None)
    if differences:
        if strange is not None and "missing" in differences[0]:
            differences[0] += f", where the file holds {strange}"
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        info = path.with_suffix(".json")
        hint = f"; {info.name} beside it says which" if info.is_file() else ""
        msg = (
            f"{path} is of another network: {differences[0]}{more}; "
            f"pass the architecture, image size and number of classes it was trained with{hint}"
        )
        raise ArtefactError(msg)


def _loadable(given: Tensor, expected: Tensor) -> bool:
    """Tell whether a tensor holds numbers that can be copied without changing what they are."""
    plain = given.layout == torch.strided and not given.is_meta and not given.is_quantized
    same = given.dtype in FLOATS if expected.dtype in FLOATS else given.dtype == expected.dtype
    return plain and same


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"


def _check_finite(path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity, by the tensor's name, but where the network's own buffer has it."""
    for name, value in state.items():
        if value.dtype in FLOATS and not holds_numbers(value):
            if bool((torch.isfinite(value) | (value == expected[name])).all()):
                continue  # such as a causal mask
            msg = f"{path}: tensor {name} holds NaN or infinity; train again or use another file"
            raise ArtefactError(msg)
