"""Cells of the benchmark ``weights.py``: one method, budget, calibration text and seed each.

A cell is pruned and scored in a process of its own, so that its peak of memory is its own.
"""

import re
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunegraph.core.budget import Budget
from prunegraph.core.splits import TestSplit
from prunegraph.core.task import Task
from prunegraph.data.text import TokenWindows, read_tokens
from prunegraph.methods.context import make_problem
from prunegraph.methods.method import Result
from prunegraph.methods.obs.apt import APT
from prunegraph.methods.obs.base import BlockwiseMethod
from prunegraph.methods.obs.magnitude import Magnitude
from prunegraph.methods.obs.sparsegpt import SparseGPT
from prunegraph.methods.obs.thanos import Thanos
from prunegraph.methods.obs.wanda import Wanda
from prunegraph.models.pretrained import load_pretrained, load_tokenizer
from prunegraph.tasks.causal_lm import CausalLM, causal_lm
from prunegraph.tasks.texts import encoder
from prunegraph.training.loop import FinetuneConfig, finetune

DENSE = "dense"
TEST = "wikitext2-test"

METHODS: Mapping[str, Magnitude | BlockwiseMethod] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "sparsegpt": SparseGPT(),
    "thanos": Thanos(),
    "thanos, 10 % of the rows dense": Thanos(outlier_rows=0.1),
    "apt": APT(),
    "apt, mask=m": APT(mask="m"),
    "apt, mask=staged": APT(mask="staged"),
}

BUDGETS: Mapping[str, Budget] = {
    "50 %": Budget(sparsity=0.5),
    "2:4": Budget(pattern="2:4"),
    "4:8": Budget(pattern="4:8"),
    "columns, 20 %": Budget(sparsity=0.2, pattern="columns"),
    "columns, 30 %": Budget(sparsity=0.3, pattern="columns"),
}

SEQUENCES = 32
"""Calibration windows."""

FIRST = 8
"""Test windows of a quick score."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cells of a table share.

    Attributes:
        model: folder of the network.
        text: folder of the texts ``NAME.txt.gz``, or of token arrays ``NAME.npy``.
        window: tokens of a calibration window.
        test_window: of a test window.
        sequences: calibration windows.
        layers: blocks that are kept of the network, the first ones; None = all.
    """

    model: Path
    text: Path
    window: int = 512
    test_window: int = 1024
    sequences: int = SEQUENCES
    layers: int | None = None

    def tokens(self, name: str) -> Tensor:
        """Return a text as tokens ``[n]``."""
        array = self.text / f"{name}.npy"
        if array.is_file():
            return read_tokens(array, None, name).flatten()
        tokenizer = load_tokenizer(self.model)
        return read_tokens(self.text / f"{name}.txt.gz", encoder(tokenizer), name)

    def task(self, calibration: str, seed: int) -> CausalLM:
        """Return the task, with calibration windows drawn by the seed."""
        tokens = self.tokens(calibration)
        count = len(tokens) // self.window
        rows = tokens[: count * self.window].view(count, self.window)
        model = load_pretrained(self.model)
        if self.layers is not None:
            shorten(model, self.layers)
        return causal_lm(
            model, calibration=rows, calibration_tokens=self.sequences * self.window, seed=seed
        )

    def windows(self, name: str, *, whole: bool = False) -> TestSplit:
        """Return the first windows of a test text, or all."""
        source = TokenWindows(self.tokens(name), self.test_window)
        return TestSplit(source, torch.arange(len(source) if whole else min(FIRST, len(source))))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One pruned network.

    Attributes:
        method: a name of ``METHODS``, or ``DENSE``.
        budget: a name of ``BUDGETS``; empty of the dense network.
        calibration: text that it is calibrated on.
        seed: draws its windows.
        tests: texts that it is scored on.
    """

    method: str
    budget: str = ""
    calibration: str = "wikitext2-valid"
    seed: int = 0
    tests: tuple[str, ...] = (TEST,)

    @property
    def file(self) -> str:
        """Name of the file of its figures."""
        parts = [self.method, self.budget, self.calibration, str(self.seed)]
        return re.sub(r"[^0-9a-z]+", "-", " ".join(parts).lower()).strip("-") + ".json"


def shorten(model: nn.Module, layers: int) -> None:
    """Keep the first blocks of a Llama alone."""
    inner: Any = model.model
    inner.layers = inner.layers[:layers]
    inner.config.num_hidden_layers = layers


def measure(cell: Cell, setting: Setting, *, whole: bool) -> dict[str, Any]:
    """Prune and score; return the figures."""
    task = setting.task(cell.calibration, cell.seed)
    model = task.model
    found: dict[str, Any] = {}
    if cell.method != DENSE:
        result, found = pruned(task, cell, score=True)
        model = result.model or result.mask.apply(task.model)  # type: ignore[union-attr]
        found["sparsity"] = result.mask.sparsity  # type: ignore[union-attr]
    scores = {}
    for name in cell.tests:
        scores[name] = {"first": task.score(model, setting.windows(name)).value}
        if whole:
            scores[name]["whole"] = task.score(model, setting.windows(name, whole=True)).value
    return {**asdict(cell), **found, "perplexity": scores}


def pruned(task: CausalLM, cell: Cell, *, score: bool) -> tuple[Result, dict[str, Any]]:
    """Prune; return the result, and time, memory and errors."""
    problem = make_problem(task, None, BUDGETS[cell.budget], seed=cell.seed, reconstruct=False)
    before = forget_peak()
    cpu, wall = time.process_time(), time.perf_counter()
    result = METHODS[cell.method].prune(problem)
    found: dict[str, Any] = {
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "peak_bytes": peak() - before,
        "copy_bytes": 0 if result.model is None else num_bytes(result.model),
        "mask_bytes": result.mask.size,  # type: ignore[union-attr]  # of a WeightMask: a byte each
        "model_bytes": num_bytes(task.model),
    }
    errors = result.details.get("errors", {})
    if score and errors:
        found["mean_error"] = sum(errors.values()) / len(errors)
    return result, found


def recover(
    task: Task, model: nn.Module, *, epochs: int, rank: int, seed: int, checkpoint: Path
) -> None:
    """Fine-tune a pruned network on the calibration windows, half by the dense one's outputs.

    Args:
        task: the dense network and its text.
        model: the network, changed in place.
        epochs: passes over the windows.
        rank: of LoRA; 0 = all weights are trained.
        seed: of the order.
        checkpoint: where an interrupted training is kept.
    """
    recipe = FinetuneConfig(
        epochs=epochs,
        batch_size=2,
        peak_lr=1e-4,
        warmup_epochs=0.1 * epochs,
        optimizer="adamw",
        distill_weight=0.5,
        lora_rank=rank,
    )
    finetune(
        model.requires_grad_(), task, recipe, seed=seed, teacher=task.model, checkpoint=checkpoint
    )
    checkpoint.unlink(missing_ok=True)


def num_bytes(model: nn.Module) -> int:
    """Return the bytes of a network's parameters."""
    return sum(item.numel() * item.element_size() for item in model.parameters())


def forget_peak() -> int:
    """Start to measure the peak of resident memory anew, where Linux does; return what is held."""
    held = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak()
    return held


def peak() -> int:
    """Return the peak of resident memory in bytes."""
    return _status("VmHWM")


def _status(field: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(next(_fields(text, field))) * 1024


def _fields(text: str, field: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.startswith(f"{field}:"):
            yield line.split()[1]
