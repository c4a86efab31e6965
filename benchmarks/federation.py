"""FedMap on CIFAR-10: ten clients with a thousand images each train one ResNet-20.

A row is one method, budget and division of the images; test accuracy, sparsity and bytes of both
directions. Finished rows are files in ``--out``; one that was stopped goes on where it was.

    python benchmarks/federation.py --data-dir cifar10.tar --out FOLDER
    python benchmarks/federation.py --out FOLDER --show [--collect FILE]
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from prunegraph.core.budget import Budget
from prunegraph.core.files import write_json
from prunegraph.core.seeding import seeded
from prunegraph.core.weight_mask import WeightMask
from prunegraph.data import load_dataset
from prunegraph.methods.context import Context
from prunegraph.methods.fedmap.method import FedAvg, Federation, FedMap
from prunegraph.models import build_model
from prunegraph.runs.report.report import machine
from prunegraph.tasks import image_classification

CLIENTS, SAMPLES = 10, 1000
DIVISIONS: Mapping[str, float | None] = {"dirichlet 0.3": 0.3, "at random": None}
ROWS: Mapping[str, tuple[Callable[..., Federation], float]] = {
    "fedavg": (FedAvg, 0.9),
    "fedmap, 90 %": (FedMap, 0.9),
    "one shot, 90 %": (lambda **given: FedMap(**given, every=4, until=0.1), 0.9),
    "fedmap, 95 %": (FedMap, 0.95),
}
"""What makes the method of each row, and the sparsity that it is given."""


def measure(row: str, division: str, options: argparse.Namespace) -> None:
    """Train one row, unless it is there, and write its figures."""
    name = f"{row} {division} {options.seed}".replace(" ", "_").replace(",", "").replace("%", "")
    path = options.out / f"{name}.json"
    if path.is_file():
        return
    data = load_dataset("cifar10", data_dir=options.data_dir)
    with seeded(options.seed):
        model = build_model("resnet20", num_classes=data.num_classes, image_shape=data.image_shape)
    train = data.train.sample(CLIENTS * SAMPLES, options.seed)
    task = image_classification(model, train=train, search=data.search, test=data.test)
    make, sparsity = ROWS[row]
    method = make(
        clients=CLIENTS,
        dirichlet=DIVISIONS[division],
        rounds=options.rounds,
        epochs=options.epochs,
        batch_size=32,
        autocast=True,
    )
    context = Context(task=task, structure=None, seed=options.seed, reconstruct=False)
    problem = context.problem(Budget(sparsity=sparsity), folder=options.out / f"work-{name}")
    begun = time.process_time()
    result = method.prune(problem)
    assert result.model is not None
    assert isinstance(result.mask, WeightMask)
    told = {key: result.details[key] for key in ("bytes_up", "bytes_down", "clients")}
    cell = {"row": row, "division": division, "seed": options.seed}
    cell |= {"rounds": options.rounds, "epochs": options.epochs}
    cell |= {"accuracy": task.score(result.model, task.test).value, **told}
    cell |= {"sparsity": result.mask.sparsity, "seconds": time.process_time() - begun}
    write_json(path, {**cell, "machine": machine()})
    print(f"{name}: {100 * cell['accuracy']:.2f} %, {cell['seconds']:.0f} s", flush=True)


def table(cells: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = ["| row | images | test accuracy | zeros | MB | spread of clients | CPU s |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|")
    lines += [
        f"| {cell['row']} | {cell['division']} | {100 * cell['accuracy']:.2f} "
        f"| {100 * cell['sparsity']:.1f} % | {(cell['bytes_up'] + cell['bytes_down']) / 1e6:.1f} "
        f"| {cell['clients']['min']:.3f} to {cell['clients']['max']:.3f} | {cell['seconds']:.0f} |"
        for cell in cells
    ]
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of finished rows")
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10; default: downloaded")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=1, help="of a client in a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--divisions", nargs="+", default=list(DIVISIONS), choices=list(DIVISIONS), help="of images"
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--show", action="store_true", help="train nothing")
    parser.add_argument("--collect", type=Path, help="write the figures of all rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.show:
        for division in options.divisions:
            for row in options.rows:
                measure(row, division, options)
    cells = [json.loads(path.read_text()) for path in sorted(options.out.glob("*.json"))]
    if options.collect is not None:
        write_json(options.collect, {"rows": cells})
    print(table(cells))


if __name__ == "__main__":
    main()
