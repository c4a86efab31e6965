"""Heuristics, random search, CEM and the agent on a language model at equal budgets.

    python benchmarks/searches_language.py --model DIR --text DIR --out DIR [--networks 300]

Budgets are shares of the parameters that are no embeddings. Each row is a file in OUT, with its
perplexity as it is cut and as it is fitted at once. A killed run goes on: what searches have
measured and the statistics of each seed lie in OUT, too. ``--whole`` adds the whole test text to
rows that are there, ``--recover`` what a fine-tune makes of the fitted network, ``--speed`` tokens
a CPU second, of the dense network too.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from weights_cells import TEST, Setting, recover

import prunegraph as pg
from prunegraph.agent.method import AgentSearch
from prunegraph.core.files import write_bytes, write_json
from prunegraph.core.masks import ChannelMask, pack_bits, unpack_bits
from prunegraph.core.tensors import read_safetensors, to_safetensors
from prunegraph.evaluation.log import OutcomeLog
from prunegraph.graph import StructureGraph, copy_network
from prunegraph.graph.apply import apply_mask
from prunegraph.graph.depth import with_depth
from prunegraph.methods.context import Context
from prunegraph.methods.method import Problem
from prunegraph.methods.registry import make_method
from prunegraph.models.pretrained import load_pretrained
from prunegraph.runs.report.report import machine
from prunegraph.tasks.causal_lm import CausalLM

HEURISTICS = ("l1/skip_full", "wanda/skip_full", "flap/skip_full", "obs/skip_full", "obs/uniform")
"""``skip_full`` takes equal shares of all layers and leaves the hidden width whole."""

SEARCHES = ("random_search", "cem", AgentSearch.name)

Row = dict[str, Any]


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the network")
    parser.add_argument("--text", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--out", type=Path, required=True, help="folder of rows")
    parser.add_argument("--calibration", default="wikitext2-valid", metavar="NAME")
    parser.add_argument("--test", default=TEST, metavar="NAME")
    parser.add_argument("--window", type=int, default=512, help="tokens of calibration windows")
    parser.add_argument("--test-window", type=int, default=1024, help="tokens of test windows")
    parser.add_argument("--sequences", type=int, default=32, help="windows that are fitted on")
    parser.add_argument("--searched", type=int, default=16, help="windows that masks are scored on")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--methods", nargs="+", default=[*HEURISTICS, *SEARCHES])
    parser.add_argument("--depth", action="store_true", help="sub-layers may leave wholly")
    parser.add_argument("--networks", type=int, default=60, help="of a search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--whole", action="store_true", help="score the whole test text, too")
    parser.add_argument("--recover", type=int, metavar="EPOCHS", help="fine-tune each row, too")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA; 0 = train all weights")
    parser.add_argument("--speed", action="store_true", help="measure tokens a CPU second, too")
    return parser.parse_args()


class Seed:
    """A network with the calibration text of one seed, and what is measured of it, each once.

    Args:
        options: of the command.
        seed: draws the calibration text.
        analysed: returns the structure of the network, which all seeds share.
    """

    def __init__(
        self, options: argparse.Namespace, seed: int, analysed: Callable[[CausalLM], StructureGraph]
    ) -> None:
        self.options, self.seed, self.analysed = options, seed, analysed
        self.setting = Setting(
            model=options.model,
            text=options.text,
            window=options.window,
            test_window=options.test_window,
            sequences=options.sequences,
        )
        self.statistics = options.out / f"statistics-{seed}.safetensors"

    @cached_property
    def context(self) -> Context:
        """What judges masks by this seed's text."""
        task = self.setting.task(self.options.calibration, self.seed)
        task = replace(task, search=task.search.take(torch.arange(self.options.searched)))
        log = OutcomeLog(self.options.out / f"priors-{self.seed}.json", {"seed": self.seed})
        context = Context(
            task=task,
            structure=self.analysed(task),
            seed=self.seed,
            layer_by_layer=False,
            unlabelled_log=log,
        )
        if self.statistics.is_file():
            known, _ = read_safetensors(self.statistics)
            context.statistics.update({name: own.numpy() for name, own in known.items()})
        return context

    def budget(self, share: float) -> pg.Budget:
        """Return what keeps a share of the parameters that are no embeddings."""
        model, total = self.context.task.model, self.context.graph.dense_cost.params
        tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        embedded = sum(table.numel() for table in tables)
        kept = (share * (total - embedded) + embedded) / total
        return pg.Budget(keep_params=kept, depth=self.options.depth)

    def check(self) -> None:
        """Say before any work what a method cannot serve."""
        for share in self.options.keep:
            for name in self.options.methods:
                make_method(name).check(self.problem(share))

    def problem(self, share: float, log: OutcomeLog | None = None) -> Problem:
        """Return what a method solves."""
        budget, networks = self.budget(share), self.options.networks
        return self.context.problem(budget, max_networks=networks, log=log)

    def choose(self, name: str, share: float, log: Path) -> Row:
        """Return the mask of a method, and what it reaches on the search text."""
        kept = OutcomeLog(log, {"row": log.stem, "networks": self.options.networks})
        problem = self.problem(share, kept)
        started = time.process_time()
        try:
            with problem.evaluator.watched(partial(_tell, log.stem, kept)):
                result = make_method(name).prune(problem)
        finally:
            self._keep()
        seconds = time.process_time() - started
        outcome = problem.evaluator.evaluate(result.channels)
        return {
            "method": name,
            "keep": share,
            "seed": self.seed,
            "networks": result.networks,
            "divergence": outcome.kl,
            "search_perplexity": math.exp(outcome.loss),
            "cost": vars(outcome.cost),
            "cpu_seconds": seconds,
            "widths": self.context.graph.group_widths(result.channels),
            "mask": pack_bits(result.channels.keep),
            "machine": machine(),
        }

    def _keep(self) -> None:
        """Write what the next start need not measure."""
        assert self.context.unlabelled_log is not None
        self.context.unlabelled_log.write()
        known = {name: torch.tensor(own) for name, own in self.context.statistics.items()}
        write_bytes(self.statistics, to_safetensors(known))

    def mask(self, row: Row) -> ChannelMask:
        """Return the mask of a row."""
        graph = self.context.graph
        return graph.mask(unpack_bits(row["mask"], graph.num_units))

    def score(self, model: nn.Module, *, whole: bool = False) -> float:
        """Return the perplexity on the test text."""
        windows = self.setting.windows(self.options.test, whole=whole)
        return float(self.context.task.score(model, windows).value)

    def measure(self, row: Row, name: str) -> float | dict[str, float]:
        """Return a figure of a row: a perplexity on the test text, or speeds."""
        if name in ("cut", "speed"):
            model = self.context.task.model
            cut = apply_mask(model, self.context.graph, self.mask(row))
            return speeds(cut, self.options.window) if name == "speed" else self.score(cut)
        fitted = self.problem(row["keep"]).evaluator.prune(self.mask(row))
        if name == "recovered":
            recover(
                self.context.task,
                fitted,
                epochs=self.options.recover,
                rank=self.options.rank,
                seed=self.seed,
                checkpoint=self.options.out / f"{row['method']}.checkpoint".replace("/", "-"),
            )
        return self.score(fitted, whole=name == "whole")


def speeds(model: nn.Module, tokens: int) -> dict[str, float]:
    """Return tokens a CPU second of one thread, the best of three, on random tokens.

    Args:
        model: a causal language model of transformers.
        tokens: of the prompt that it reads, and, with its cache, a quarter of them that it writes.
    """
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        network: Any = copy_network(model).to(dtype).eval()
        prompt = torch.randint(0, network.config.vocab_size, (1, tokens))
        new = tokens // 4
        given = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        write = partial(network.generate, prompt[:, :8], pad_token_id=0, **given)
        ways = {
            "prefill": (tokens, partial(network, prompt, use_cache=True)),
            "generation": (new, write),
        }
        for way, (count, run) in ways.items():
            with torch.inference_mode():
                seconds = min(_cpu_seconds(run) for _ in range(3))
            found[f"{way}, {str(dtype).removeprefix('torch.')}"] = count / seconds
    return found


def _cpu_seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def _tell(name: str, log: OutcomeLog, count: int) -> None:
    log.write()
    print(f"{name}: {count} networks", flush=True)


def row(seed: Seed, name: str, share: float) -> Row:
    """Return a row; measure of it what is not there yet."""
    options = seed.options
    key = f"{name.replace('/', '-')}-{share:g}-{seed.seed}"
    path = options.out / f"{key}.json"
    found: Row = json.loads(path.read_text()) if path.is_file() else {}
    if not found:
        found = seed.choose(name, share, options.out / "searched" / path.name)
        write_json(path, found)
    asked = [figure for figure in ("whole", "speed") if getattr(options, figure)]
    asked += ["recovered"] if options.recover else []
    for figure in ("cut", "fitted", *asked):
        if figure not in found:
            found[figure] = seed.measure(found, figure)
            write_json(path, found)
    return found


def main() -> None:
    """Make every row that is not made yet, seed by seed; print all."""
    options = parse()
    torch.set_num_threads(1)
    (options.out / "searched").mkdir(parents=True, exist_ok=True)
    known: list[StructureGraph] = []

    def analysed(task: CausalLM) -> StructureGraph:
        if not known:
            graph, inputs = pg.analyse(task.model, task.example_inputs), task.example_inputs
            known.append(with_depth(task.model, graph, inputs) if options.depth else graph)
        return known[0]

    dense = options.out / "dense.json"
    if options.speed and not dense.is_file():
        write_json(dense, {"speed": speeds(load_pretrained(options.model), options.window)})
    for number in options.seeds:
        seed = Seed(options, number, analysed)
        seed.check()
        for share in options.keep:
            for name in options.methods:
                found = row(seed, name, share)
                print(
                    f"| {name} | {share:g} | seed {number} | divergence "
                    f"{found['divergence']:.4f} | cut {found['cut']:.2f} | fitted "
                    f"{found['fitted']:.2f} | whole {found.get('whole', math.nan):.2f} | "
                    f"recovered {found.get('recovered', math.nan):.2f} | "
                    f"{found['cpu_seconds']:.0f} s | {found.get('speed', '')} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
