"""What pruning single weights costs: modes ``speed``, ``memory``, ``llmcompressor``."""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from weights_cells import BUDGETS, METHODS, Cell, Setting, pruned

from prunegraph.core.files import write_json
from prunegraph.core.pattern import Pattern
from prunegraph.layerwise.blocks import BlockWalk, Matrix
from prunegraph.layerwise.solve import Hessian
from prunegraph.layerwise.weights import prunable_weights
from prunegraph.methods.obs.base import BlockwiseMethod
from prunegraph.methods.obs.magnitude import _largest as largest
from prunegraph.runs.report.report import machine

Row = dict[str, Any]

MAIN = Path(__file__).parent / "weights.py"
PEER = Path(__file__).parent / "weights_llmcompressor.py"

SPEED_METHODS = ("magnitude", "wanda", "sparsegpt", "thanos", "apt", "apt, mask=staged")

SPEED_BLOCKS = 3
"""Blocks whose matrices mode ``speed`` prunes: the first, the last, and those between."""

SPEED_SEQUENCES = 8
"""Calibration windows of mode ``speed``: as many tokens as the widest layer needs, and more."""

DEPTHS = (6, 12, 24, 30)
"""Blocks of mode ``memory``."""


def speed(options: argparse.Namespace, setting: Setting) -> None:
    """Print the CPU seconds of each method on the same matrices, and their ratio to SparseGPT's."""
    sequences = min(options.sequences, SPEED_SEQUENCES)
    task = replace(setting, sequences=sequences).task(options.calibration, 0)
    weights = prunable_weights(task.model)
    blocks = sorted({name.split(".layers.")[1].split(".")[0] for name in weights}, key=int)
    places = np.linspace(0, len(blocks) - 1, SPEED_BLOCKS).round().astype(int).tolist()
    chosen = [f".layers.{blocks[place]}." for place in places]
    weights = {
        name: layout for name, layout in weights.items() if any(part in name for part in chosen)
    }
    matrices: list[Matrix] = []

    def note(matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
        matrices.append(matrix)
        return matrix.weight, torch.ones_like(matrix.weight, dtype=torch.bool)

    batches = list(task.batches(task.train, 2))
    walk = BlockWalk(task.model, weights, batches, task.forward)
    walk.run(note)
    rows: dict[str, Row] = {}
    for budget in options.budgets:
        seconds = {
            name: min(_seconds(name, budget, matrices) for _ in range(2)) for name in SPEED_METHODS
        }
        rows[budget] = seconds
        print(f"{budget}, {len(matrices)} matrices of {len(chosen)} blocks:", flush=True)
        for name, value in seconds.items():
            print(f"| {name} | {value:.2f} s | {value / seconds['sparsegpt']:.2f} |", flush=True)
    if options.out is not None:
        write_json(options.out, {"cpu_seconds": rows, "machine": machine()})


def _seconds(name: str, budget: str, matrices: Sequence[Matrix]) -> float:
    """Return the CPU seconds of a method on matrices, the factors of Hessians included."""
    method, pattern = METHODS[name], Pattern.parse(BUDGETS[budget].pattern or "unstructured")
    fresh: dict[int, Hessian] = {}  # matrices that read the same share one
    started = time.process_time()
    for matrix in matrices:
        (given,) = matrix.hessians
        hessian = fresh.setdefault(id(given), copy.copy(given))  # without factors: nobody asked
        zeros = matrix.weight.numel() // 2
        if isinstance(method, BlockwiseMethod):
            method.prune_matrix(matrix.weight, hessian, zeros, pattern)
        else:
            largest(matrix.weight, zeros, pattern)
    return time.process_time() - started


def memory(options: argparse.Namespace) -> None:
    """Print the peak of memory beyond the networks for some numbers of blocks."""
    rows = []
    for layers in DEPTHS if options.layers is None else (options.layers,):
        for method in options.methods or ("sparsegpt", "apt"):
            command = [sys.executable, str(MAIN), "peak", "--methods", method]
            for name in ("model", "text", "calibration", "window", "sequences"):
                command += [f"--{name}", str(getattr(options, name))]
            command += ["--layers", str(layers)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = json.loads(answer)
            rows.append({"layers": layers, "method": method, **row})
            beyond = row["peak_bytes"] - row["copy_bytes"] - row["mask_bytes"]
            print(
                f"| {method} | {layers} blocks | network {row['model_bytes'] / 1e6:.0f} MB | "
                f"beyond it, its pruned copy and mask {beyond / 1e6:.0f} MB |",
                flush=True,
            )
    if options.out is not None:
        write_json(options.out, {"rows": rows, "machine": machine()})


def peak_of_one(options: argparse.Namespace, setting: Setting) -> None:
    """Print what one pruning takes, as JSON."""
    cell = Cell(method=options.methods[0], budget="50 %", calibration=options.calibration)
    task = setting.task(cell.calibration, 0)
    print(json.dumps(pruned(task, cell, score=False)[1]))


def llmcompressor(options: argparse.Namespace, setting: Setting) -> None:
    """Print perplexity and seconds of llm-compressor's modifiers beside ours, on equal windows."""
    if options.python is None:
        sys.exit("give --python: the interpreter of an environment that has llmcompressor")
    rows = []
    for budget in options.budgets:
        for method, theirs in (("wanda", "Wanda"), ("sparsegpt", "SparseGPT")):
            task = setting.task(options.calibration, 0)
            cell = Cell(method=method, budget=budget, calibration=options.calibration)
            windows = setting.windows(options.test)
            result, found = pruned(task, cell, score=False)
            assert result.model is not None
            own = {"perplexity": task.score(result.model, windows).value, **found}
            del result
            ids = torch.cat([batch["input_ids"] for batch in task.batches(task.train, 1)])
            peer = _peer(task.model, ids, theirs, budget, options)
            peer["perplexity"] = task.score(task.model, windows).value
            rows.append({"method": method, "budget": budget, "ours": own, "theirs": peer})
            for side, row in (("prunegraph", own), ("llm-compressor", peer)):
                print(
                    f"| {method} | {budget} | {side} | {row['perplexity']:.2f} | "
                    f"{row['cpu_seconds']:.0f} s |",
                    flush=True,
                )
    if options.out is not None:
        write_json(options.out, {"rows": rows, "machine": machine()})


def _peer(
    model: torch.nn.Module, ids: torch.Tensor, name: str, budget: str, options: argparse.Namespace
) -> Row:
    """Prune a network in place by llm-compressor, in its own environment; return seconds."""
    given = BUDGETS[budget]
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "windows.npy", ids.numpy())
        command = [str(options.python), str(PEER), str(options.model), folder, name]
        command += [str(given.sparsity), given.pattern or "0:0"]
        command += [] if options.layers is None else [str(options.layers)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found: Row = json.loads((Path(folder) / "found.json").read_text())
        changed = load_file(Path(folder) / "changed.safetensors")
    if changed.keys() != prunable_weights(model).keys():
        sys.exit(f"{name} of llm-compressor did not change just the weights that ours do")
    zeros = sum(int((item == 0).sum()) for item in changed.values())
    with torch.no_grad():
        for parameter, item in changed.items():
            model.get_parameter(parameter).copy_(item)
    return {**found, "sparsity": zeros / sum(item.numel() for item in changed.values())}
