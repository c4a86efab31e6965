"""The agent, CEM, random search and heuristics on a language model, each with as many networks.

A killed run goes on: rows lie in ``OUT/rows.json``, what searches have measured beside them.
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import prunegraph as pg
from prunegraph.core.files import write_json
from prunegraph.core.splits import TestSplit
from prunegraph.evaluation.log import OutcomeLog
from prunegraph.methods.context import Context
from prunegraph.methods.registry import make_method
from prunegraph.tasks.causal_lm import CausalLM

HEURISTICS = ("obs/skip_full", "wanda/skip_full", "flap/skip_full", "l1/skip_full", "obs/uniform")
SEARCHES = ("agent", "random_search", "cem")


def row(
    context: Context, name: str, keep: float, seed: int, networks: int, log: Path
) -> dict[str, Any]:
    """Return what a method reaches, fitted at once, on the search and on the test text."""
    kept = OutcomeLog(log, {"row": log.stem, "networks": networks})
    problem = context.problem(
        pg.Budget(keep_params=keep), seed=seed, max_networks=networks, log=kept
    )
    started = time.process_time()
    with problem.evaluator.watched(lambda count: kept.write()):
        result = make_method(name).prune(problem)
    seconds, task = time.process_time() - started, context.task
    outcome = problem.evaluator.evaluate(result.channels)
    return {
        "networks": result.networks,
        "divergence": outcome.kl,
        "search_perplexity": math.exp(outcome.loss),
        "test_perplexity": task.score(problem.evaluator.prune(result.channels), task.test).value,
        "cpu_seconds": seconds,
        "widths": context.graph.group_widths(result.channels),
    }


def load(options: argparse.Namespace) -> CausalLM:
    """Return the task, its test text cut to as many windows as are asked for."""
    task = pg.tasks.causal_lm(
        options.model,
        calibration=options.calibration,
        test=options.test,
        window=options.window,
        calibration_tokens=options.tokens,
    )
    assert task.test is not None
    index = task.test.index[: options.test_windows]
    return pg.tasks.causal_lm(
        task.model,
        task.tokenizer,
        calibration=task.train,
        search=task.search,
        test=TestSplit(task.test.source, index),
    )


def main() -> None:
    """Make every row that is not made yet, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "calibration", "test", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--window", type=int)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--test-windows", type=int, default=64)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--networks", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path, task = options.out / "rows.json", load(options)
    rows = json.loads(path.read_text()) if path.exists() else {}
    graph = pg.analyse(task.model, task.example_inputs)
    context = Context(task=task, structure=graph, layer_by_layer=False)
    make = partial(row, context)
    for seed in range(options.seeds):
        for keep in options.keep:
            for name in (*(HEURISTICS if seed == 0 else ()), *SEARCHES):
                key = f"{name.replace('/', '-')}-{keep:g}-{seed}"
                if key not in rows:
                    networks = options.networks if name in SEARCHES else 0
                    rows[key] = make(name, keep, seed, networks, options.out / f"{key}.json")
                    write_json(path, rows)
                    print(key, rows[key], flush=True)


if __name__ == "__main__":
    main()
