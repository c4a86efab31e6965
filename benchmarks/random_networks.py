"""The structure engine on many random networks: what fails, what can be pruned, what freezes.

Each network is analysed, pruned with random masks and compared with its silenced twin; see
``prunegraph.testing.structure_check``. Exit code 1 if anything fails.

    python benchmarks/random_networks.py [--seeds 3000] [--first 0]
"""

import argparse
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from prunegraph.testing.structure_check import KINDS, StructureFindings, check_structure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.random_networks import FEATURES, random_network


def main() -> int:
    """Check all seeds, print the tables, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3000, help="number of networks")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # a pruned network that warns is a failure, as in the tests
    console = Console(width=None if sys.stdout.isatty() else 140)
    features: Counter[str] = Counter()
    found: dict[int, StructureFindings] = {}
    start = time.perf_counter()
    for seed in range(options.first, options.first + options.seeds):
        model = random_network(seed)
        features.update(model.features)
        found[seed] = check_structure(model, model.example_inputs, seed=seed)
        for failure in found[seed].failures:
            console.print(f"seed {seed}: {failure.kind}: {failure.message}", markup=False)
    seconds = time.perf_counter() - start
    console.print(_summary(found, seconds))
    console.print(_shares("frozen because", _reasons(found), len(found)))
    console.print(_shares("feature", {name: features[name] for name in FEATURES}, len(found)))
    return int(any(each.failures for each in found.values()))


def _summary(found: dict[int, StructureFindings], seconds: float) -> Table:
    table = Table("what", "networks", "share", "seeds")
    table.add_row("checked", str(len(found)), "", f"{seconds:.0f} s")
    for kind in KINDS:
        seeds = [seed for seed, f in found.items() if any(x.kind == kind for x in f.failures)]
        _add_seeds(table, f"fail: {kind}", seeds, len(found))
    stuck = [seed for seed, each in found.items() if not each.reaches_half]
    _add_seeds(table, "cannot lose half of their MACs", stuck, len(found))
    return table


def _add_seeds(table: Table, what: str, seeds: list[int], total: int) -> None:
    shown = " ".join(map(str, seeds[:20])) + (" ..." if len(seeds) > 20 else "")
    table.add_row(what, str(len(seeds)), f"{len(seeds) / total:.1%}", shown)


def _reasons(found: dict[int, StructureFindings]) -> Counter[str]:
    """Count the networks by reason; what follows a colon differs from network to network."""
    alike = [{reason.partition(":")[0] for reason in f.frozen_reasons} for f in found.values()]
    return Counter(reason for reasons in alike for reason in reasons)


def _shares(title: str, counts: dict[str, int], total: int) -> Table:
    table = Table(title, "networks", "share")
    for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(name, str(count), f"{count / total:.1%}")
    return table


if __name__ == "__main__":
    sys.exit(main())
