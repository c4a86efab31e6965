"""What a search costs beyond the evaluation of its networks.

Runs a search on a ResNet-20 (128 networks, 16 an update) with the options of ``prunegraph train``
and notes every (mask, image subset) that it evaluates. After each update it repeats the same
surgery + recalibration + evaluation calls alone, so that both sides see the same load of the
machine; it prints the ratio of the two wall times. The weights are random and the images are noise
of CIFAR-10's shape: neither changes what a call costs.

    python benchmarks/search_overhead.py [--networks 128] [--threads 2]
"""

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prunegraph.agent.options import AgentOptions
from prunegraph.agent.settings import agent_config, env_config
from prunegraph.agent.train import train_agent
from prunegraph.core.budget import Budget
from prunegraph.core.masks import ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.core.splits import Batch, SearchSplit, TrainSplit
from prunegraph.env import ChannelPruningEnv, PruningTask
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.graph import analyse
from prunegraph.graph.features import node_features
from prunegraph.methods.criteria.taylor import measure
from prunegraph.models import build_model
from prunegraph.runs.machine import keep_freed_memory
from prunegraph.tasks.image_classification import image_classification


class Noise:
    """Random images of CIFAR-10's shape."""

    num_classes = 10
    image_shape = (3, 32, 32)

    def __init__(self, num_images: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(num_images, *self.image_shape, generator=generator)
        self.labels = torch.randint(0, self.num_classes, (num_images,), generator=generator)

    def load(self, index: Tensor, augment: torch.Generator | None = None) -> Batch:
        """Return images and labels as they are."""
        return self.images[index], self.labels[index]

    def fingerprint(self) -> str:
        """Return a fixed name."""
        return "noise"


class NotingEvaluator(Evaluator):
    """Notes every network that it runs."""

    calls: list[tuple[ChannelMask, Tensor | None]]

    def evaluate(self, mask: ChannelMask, subset: Tensor | None = None) -> Outcome:
        """Evaluate, and note the call unless the cache answered it."""
        before = self.num_networks
        outcome = super().evaluate(mask, subset)
        if self.num_networks > before:
            self.calls.append((mask, subset))
        return outcome


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    keep_freed_memory()  # as the command line does
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    source = Noise(7000)
    model = build_model("resnet20", num_classes=10, image_shape=source.image_shape).eval()
    graph = analyse(model, torch.randn(1, *source.image_shape))
    train = TrainSplit(source, torch.arange(2000))
    search = SearchSplit(source, torch.arange(2000, 7000))
    images = image_classification(model, train=train, search=search)
    config = agent_config(AgentOptions(), seed=0)
    names = config.network.feature_names
    features = node_features(graph, measure(images, graph), names=names)
    evaluator = NotingEvaluator(images, graph, metric="soft_accuracy")
    evaluator.calls = []
    alone = Evaluator(images, graph, metric="soft_accuracy")
    for each in (evaluator, alone):
        each.evaluate(graph.dense_mask())  # loads the images, warms up
    evaluator.calls.clear()
    task = PruningTask(
        name="resnet20",
        graph=graph,
        node_features=features,
        evaluator=evaluator,
        budget=Budget(keep_macs=0.5),
    )
    environment = env_config(config)
    num_calls, evaluating = 0, 0.0

    def repeat_alone(_record: Mapping[str, Any]) -> None:
        nonlocal num_calls, evaluating
        begin = time.perf_counter()
        for mask, subset in evaluator.calls:
            alone.evaluate(mask, subset)
        evaluating += time.perf_counter() - begin
        num_calls += len(evaluator.calls)
        evaluator.calls.clear()

    start = time.perf_counter()
    train_agent(
        [lambda: ChannelPruningEnv(task, environment)],
        [graph],
        config,
        total_networks=options.networks + options.networks // config.episodes_per_update,
        progress=repeat_alone,
    )
    searching = time.perf_counter() - start - evaluating
    result = {
        "networks": num_calls,
        "threads": options.threads,
        "search_seconds": round(searching, 2),
        "evaluation_seconds": round(evaluating, 2),
        "ratio": round(searching / evaluating, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
