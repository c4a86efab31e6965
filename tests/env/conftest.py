"""Small real networks with a stand-in evaluator whose outcomes follow from the bits."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegraph.core.budget import Budget
from prunegraph.core.masks import ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.env import PruningTask
from prunegraph.graph import StructureGraph, analyse

NUM_FEATURES = 3


@dataclass
class CountingEvaluator:
    """Accuracy is the share of even classes kept, less a little that depends on the images."""

    graph: StructureGraph
    num_networks: int = 0
    calls: list[tuple[str, tuple[int, ...] | None]] = field(default_factory=list)

    def evaluate(self, mask: ChannelMask, subset: Tensor | None = None) -> Outcome:
        self.num_networks += 1
        images = None if subset is None else tuple(subset.tolist())
        self.calls.append((mask.digest(), images))
        shift = 0.0 if images is None else 0.01 * float(np.sin(sum(images)))
        accuracy = 0.1 + 0.8 * float(mask.keep[::2].mean()) + shift
        return Outcome(
            accuracy=accuracy,
            loss=2.0 - accuracy,
            kl=None,
            num_images=100,
            cost=self.graph.cost(mask),
            digest=mask.digest(),
            seconds=0.0,
        )

    def draw_subset(self, size: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(100, generator=generator)[:size]


def network(widths: tuple[int, ...]) -> nn.Module:
    channels = (3, *widths)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, 4))


def structure(widths: tuple[int, ...]) -> StructureGraph:
    return analyse(network(widths).eval(), torch.zeros(1, 3, 4, 4))


GRAPHS = {"small": structure((6, 8)), "large": structure((8, 12, 8))}


@pytest.fixture
def make_task() -> Callable[..., PruningTask]:
    """Return a maker of tasks by name, each with an evaluator of its own."""

    def make(name: str = "small", keep_macs: float = 0.5) -> PruningTask:
        graph = GRAPHS[name]
        features = np.random.default_rng(0).normal(size=(graph.num_units, NUM_FEATURES))
        return PruningTask(
            name=name,
            graph=graph,
            node_features=features.astype(np.float32),
            evaluator=CountingEvaluator(graph),
            budget=Budget(keep_macs=keep_macs),
        )

    return make
