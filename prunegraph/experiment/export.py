"""``prunegraph export``: the pruned network of a run as a file for other programs."""

from pathlib import Path
from typing import Any

import torch

from prunegraph.experiment.config import ExportConfig
from prunegraph.experiment.console import Console
from prunegraph.experiment.setup import build_dense, check_trusted
from prunegraph.pruning.artefacts import artefact_paths, load_pruned, read_info
from prunegraph.pruning.export import export, export_recipe

FILE_NAMES = {
    "onnx": "pruned.onnx",
    "torch-export": "pruned.pt2",
    "safetensors": "exported.safetensors",
}


def run_export(config: ExportConfig, console: Console) -> dict[str, Any]:
    """Write the file, and return where it is and how large."""
    info = read_info(config.run)
    check_trusted(info.arch, config.arch, artefact_paths(config.run)[0])
    saved = load_pruned(config.run, lambda: build_dense(info))
    path: Path = config.out or config.run / FILE_NAMES[config.format]
    generator = torch.Generator().manual_seed(config.seed)
    example = torch.randn(info.example_shape, generator=generator)
    files = [path]
    if config.format == "safetensors":
        export_recipe(saved, example, path, lambda: build_dense(info))
        files.append(artefact_paths(path)[0])
    else:
        export(saved.model, example, path, format=config.format)
    size = path.stat().st_size
    names = " and ".join(map(str, files))
    console.say(f"{info.arch}, pruned, as {config.format}: {names} ({size:,} bytes)")
    return {
        "command": config.command,
        "arch": info.arch,
        "format": config.format,
        "file": str(path),
        "files": [str(each) for each in files],
        "bytes": size,
    }
