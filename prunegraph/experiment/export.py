"""``prunegraph export``: the pruned network of a run as a file for other programs."""

from pathlib import Path
from typing import Any

import torch

from prunegraph.experiment.config import ExportConfig
from prunegraph.experiment.console import Console
from prunegraph.models import build_model
from prunegraph.pruning.artefacts import load_pruned, read_info
from prunegraph.pruning.export import export

FILE_NAMES = {
    "onnx": "pruned.onnx",
    "torch-export": "pruned.pt2",
    "safetensors": "exported.safetensors",
}


def run_export(config: ExportConfig, console: Console) -> dict[str, Any]:
    """Write the file, and return where it is and how large."""
    info = read_info(config.run)
    shape = info.example_shape
    image_shape = (shape[1], shape[2], shape[3])
    saved = load_pruned(
        config.run,
        lambda: build_model(info.arch, num_classes=info.num_classes, image_shape=image_shape),
    )
    path: Path = config.out or config.run / FILE_NAMES[config.format]
    generator = torch.Generator().manual_seed(config.seed)
    export(saved.model, torch.randn(shape, generator=generator), path, format=config.format)
    size = path.stat().st_size
    console.say(f"{info.arch}, pruned, as {config.format}: {path} ({size:,} bytes)")
    return {
        "command": config.command,
        "arch": info.arch,
        "format": config.format,
        "file": str(path),
        "bytes": size,
    }
