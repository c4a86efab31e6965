"""A catalogue of random small classifiers, trained on real images, on which policies learn.

Each network is a weights file with a JSON beside it (``part`` says whether it is to train, choose
or test policies on). Number, family, seed and part follow from the position alone: every eight
networks hold six to train, one to choose and one to test on, and the families take turns, so that
the first networks are a small catalogue. Two families are in the test part only. Every fifth eight
is of the embedded digits, the others of CIFAR-10 at 16 x 16; without ``--data-dir`` only the digits
are made. Networks that are there are not made again.

    python benchmarks/catalogue.py --out FOLDER [--data-dir cifar10.tar] [--networks 400]
    python benchmarks/catalogue.py --out FOLDER --shard 0 2 &  # each of two processes makes half
    python benchmarks/catalogue.py --out FOLDER --shard 1 2
    python benchmarks/catalogue.py --out FOLDER --table
"""

import argparse
import dataclasses
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from prunegraph.core.console import Console, seconds_in_words
from prunegraph.core.reading import read_json
from prunegraph.core.splits import Dataset
from prunegraph.data import load_dataset
from prunegraph.models import WeightsInfo, save_weights
from prunegraph.models.random_family import FAMILIES, TOKENS
from prunegraph.runs.prepare import build_network
from prunegraph.runs.target import measure_cost, pretrain_recipe
from prunegraph.tasks.classification import evaluate
from prunegraph.tasks.image_classification import training_task
from prunegraph.training.loop import FinetuneConfig, finetune
from prunegraph.training.optimizers import Optimizer

NUM_NETWORKS = 400
ROUND = ("train", "train", "train", "val", "train", "train", "test", "train")
"""Parts of eight networks in a row."""

UNSEEN = ("grouped", "transformer")
"""Families of the test part alone: of two of five eights in a row, one each."""

UNSEEN_ROUNDS = {0: UNSEEN[0], 2: UNSEEN[1]}
ROUNDS = 5
DIGITS_ROUND = 4
SEEN = tuple(family for family in FAMILIES if family not in UNSEEN)

IMAGE_SIZE = 16
MOST_MACS = 2_500_000
"""Of a network on CIFAR-10: about a minute of a core."""

LEAST_MACS = 300_000
EPOCHS = {"cifar10": 3, "digits": 40}
LEARNING_RATE = {"sgd": 0.1, "adamw": 3e-3}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A network of the catalogue.

    Attributes:
        number: its position.
        family: of ``FAMILIES``.
        part: ``train``, ``val`` or ``test``.
        dataset: ``cifar10`` or ``digits``.
    """

    number: int
    family: str
    part: str
    dataset: str

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.number:03}-{self.family}"


def entries(count: int) -> list[Entry]:
    """Return the first networks of the catalogue; more of them begin with the same ones."""
    found: list[Entry] = []
    turns = _families()
    for number in range(count):
        turn, place = divmod(number, len(ROUND))
        part, turn = ROUND[place], turn % ROUNDS
        unseen = UNSEEN_ROUNDS.get(turn) if part == "test" else None
        dataset = "digits" if turn == DIGITS_ROUND else "cifar10"
        family = unseen or next(turns)
        found.append(Entry(number=number, family=family, part=part, dataset=dataset))
    return found


def _families() -> Iterator[str]:
    """Yield the seen families in turns, each turn in another order."""
    turn = 0
    while True:
        yield from random.Random(turn).sample(SEEN, len(SEEN))
        turn += 1


def build(entry: Entry, dataset: Dataset) -> tuple[str, torch.nn.Module]:
    """Return name and network of an entry: of its seeds the first that is of a fair size."""
    most = MOST_MACS if entry.dataset == "cifar10" else MOST_MACS // 4
    least = LEAST_MACS if entry.dataset == "cifar10" else LEAST_MACS // 4
    seed = entry.number
    while True:
        arch = f"random_{entry.family}_{seed}"
        model = build_network(arch, dataset, seed)
        macs = measure_cost(model, torch.zeros(1, *dataset.image_shape)).macs
        if least <= macs <= most:
            return arch, model
        seed += 1000


def recipe(entry: Entry) -> FinetuneConfig:
    """Return how a network is trained; attention and mixers learn by AdamW, in float32."""
    tokens = entry.family in TOKENS
    optimizer: Optimizer = "adamw" if tokens else "sgd"
    found = pretrain_recipe(EPOCHS[entry.dataset], lr=LEARNING_RATE[optimizer])
    return dataclasses.replace(found, optimizer=optimizer, autocast=not tokens)


def make(entry: Entry, dataset: Dataset, commit: str, out: Path) -> dict[str, Any]:
    """Train and write one network, and return its record."""
    started = time.process_time()
    arch, model = build(entry, dataset)
    cost = measure_cost(model, torch.zeros(1, *dataset.image_shape))
    trained = finetune(model, training_task(model, dataset.train), recipe(entry), seed=entry.number)
    record: dict[str, Any] = {
        "part": entry.part,
        "family": entry.family,
        "number": entry.number,
        "macs": cost.macs,
        "params": cost.params,
        "losses": [round(loss, 4) for loss in trained.losses],
        "search_accuracy": evaluate(model, dataset.search).accuracy,
        "test_accuracy": evaluate(model, dataset.test).accuracy,
        "seconds": round(time.process_time() - started, 1),
        "commit": commit,
    }
    if entry.dataset == "cifar10":
        record["image_size"] = IMAGE_SIZE
    info = WeightsInfo(
        arch=arch, dataset=dataset.name, mean=dataset.mean, std=dataset.std, extra=record
    )
    save_weights(model, out / f"{entry.name}.safetensors", info)
    return record


def load(name: str, data_dir: Path | None) -> Dataset:
    """Return the images of ``cifar10`` at ``IMAGE_SIZE``, or the digits."""
    if name == "digits":
        return load_dataset("digits")
    return load_dataset("folder", data_dir=data_dir, image_size=IMAGE_SIZE)


def run(
    out: Path, data_dir: Path | None, count: int, shard: tuple[int, int], console: Console
) -> None:
    """Make what is missing of a shard (which, of how many), in order."""
    out.mkdir(parents=True, exist_ok=True)
    wanted = [
        entry
        for entry in entries(count)[shard[0] :: shard[1]]
        if (data_dir is not None or entry.dataset == "digits")
        and not (out / f"{entry.name}.safetensors").is_file()
    ]
    datasets: dict[str, Dataset] = {}
    folder = Path(__file__).parent
    commit = subprocess.check_output(("git", "rev-parse", "HEAD"), cwd=folder, text=True).strip()
    started = time.monotonic()
    for done, entry in enumerate(wanted, 1):
        if entry.dataset not in datasets:
            datasets[entry.dataset] = load(entry.dataset, data_dir)
        record = make(entry, datasets[entry.dataset], commit, out)
        left = (time.monotonic() - started) / done * (len(wanted) - done)
        console.say(
            f"{entry.name} ({entry.part}): {100 * record['search_accuracy']:.1f} %, "
            f"{record['seconds']:.0f} s; {done}/{len(wanted)}, {seconds_in_words(left)} left"
        )


def table(out: Path) -> str:
    """Return the networks by family, as Markdown."""
    records = [read_json(path) for path in sorted(out.glob("*.json"))]
    lines = [
        "| family | data | networks | train / val / test | MMACs | search accuracy | seconds |",
        "|---|---|--:|---|--:|--:|--:|",
    ]
    for key in sorted({(record["family"], record["dataset"]) for record in records}):
        rows = [record for record in records if (record["family"], record["dataset"]) == key]
        parts = [sum(row["part"] == part for row in rows) for part in ("train", "val", "test")]
        accuracies = [100 * row["search_accuracy"] for row in rows]
        lines.append(
            f"| {key[0]} | {key[1]} | {len(rows)} | {' / '.join(map(str, parts))} "
            f"| {fmean(row['macs'] for row in rows) / 1e6:.2f} "
            f"| {fmean(accuracies):.1f} ({min(accuracies):.1f} to {max(accuracies):.1f}) "
            f"| {fmean(row['seconds'] for row in rows):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Make the catalogue, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the networks")
    parser.add_argument(
        "--data-dir", type=Path, help="CIFAR-10 as {train,val,test}/<class>/<image>"
    )
    parser.add_argument("--networks", type=int, default=NUM_NETWORKS)
    parser.add_argument(
        "--shard", type=int, nargs=2, default=(0, 1), metavar=("K", "N"), help="every Nth from K on"
    )
    parser.add_argument("--table", action="store_true", help="print what is there")
    options = parser.parse_args()
    if options.table:
        print(table(options.out))
        return
    if not 0 <= options.shard[0] < options.shard[1]:
        parser.error("--shard K N: K is from 0 to N - 1")
    torch.set_num_threads(1)
    run(options.out, options.data_dir, options.networks, tuple(options.shard), Console())


if __name__ == "__main__":
    main()
