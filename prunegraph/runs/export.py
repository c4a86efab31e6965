"""``prunegraph export``: the pruned network of a run as a file for other programs."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from prunegraph.artefacts.export import export, export_recipe
from prunegraph.artefacts.masked import MaskedNetwork, bits_path, load_masked, save_masked
from prunegraph.artefacts.pruned import (
    PrunedInfo,
    PrunedNetwork,
    artefact_paths,
    load_pruned,
    read_info,
)
from prunegraph.artefacts.sparse import save_sparse
from prunegraph.core.console import Console
from prunegraph.core.errors import ArtefactError, ConfigError
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.checks import check_trusted
from prunegraph.runs.options.tasks import IMAGES
from prunegraph.runs.options.tools import ExportConfig
from prunegraph.runs.options.yaml_file import read_yaml
from prunegraph.runs.parallel.machine import resolve_device
from prunegraph.runs.report.report import pruned_folder, read_report
from prunegraph.runs.tasks.registry import TASKS, kind_of_saved

FILE_NAMES = {
    "onnx": "pruned.onnx",
    "torch-export": "pruned.pt2",
    "safetensors": "exported.safetensors",
    "sparse": "pruned.sparse",
}
"""The file of each format in a run folder."""

MOST_CLASSES = 10
"""Classes that are named where people read them."""


def run_export(config: ExportConfig, console: Console) -> dict[str, Any]:
    """Write the file, and return where it is, how large, and what its network expects."""
    resolve_device(config.device)
    path = _path(config)
    saved = of_language(read_run(config.run, config.arch), config.language)
    info, example = saved.info, kind_of_saved(saved.info).example(saved.info, config.seed)
    inputs = input_details(info)
    files = [path]
    if config.format == "sparse":
        if not isinstance(saved, MaskedNetwork):
            msg = f"{config.run} holds no network with zeros in place: give another --format"
            raise ConfigError(msg)
        save_sparse(path, saved.model, saved.mask)
    elif config.format == "safetensors" and isinstance(saved, MaskedNetwork):
        save_masked(path, model=saved.model, mask=saved.mask, info=info)
        files += [artefact_paths(path)[0], bits_path(path)]
    elif config.format == "safetensors" and isinstance(saved, PrunedNetwork):
        export_recipe(saved, example, path, _builder(config.run, None, info))
        files.append(artefact_paths(path)[0])
    else:
        texts = {name: json.dumps(value) for name, value in inputs.items()}
        export(
            saved.model,
            example,
            path,
            format=config.format,
            dynamic_axes=config.dynamic_axes,
            metadata=texts,
        )
    size = path.stat().st_size
    names = " and ".join(map(str, files))
    console.say(f"{info.arch}, pruned, as {config.format}: {names} ({size:,} bytes)")
    console.say(_in_words(inputs, config.dynamic_axes))
    return {
        "command": config.command,
        "arch": info.arch,
        "format": config.format,
        "file": str(path),
        "files": [str(each) for each in files],
        "bytes": size,
        **inputs,
    }


def of_language(
    saved: PrunedNetwork | MaskedNetwork, language: str | None
) -> PrunedNetwork | MaskedNetwork:
    """Return the network of one language, where there is a mask for each.

    Raises:
        ConfigError: the language is not named, or unknown.
    """
    names = list(saved.mask.groups) if isinstance(saved, MaskedNetwork) else [""]
    if names == [""] and language is None:
        return saved
    if not isinstance(saved, MaskedNetwork) or language not in names:
        if names == [""]:
            msg = f"--language {language}: the run has one mask, not one a language: drop it"
        else:
            msg = f"the run has a mask for each language: give --language {' or '.join(names)}"
        raise ConfigError(msg)
    mask = saved.mask.groups[language]
    return MaskedNetwork(model=mask.apply(saved.model), mask=mask, info=saved.info)


def input_details(info: PrunedInfo) -> dict[str, Any]:
    """Return what a network expects, and its classes, by name; what is not known is left out.

    ``input_shape`` is that of one input, without the batch; ``mean`` and ``std`` are those of each
    channel, for pixels in [0, 1]; left out where a data set of the user's own names none.
    """
    details: dict[str, Any] = {"input_shape": list(info.example_shape[1:])}
    mean, std = info.mean or (), info.std or ()
    if any(mean) or any(value != 1.0 for value in std):  # else they are taken as they come
        details |= {"mean": list(mean), "std": list(std)}
    classes = info.extra.get("classes")
    if isinstance(classes, list):
        details["classes"] = [str(name) for name in classes]
    return details


def _in_words(inputs: dict[str, Any], dynamic_axes: Sequence[int]) -> str:
    """Return what a network expects in one line."""
    shape = ["batch", *inputs["input_shape"]]
    for axis in dynamic_axes:
        shape[axis] = "any"
    words = f"it takes inputs of shape {shape}".replace("'", "")
    if "mean" in inputs:
        words += f", pixels in [0, 1] minus mean {inputs['mean']}, divided by std {inputs['std']}"
    if "classes" in inputs:
        classes = inputs["classes"]
        more = ", ..." * (len(classes) > MOST_CLASSES)
        words += f"; its {len(classes)} classes: {', '.join(classes[:MOST_CLASSES])}{more}"
    return "".join(letter if letter.isprintable() else "?" for letter in words)


def _path(config: ExportConfig) -> Path:
    """Return the file to write: ``--out``, or the format's own in the network's folder.

    Raises:
        ConfigError: ``--out`` is there already.
    """
    if config.out is None:
        folder = config.run.parent if config.run.is_file() else config.run
        return folder / FILE_NAMES[config.format]
    written = [config.out]
    if config.format == "safetensors":
        written += [artefact_paths(config.out)[0], bits_path(config.out)]
    for path in written:
        if path.exists() or path.is_symlink():
            msg = f"{path} exists, and nothing is replaced: give another --out"
            raise ConfigError(msg)
    return config.out


def read_run(run: Path, trusted: str | None) -> PrunedNetwork | MaskedNetwork:
    """Read a pruned network; code is run if ``trusted`` names it.

    Args:
        run: a run folder, that of a network in it, or a network's ``.safetensors`` file.
        trusted: the network's name, if the user gave it.
    """
    inside = run / RunFolder.PRUNED
    where = inside if artefact_paths(inside)[0].is_file() else run
    _check_holds_network(where)
    info = read_info(where)
    check_trusted(info.arch, trusted, artefact_paths(where)[0])
    if bits_path(where).is_file():
        return load_masked(where, _builder(run, where, info))
    return load_pruned(where, _builder(run, None, info), kind_of_saved(info).example(info, 0))


def _builder(run: Path, folder: Path | None, info: PrunedInfo) -> Callable[[], nn.Module]:
    """Return what makes the dense network of a run.

    Args:
        run: what the user named.
        folder: a network of transformers with zeros in place; None: the run's options name it.
        info: the network's record.
    """
    kind = kind_of_saved(info)
    of_images = kind is TASKS[IMAGES]  # whose names say how they are built
    return partial(kind.build, None if of_images else folder or _dense_folder(run), info)


def _dense_folder(run: Path) -> Path | None:
    """Return the folder of the dense network that the options of a run name; None: embedded.

    Raises:
        ArtefactError: the options are not there.
    """
    for folder in (run, *run.parents):
        path = folder / RunFolder.CONFIG
        if path.is_file():
            weights = read_yaml(path).get("weights")
            return None if weights is None else Path(str(weights))
    msg = f"{run} lies in no run folder, whose {RunFolder.CONFIG} names the dense network: name one"
    raise ArtefactError(msg)


def _check_holds_network(run: Path) -> None:
    """Raise ArtefactError if a run holds its networks in cells: names the pruned one's."""
    folder = RunFolder(path=run)
    if run.is_file() and not artefact_paths(run)[0].is_file():
        msg = f"{run} is no run folder: name the --out of an earlier run"
        raise ArtefactError(msg)
    if artefact_paths(run)[0].exists():
        return
    if not folder.file(RunFolder.REPORT).is_file():
        msg = f"{run} holds no {artefact_paths(run)[0].name}: name the --out of a finished run"
        raise ArtefactError(msg)
    content = read_report(folder)
    if content["command"] != "compare":
        return
    cell = pruned_folder(folder, content)
    where = f"{run}/cells/..., one of its cells" if cell is None else f"{cell}, its pruned network"
    msg = f"{run} is a comparison of many networks: name {where}"
    raise ArtefactError(msg)
