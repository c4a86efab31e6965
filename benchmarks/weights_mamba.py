"""Train a small Mamba-2 on stories, byte by byte, for ``weights.py``: no real one fits here.

Writes a folder that ``from_pretrained`` reads, with ``train.npy`` and ``test.npy`` (the last tenth
of the text) as tokens. A training that was killed goes on at its checkpoint, to the same end.

    python benchmarks/weights_mamba.py --text tinystories-2mb.txt.gz --out DIR [--steps 3000]
    python benchmarks/weights.py table --model DIR --text DIR --out CELLS --plan 50 2:4 4:8
        --calibration train --test test --whole --window 256 --test-window 256
"""

import argparse
import gzip
import io
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Mamba2Config, Mamba2ForCausalLM

from prunegraph.core.files import write_bytes, write_json
from prunegraph.runs.report.report import machine

WINDOW, BATCH = 256, 8
RATE, WARM_UP = 2e-3, 100
EVERY = 100
"""Steps between checkpoints."""


def main() -> None:
    """Train, or go on, and write the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, test = read(options.text)
    options.out.mkdir(parents=True, exist_ok=True)
    np.save(options.out / "train.npy", train.numpy().astype(np.int32))
    np.save(options.out / "test.npy", test.numpy().astype(np.int32))
    model, loss, seconds = fit(train, options)
    model.save_pretrained(options.out)
    found = {"steps": options.steps, "seed": options.seed, "loss": loss, "cpu_seconds": seconds}
    write_json(options.out / "training.json", {**found, "machine": machine()})
    print(f"{sum(item.numel() for item in model.parameters()):,} parameters, {found}")


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Return the bytes of a text as tokens: the first nine tenths, and the rest."""
    with gzip.open(path) as file:
        tokens = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()
    cut = len(tokens) * 9 // 10
    return tokens[:cut], tokens[cut:]


def network(seed: int) -> Any:
    """Return the untrained network."""
    torch.manual_seed(seed)
    config = Mamba2Config(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=4,
        num_heads=4,
        head_dim=64,
        state_size=16,
        n_groups=1,
        chunk_size=32,
        expand=2,
        use_cache=False,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Mamba2ForCausalLM(config)


def fit(tokens: Tensor, options: argparse.Namespace) -> tuple[Any, float, float]:
    """Train by AdamW; return the network, the mean loss of the last steps, and CPU seconds."""
    model = network(options.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    path = options.out / "checkpoint.pt"
    first, before, losses = 0, 0.0, []
    if path.is_file():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, before, losses = state["step"], state["seconds"], state["losses"]
    started = time.process_time()
    for step in range(first, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, options.steps)
        generator = torch.Generator().manual_seed(1_000_000 * options.seed + step)
        starts = torch.randint(len(tokens) - WINDOW - 1, (BATCH,), generator=generator)
        windows = torch.stack([tokens[start : start + WINDOW + 1] for start in starts.tolist()])
        logits = model(windows[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses = [*losses[1 - EVERY :], loss.item()]
        if (step + 1) % EVERY == 0:
            seconds = before + time.process_time() - started
            print(
                f"step {step + 1}: {np.mean(losses):.3f} nats a byte, {seconds:.0f} s", flush=True
            )
            _store(path, model, optimizer, step + 1, seconds, losses)
    return model.eval(), float(np.mean(losses)), before + time.process_time() - started


def rate(step: int, steps: int) -> float:
    """Return the learning rate of a step: a warm-up, then a cosine to a tenth."""
    if step < WARM_UP:
        return RATE * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(steps - WARM_UP, 1)
    return RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def _store(path: Path, model: Any, optimizer: Any, step: int, seconds: float, losses: Any) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    buffer = io.BytesIO()
    torch.save({**state, "step": step, "seconds": seconds, "losses": losses}, buffer)
    write_bytes(path, buffer.getvalue())


if __name__ == "__main__":
    main()
