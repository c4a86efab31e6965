"""What an analysis costs, beside one forward and beside Torch-Pruning, and where its time goes.

Processor time of one thread, and the peak of resident memory beyond the loaded network. Each
network runs in a process of its own; both tools run in it, one after the other. Weights are random.

    pip install -e '.[benchmark]'
    python benchmarks/structure_speed.py --out structure-speed.json [--only resnet18 llama_12 ...]
    python benchmarks/structure_speed.py --profile resnet50 [--lines 40]
"""

import argparse
import contextlib
import cProfile
import json
import math
import pstats
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
import transformers
from structure_cases import Case, Outputs, build
from structure_peer import build_graph, make_pruner, peer_form
from structure_worker import draw_mask, output_layers

from prunegraph.core.files import write_json
from prunegraph.graph import analyse, evaluation_mode
from prunegraph.graph.apply import apply_mask
from prunegraph.runs.report.report import machine

VISION = (
    *("resnet18", "resnet50", "resnet152", "mobilenet_v3_large", "efficientnet_b0"),
    *("efficientnet_b4", "densenet121", "convnext_tiny", "vit_b_16", "regnet_y_3_2gf", "swin_t"),
)
REPEAT_WITHIN = 4.0
"""Seconds within which a timing is repeated, to take the least."""

MIB = 1 << 20

MOST_MIB = 10_000
"""Address space of a worker: Torch-Pruning's pruner of swin_t takes what there is."""


def llama(layers: int, width: int, heads: int, keys: int, inner: int, words: int) -> Any:
    """Return a Llama that returns its logits alone."""
    config = transformers.LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        intermediate_size=inner,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return Outputs(transformers.LlamaForCausalLM(config), "logits")


def cases() -> dict[str, Case]:
    """Return the networks by name."""
    found = {
        name: Case(
            build=partial(torchvision.models.get_model, name, weights=None), shape=(1, 3, 224, 224)
        )
        for name in VISION
    }
    for layers in (12, 24, 48):
        make = partial(llama, layers, 768, 12, 12, 2048, 1000)
        found[f"llama_{layers}"] = Case(build=make, shape=(1, 32), tokens=1000)
    make = partial(llama, 30, 576, 9, 3, 1536, 49152)
    return found | {"smollm2_135m": Case(build=make, shape=(1, 32), tokens=49152)}


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the least processor time of a few calls, and the last result."""
    times: list[float] = []
    while not times or (len(times) < 3 and sum(times) < REPEAT_WITHIN):
        start = time.process_time()
        result = function()
        times.append(time.process_time() - start)
    return min(times), result


def resident(field: str) -> float:
    """Return a line of this process's memory in MiB: ``VmRSS`` now, ``VmHWM`` at its peak."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in text.splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak_beyond(function: Callable[[], Any]) -> float:
    """Return the MiB by which resident memory rises at most while a function runs."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def measure(name: str) -> dict[str, Any]:
    """Return the row of one network."""
    case = cases()[name]
    model, example = build(case), case.example()

    def forward() -> None:
        with evaluation_mode(model):
            model(example)

    row: dict[str, Any] = {"forward": seconds(forward)[0]}
    row["weights_mib"] = sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
    row["peak_mib"] = peak_beyond(lambda: analyse(model, example))
    row["proved"], graph = seconds(lambda: analyse(model, example))
    row["unproved"], _ = seconds(lambda: analyse(model, example, trial=False))
    row["cut"], _ = seconds(lambda: apply_mask(model, graph, draw_mask(graph, 0)))
    dense = peer_form(model)
    row["peer_graph"], _ = seconds(lambda: build_graph(dense, example))
    paths = [
        path
        for path, module in model.named_modules()
        if any(module is layer for layer in output_layers(model, graph))
    ]

    def peer_job() -> None:
        ignored = [dense.get_submodule(path) for path in paths]
        make_pruner(dense, example, ignored).step()

    start = time.process_time()
    with contextlib.suppress(Exception):  # its pruned network may not run
        peer_job()
        row["peer_job"] = time.process_time() - start
    return row


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Return what is compared: analysis and whole job over the peer's, peak over the weights."""
    job = row.get("peer_job", math.nan)
    return {
        "forwards": row["proved"] / row["forward"],
        "proved": row["proved"] / row["peer_graph"],
        "unproved": row["unproved"] / row["peer_graph"],
        "job": (row["proved"] + row["cut"]) / job,
        "job_unproved": (row["unproved"] + row["cut"]) / job,
        "memory": row["peak_mib"] / row["weights_mib"],
    }


def profile(name: str, lines: int) -> None:
    """Print the functions of an analysis by the processor time inside them and below them."""
    case = cases()[name]
    model, example = build(case), case.example()
    analyse(model, example)  # imports and first calls are no part of it
    profiler = cProfile.Profile(time.process_time)
    profiler.runcall(analyse, model, example)
    stats = pstats.Stats(profiler)
    stats.sort_stats("cumulative").print_stats("prunegraph|deepcopy", lines)
    stats.sort_stats("tottime").print_stats(lines)


def show(name: str, row: dict[str, Any]) -> None:
    """Print the line of one network."""
    if "proved" not in row:
        print(f"{name}: {row['error']}", flush=True)
        return
    told = ", ".join(f"{key} {value:.2f}" for key, value in ratios(row).items())
    print(f"{name}: {row['proved']:.2f} s, unproved {row['unproved']:.2f} s; {told}", flush=True)


def main() -> None:
    """Measure the networks, each in its own process, and print ratios and their means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[*cases()])
    parser.add_argument("--out", type=Path, default=Path("structure-speed.json"), metavar="FILE")
    parser.add_argument("--profile", metavar="NAME", choices=[*cases()], help="of one network")
    parser.add_argument("--lines", type=int, default=40, help="of each of the profile's tables")
    parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.profile:
        profile(options.profile, options.lines)
        return
    if options.worker:
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MIB * MIB, MOST_MIB * MIB))
        print(json.dumps(measure(options.worker)))
        return
    rows: dict[str, Any] = {}
    for name in options.only or cases():
        command = [sys.executable, __file__, "--worker", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        last = (done.stdout if not done.returncode else done.stderr).strip().splitlines()[-1:]
        rows[name] = {"error": last} if done.returncode else json.loads(last[0])
        show(name, rows[name])
        write_json(options.out, {"rows": rows, "machine": machine()})
    whole = [ratios(row) for row in rows.values() if "proved" in row]
    for key in whole[0] if whole else ():
        known = [row[key] for row in whole if not math.isnan(row[key])]
        print(f"{key}: {math.exp(sum(map(math.log, known)) / max(len(known), 1)):.2f}")


if __name__ == "__main__":
    main()
