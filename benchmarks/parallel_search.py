"""How much faster one search is when several workers evaluate its networks.

Runs the same searches with one worker and with several by turns, one thread each, checks that both
choose the same mask, and prints networks a minute and their ratio. Two figures: by the clock, which
needs a quiet machine with a core for each worker; and predicted from the processor time that each
process used (Linux), which other programs disturb little: the search's own time, and an update's
longest chain of networks.

    python benchmarks/parallel_search.py [--workers 2] [--rounds 3] [options of prunegraph train]

Without options it searches on digits, where networks are so small that the own work counts.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prunegraph.experiment.agent_options import agent_config
from prunegraph.experiment.bench import num_probes
from prunegraph.experiment.config import TrainConfig
from prunegraph.experiment.console import Console
from prunegraph.experiment.folder import RunFolder
from prunegraph.experiment.jobs import Batch, Jobs, load_targets, make_workplace
from prunegraph.experiment.machine import keep_freed_memory
from prunegraph.experiment.options import parse
from prunegraph.experiment.search import SearchRun, search_job

DIGITS = ["--arch", "resnet20", "--pretrain-epochs", "1", "--networks", "128"]


def worker_seconds() -> float:
    """Return the processor time of all child processes so far; 0 where there is no /proc."""
    total = 0
    for process in multiprocessing.active_children():
        stat = Path(f"/proc/{process.pid}/stat")
        if stat.is_file():
            fields = stat.read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def run(jobs: Jobs, config: TrainConfig, seed: int) -> tuple[SearchRun, dict[str, float]]:
    """Search once; return what was found, and wall, own and workers' seconds."""
    start, own, workers = time.perf_counter(), time.process_time(), worker_seconds()
    found: list[SearchRun] = []
    batch = Batch(
        label="search",
        job=search_job,
        arguments=[(config, f"w{jobs.num_workers}", seed)],
        keep=lambda _, run: found.append(run),
        searches=True,
    )
    jobs.run(batch)
    return found[0], {
        "wall": time.perf_counter() - start,
        "own": time.process_time() - own,
        "workers": worker_seconds() - workers,
    }


def predicted(seconds: dict[str, float], workers: int, update_size: int) -> float:
    """Return the wall time that a machine with a free core for each worker would take."""
    chain = -(-update_size // workers) + 1  # the mask that they compete with comes first
    return seconds["own"] + seconds["workers"] * chain / (update_size + 1)


def measure(options: argparse.Namespace, words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return the figures of all rounds."""
    config = parse(TrainConfig, [*(words or DIGITS), "--threads", str(options.workers)])
    assert isinstance(config, TrainConfig)
    torch.set_num_threads(options.workers)
    place = make_workplace(config, load_targets(config), [RunFolder(path=folder)], Console())
    jobs = [
        Jobs(dataclasses.replace(config, workers=workers), place)
        for workers in (1, options.workers)
    ]
    one, many = [], []
    names = agent_config(config, config.seed).network.feature_names
    probes = num_probes(place.benches[0].target.graph, names)  # run in the first round only
    with jobs[1]:
        for seed in range(options.rounds + 1):
            torch.set_num_threads(1)
            alone, alone_seconds = run(jobs[0], config, seed)
            torch.set_num_threads(options.workers)
            together, together_seconds = run(jobs[1], config, seed)
            assert together.candidates[0].mask == alone.candidates[0].mask
            assert together.networks_evaluated == alone.networks_evaluated
            if seed:  # the first round loads networks and images
                one.append((alone.networks_evaluated - probes, alone_seconds))
                many.append((together.networks_evaluated - probes, together_seconds))
    networks = sum(number for number, _ in one)
    walls = [sum(seconds["wall"] for _, seconds in rows) for rows in (one, many)]
    quiet = [
        sum(seconds["own"] for _, seconds in one),
        sum(predicted(seconds, options.workers, config.update_size) for _, seconds in many),
    ]
    return {
        "workers": options.workers,
        "networks": networks,
        "load_average": round(os.getloadavg()[0], 1),
        "networks_a_minute": [round(60 * networks / wall, 1) for wall in walls],
        "ratio": round(walls[0] / walls[1], 2),
        "predicted_networks_a_minute": [round(60 * networks / wall, 1) for wall in quiet],
        "predicted_ratio": round(quiet[0] / quiet[1], 2),
        "own_seconds_of_the_search": round(sum(seconds["own"] for _, seconds in many), 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options, words = parser.parse_known_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, words, Path(folder))))


if __name__ == "__main__":
    main()
