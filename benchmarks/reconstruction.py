"""What the least-squares fit of the kept weights is worth for layers of each kind.

Small networks of one kind of layer each learn the real 8x8 digits; channels by chance are removed,
so many of each group, and the accuracy is measured before and after the fits: of all layers at once
(``Reconstruction``) and of one after the other (``LayerwiseReconstruction``). No label is read and
no step is made in between; batch norm, where there is any, is recalibrated for all. With
``--weights`` it is that network, on the search split of its data set.

    python benchmarks/reconstruction.py [--seeds 3] [--epochs 12] [--out FILE]
        [--weights W.safetensors --dataset cifar10 --data-dir DIR]
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunegraph as pg
from prunegraph.core.files import write_json
from prunegraph.core.splits import Split
from prunegraph.data import load_dataset
from prunegraph.graph.features import rank_in_group
from prunegraph.models import build_model, load_weights, weights_info
from prunegraph.runs.report.report import machine
from prunegraph.tasks.classification import evaluate

STRENGTHS = (0.5, 0.25)
BATCH, IMAGES = 64, 512


class Transposed(nn.Module):
    """A linear layer that stores its weight the other way round, as GPT-2's do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W + b``."""
        return torch.addmm(self.bias, x, self.weight)


class Tokens(nn.Module):
    """A transformer of torch's that reads the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 48), nn.Linear(48, 10)
        self.place = nn.Parameter(torch.zeros(8, 48))
        layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, 10]`` of images ``[B, 1, 8, 8]``."""
        logits: Tensor = self.head(self.encoder(self.embed(x[:, 0]) + self.place).mean(1))
        return logits


def _grouped(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    wide = nn.Conv2d(outputs, outputs, 3, stride, 1, groups=4, bias=False)
    return [nn.Conv2d(inputs, outputs, 1), nn.ReLU(), wide, nn.BatchNorm2d(outputs), nn.ReLU()]


def _signal(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(2), *layers, nn.Flatten(), nn.LazyLinear(10))


def _three_axes() -> nn.Sequential:
    first, second = nn.Conv3d(1, 24, (1, 3, 3), padding=(0, 1, 1)), nn.Conv3d(24, 32, 2, stride=2)
    return nn.Sequential(
        *(nn.Unflatten(2, (2, 4)), first, nn.ReLU(), second, nn.ReLU()),
        *(nn.Conv3d(32, 48, (1, 2, 2)), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "Conv2d": lambda: nn.Sequential(
        *(nn.Conv2d(1, 24, 3, 1, 1), nn.ReLU(), nn.Conv2d(24, 48, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(48, 48, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)),
    ),
    "Conv2d, 4 groups": lambda: nn.Sequential(
        *(*_grouped(1, 64), *_grouped(64, 96, 2), *_grouped(96, 96)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(10)),
    ),
    "Conv1d": lambda: _signal(
        *(nn.Conv1d(1, 32, 5, 2, 2), nn.ReLU(), nn.Conv1d(32, 48, 5, 2, 2), nn.ReLU()),
        *(nn.Conv1d(48, 64, 3, 2, 1), nn.ReLU()),
    ),
    "Conv3d": _three_axes,
    "ConvTranspose2d": lambda: nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Unflatten(1, (48, 1, 1))),
        *(nn.ConvTranspose2d(48, 32, 4), nn.ReLU()),
        *(nn.ConvTranspose2d(32, 24, 4, 2, 1), nn.ReLU()),
        *(nn.Conv2d(24, 10, 8), nn.Flatten()),
    ),
    "x W + b, as GPT-2's": lambda: nn.Sequential(
        *(nn.Flatten(), Transposed(64, 128), nn.GELU(), Transposed(128, 128), nn.GELU()),
        Transposed(128, 10),
    ),
    "MultiheadAttention": Tokens,
}


def main() -> None:
    """Print a table, and write the figures to a file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name, network in _networks(arguments):
        runs = [_run(*network(seed), seed) for seed in range(arguments.seeds)]
        row = {key: [run[key] for run in runs] for key in runs[0]}
        rows.append({"layers": name, **row})
        print(" | ".join([f"{name:20}", *map(_mean, row.values())]), flush=True)
    if arguments.out is not None:
        write_json(arguments.out, {"rows": rows, "machine": machine()})


Task = tuple[nn.Module, Tensor, Split]
"""A trained network, training images, and what it is measured on."""


def _networks(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[int], Task]]]:
    """Yield names, and what gives a network of a seed."""
    data = load_dataset(arguments.dataset, data_dir=arguments.data_dir)
    if arguments.weights is not None:
        info = weights_info(arguments.weights)
        assert info is not None
        shape = data.image_shape
        network = build_model(info.arch, num_classes=data.num_classes, image_shape=shape).eval()
        load_weights(network, arguments.weights)
        split = data.train.sample(IMAGES, 0)
        images, _ = split.source.load(split.index)
        yield arguments.weights.stem, lambda _: (network, images, data.search)
        return
    batches = list(data.train.batches(BATCH))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for name, build in NETWORKS.items():

        def trained(seed: int, build: Callable[[], nn.Module] = build) -> Task:
            return _train(build, seed, arguments.epochs, images, labels), images, data.test

        yield name, trained


def _mean(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * spread:.1f}"


def _train(
    build: Callable[[], nn.Module], seed: int, epochs: int, images: Tensor, labels: Tensor
) -> nn.Module:
    torch.manual_seed(seed)
    network = build()
    network(images[:2])  # lazy layers take their sizes
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(epochs):
        for index in torch.split(torch.randperm(len(images)), BATCH):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(network(images[index]), labels[index]))
            optimizer.step()
    return network.eval()


def _run(network: nn.Module, images: Tensor, held: Split, seed: int) -> dict[str, float]:
    """Cut a network, fit it, and return accuracies."""
    batches = torch.split(images, BATCH)
    graph = pg.analyse(network, images[:1])

    def run(dense: nn.Module) -> None:
        for batch in batches:
            dense(batch)

    ways = {
        "fitted": pg.Reconstruction(network, graph, run),
        "in turn": pg.LayerwiseReconstruction(network, graph, lambda dense: dense(images[:IMAGES])),
    }
    chance = np.random.default_rng(seed).random(graph.num_units, dtype=np.float32)
    found = {"dense": evaluate(network, held).accuracy}
    for share in STRENGTHS:
        scores = rank_in_group(graph, chance).astype(np.float32)  # alike in all groups
        mask = graph.project(scores, pg.Budget(keep_macs=share))
        for name in ("cut", *ways):
            small = pg.apply_mask(network, graph, mask)
            if name in ways:
                ways[name].apply(small, mask)
            pg.recalibrate_bn(small, batches)
            found[f"{name} {share}"] = evaluate(small, held).accuracy
    return found


if __name__ == "__main__":
    main()
