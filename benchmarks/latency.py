"""What pruned networks gain on the clock, against what their multiply-adds promise.

For each device, network and batch size: the dense network and networks pruned to shares of its
multiply-adds (every group to the same share, channels by chance: which ones does not matter to the
clock). Where a network gains less than half of the time that its multiply-adds promise, a warning
says so, and rows with widths rounded to multiples of 8 and 16 at the same budget follow it.

    python benchmarks/latency.py [--models vgg16_bn ...] [--batches 1 64] [--threads 2] [--quick]
"""

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.apply import apply_mask
from prunegraph.graph.costs.clock import Latency, measure_latency
from prunegraph.graph.features import rank_in_group
from prunegraph.runs.parallel.machine import keep_freed_memory
from prunegraph.runs.report.report import machine
from prunegraph.runs.report.speed import PAYS, repaired

MODELS = ("vgg16_bn", "resnet50", "mobilenet_v2")
COLUMNS = (
    *("device", "network", "batch", "keep MACs", "round to", "MACs left"),
    *("median ms", "p90 ms", "speed-up", "share of ideal gain"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured network.

    Attributes:
        budget: what it was pruned to; None for the dense network.
        macs: share of the dense multiply-adds that it has.
        latency: its own.
        dense: the dense network's.
    """

    budget: Budget | None
    macs: float
    latency: Latency
    dense: Latency

    @property
    def speed_up(self) -> float:
        """The dense network's median over this one's."""
        return self.dense.median / self.latency.median

    @property
    def repaired(self) -> float:
        """Share of the time that the multiply-adds promise to save that is saved."""
        return repaired(self.dense.median, self.latency.median, self.macs)

    def cells(self, device: str, name: str, batch: int) -> list[str]:
        """Return the row of the table."""
        pruned = self.budget is not None
        return [
            device,
            name,
            str(batch),
            f"{self.budget.keep_macs:g}" if self.budget else "dense",
            str(self.budget.round_to or "") if self.budget else "",
            f"{self.macs:.3f}",
            f"{self.latency.median:.2f}",
            f"{self.latency.p90:.2f}",
            f"x{self.speed_up:.2f}" if pruned else "",
            f"{self.repaired:.0%}" if pruned else "",
        ]


def measure_rows(
    model: nn.Module, graph: StructureGraph, images: Tensor, options: argparse.Namespace
) -> Iterator[Row]:
    """Yield the dense network, then each budget; where that does not pay, its rounded widths."""
    scores = rank_in_group(graph, np.random.default_rng(0).random(graph.num_units))

    def timed(network: nn.Module) -> Latency:
        return measure_latency(network, images, num_runs=options.runs, max_seconds=options.seconds)

    def pruned(budget: Budget) -> Row:
        mask = graph.project(scores.astype(np.float32), budget)
        macs = graph.cost(mask).macs / graph.dense_cost.macs
        slim = apply_mask(model, graph, mask)
        return Row(budget=budget, macs=macs, latency=timed(slim), dense=dense)

    dense = timed(model)
    yield Row(budget=None, macs=1.0, latency=dense, dense=dense)
    for share in options.keep:
        plain = pruned(Budget(keep_macs=share))
        yield plain
        if plain.repaired < PAYS:
            for multiple in options.round_to:
                with contextlib.suppress(BudgetError):  # the smallest rounded network is larger
                    yield pruned(Budget(keep_macs=share, round_to=multiple))


def warning(plain: Row, rounded: list[Row], where: str) -> str:
    """Return the line that says that a network does not pay, and what mends it."""
    assert plain.budget is not None
    text = (
        f"warning: {where}, keep {plain.budget.keep_macs:g}: pruning does not pay, "
        f"x{plain.speed_up:.2f} of the x{1 / plain.macs:.2f} that multiply-adds promise"
    )
    if not rounded:
        return f"{text}; no rounded network fits the budget"
    best = max(rounded, key=lambda row: row.speed_up)
    assert best.budget is not None
    if best.repaired >= PAYS:
        return f"{text}; round_to={best.budget.round_to} mends it: x{best.speed_up:.2f}"
    return f"{text}; rounding does not mend it (at best x{best.speed_up:.2f})"


def find_warnings(rows: list[Row], where: str) -> Iterator[str]:
    """Yield a warning for each plain row that does not pay."""
    for number, row in enumerate(rows):
        if row.budget is not None and row.budget.round_to is None and row.repaired < PAYS:
            same = [
                other
                for other in rows[number + 1 :]
                if other.budget is not None
                and other.budget.round_to is not None
                and other.budget.keep_macs == row.budget.keep_macs
            ]
            yield warning(row, same, where)


def read_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="torchvision names")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--round-to", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--devices", nargs="+", default=None, help="default: cpu, and cuda if any")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--runs", type=int, default=50, help="timed runs of a network")
    parser.add_argument("--seconds", type=float, default=20.0, help="most seconds for them")
    parser.add_argument("--quick", action="store_true", help="64 x 64, batch 1, ten runs, 1 s")
    options = parser.parse_args()
    if options.quick:
        options.image_size, options.batches, options.runs, options.seconds = 64, [1], 10, 1.0
    if options.devices is None:
        options.devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return options


def main() -> None:
    """Measure and print."""
    options = read_options()
    keep_freed_memory()  # as the command line does
    torch.set_num_threads(options.threads)
    facts = machine()
    print(
        f"{facts['processor']}, {options.threads} threads, GPU {facts['gpu']}, {facts['torch']}\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    warnings: list[str] = []
    for name in options.models:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        image = torch.randn(1, 3, options.image_size, options.image_size)
        graph = analyse(model, image)
        for device in options.devices:
            model.to(device)
            for batch in options.batches:
                images = image.expand(batch, -1, -1, -1).contiguous().to(device)
                rows = []
                for row in measure_rows(model, graph, images, options):
                    rows.append(row)
                    print(f"| {' | '.join(row.cells(device, name, batch))} |", flush=True)
                warnings += find_warnings(rows, f"{name} on {device}, batch {batch}")
    print("\n" + "\n".join(warnings or [f"every row gains at least {PAYS:.0%} of the ideal"]))


if __name__ == "__main__":
    main()
