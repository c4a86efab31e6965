"""Neurons leave a language model: StruPrune and MaskPrune at equal budgets, StruPrune's memory.

    python benchmarks/neurons.py table --model DIR --text DIR --out DIR [--plan rounds shares gates]
    python benchmarks/neurons.py memory --model DIR --text DIR [--layers 6 12 24 30]

``table`` measures each cell in turn and keeps it as a file; finished ones are not measured again.
``memory`` prints the peak of what torch allocates while modules are cut and fitted, beyond the
network and its pruned copy.
"""

import argparse
import gc
import json
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from weights_cells import TEST, Setting, num_bytes, recover

from prunegraph.core.budget import Budget
from prunegraph.core.files import write_json
from prunegraph.graph import analyse
from prunegraph.graph.rounding import restrict
from prunegraph.methods.context import make_problem
from prunegraph.methods.maskprune.method import MaskPrune
from prunegraph.methods.method import Problem
from prunegraph.methods.struprune.method import Pruning, StruPrune
from prunegraph.methods.struprune.modules import find_modules
from prunegraph.runs.report.report import machine
from prunegraph.tasks.causal_lm import CausalLM

HELD_OUT = 8
"""Windows beside those that are fitted on."""

PLANS: dict[str, list[StruPrune | MaskPrune]] = {
    "rounds": [StruPrune(rounds=0), StruPrune(rounds=4)],
    "shares": [
        StruPrune(rounds=4, allocation="softmax"),
        *(StruPrune(rounds=0, allocation="softmax", temperature=t) for t in (2.0, 4.0, 8.0)),
        StruPrune(rounds=0, allocation="softmax", importance="error"),
        StruPrune(rounds=0, allocation="auto"),
    ],
    "heads": [StruPrune(rounds=0, heads=True), StruPrune(rounds=4, heads=True)],
    "gates": [
        replace(MaskPrune(steps=60, batch_size=1), **given)
        for given in ({}, {"refit": False}, {"minimax": False}, {"lr": 0.0})
    ],
}
"""MaskPrune has gates on neurons alone, and one width for all layers."""


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("mode", choices=("table", "memory"))
    parser.add_argument("--model", type=Path, required=True, help="folder of the network")
    parser.add_argument("--text", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--out", type=Path, help="folder of cells")
    parser.add_argument("--calibration", default="wikitext2-valid", metavar="NAME")
    parser.add_argument("--test", default=TEST, metavar="NAME")
    parser.add_argument("--window", type=int, default=512, help="tokens of calibration windows")
    parser.add_argument("--sequences", type=int, default=40, help="windows that are fitted on")
    parser.add_argument("--share", type=float, default=0.533, help="of the neurons, that goes")
    parser.add_argument("--plan", nargs="+", choices=PLANS, default=["rounds"])
    parser.add_argument("--whole", action="store_true", help="score the whole test text, too")
    parser.add_argument("--recover", type=int, metavar="EPOCHS", help="fine-tune each row, too")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA; 0 = train all weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 24, 30])
    return parser.parse_args()


def problem_of(
    options: argparse.Namespace, seed: int, layers: int | None = None, *, uniform: bool = False
) -> tuple[CausalLM, Problem]:
    """Return a network, and the budget that is left without a share of its neurons.

    With ``uniform`` nothing but neurons may leave, and layers have one width.
    """
    setting = Setting(
        model=options.model,
        text=options.text,
        window=options.window,
        sequences=options.sequences + HELD_OUT,
        layers=layers,
    )
    task = setting.task(options.calibration, seed)
    few = {"input_ids": task.example_inputs["input_ids"][:, :16]}  # type: ignore[call-overload, index]
    graph = analyse(task.model, few)
    modules = find_modules(graph, task.model, heads=False)
    keep = np.ones(graph.num_units, dtype=bool)
    for module in modules:
        keep[module.units[: round(options.share * len(module.units))]] = False
    kept = graph.cost(keep).params / graph.dense_cost.params
    if uniform:
        others = set(map(int, graph.free_groups)) - {module.group for module in modules}
        graph = restrict(graph, dict.fromkeys(others, "neurons alone leave"), {})
    given = {"seed": seed, "reconstruct": False, "num_calibration": options.sequences}
    budget = Budget(keep_params=kept, uniform=uniform)
    return task, make_problem(task, graph, budget, **given)


def words_of(method: StruPrune | MaskPrune) -> str:
    """Return a method's name with the options that are not its defaults."""
    own = [
        f"{field.name}-{getattr(method, field.name)}"
        for field in fields(method)
        if getattr(method, field.name) != field.default
    ]
    return "-".join([method.name, *own])


def table(options: argparse.Namespace) -> None:
    """Measure the cells that are not there yet; print all."""
    plans = options.plan
    for seed, method in [(s, own) for s in options.seeds for plan in plans for own in PLANS[plan]]:
        words = words_of(method)
        path = options.out / f"{options.share}-{options.sequences}-{words}-{seed}.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        asked = {"whole": options.whole, "recovered": options.recover}
        if not known or any(value and name not in known for name, value in asked.items()):
            task, problem = problem_of(options, seed, uniform=isinstance(method, MaskPrune))
            problem = replace(problem, folder=path.with_suffix(""))
            started = time.process_time()
            result = method.prune(problem)
            seconds = time.process_time() - started
            setting = Setting(model=options.model, text=options.text)
            assert result.model is not None
            score = partial(task.score, result.model)
            found = {"perplexity": score(setting.windows(options.test)).value}
            if options.whole:
                found["whole"] = score(setting.windows(options.test, whole=True)).value
            if options.recover:
                given = {"epochs": options.recover, "rank": options.rank, "seed": seed}
                recover(task, result.model, **given, checkpoint=path.with_suffix(".checkpoint"))
                found["recovered"] = score(setting.windows(options.test)).value
            known = {"method": words, "seed": seed, **result.details, **found}
            write_json(path, {**known, "cpu_seconds": seconds, "machine": machine()})
        found = json.loads(path.read_text())
        print(
            f"| {words} | seed {seed} | {found['perplexity']:.2f} | "
            f"{found.get('whole', '')} | {found.get('recovered', '')} | "
            f"{found.get('allocation', '')} | {found['cpu_seconds']:.0f} s |",
            flush=True,
        )


def memory(options: argparse.Namespace) -> None:
    """Print the peak of torch's allocations for several depths."""
    for layers in options.layers:
        _, problem = problem_of(options, 0, layers)
        run = Pruning(StruPrune(rounds=2), problem)
        counts = run.counts({})
        gc.collect()
        started = time.process_time()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            run.walk.prune(counts, 2)
        seconds = time.process_time() - started
        size = num_bytes(problem.task.model)
        beyond = _peak(found) - size
        print(
            f"| {layers} blocks | network {size / 1e6:.0f} MB | beyond it and its copy "
            f"{beyond / 1e6:.0f} MB | {seconds:.0f} s |",
            flush=True,
        )


def _peak(found: Any) -> int:
    """Return the most bytes that were allocated at once, of those that a profile has seen."""
    events = [each for each in found.profiler.kineto_results.events() if each.name() == "[memory]"]
    sizes = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]
    return int(np.cumsum(sizes).max())


def main() -> None:
    """Run one mode."""
    options = parse()
    torch.set_num_threads(1)
    table(options) if options.mode == "table" else memory(options)


if __name__ == "__main__":
    main()
