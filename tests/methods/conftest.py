"""A small real problem: a digits network that has learned a little, and half of its MACs."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prunegraph.core.budget import Budget
from prunegraph.core.masks import FloatArray
from prunegraph.core.splits import Dataset
from prunegraph.data import load_dataset
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.graph import StructureGraph, analyse
from prunegraph.methods.criteria.measured import COSTLY_STATISTICS, measure_costly
from prunegraph.methods.criteria.taylor import measure
from prunegraph.methods.problem import PruningProblem
from prunegraph.models import build_model
from support.tasks import image_task

MakeProblem = Callable[..., PruningProblem]


@dataclass(frozen=True)
class Digits:
    data: Dataset
    model: nn.Module
    graph: StructureGraph
    statistics: Mapping[str, FloatArray]


@pytest.fixture(scope="session")
def trained_digits() -> Digits:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = load_dataset("digits")
    model = build_model("digits_resnet", num_classes=10, image_shape=data.image_shape)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)
    order = torch.Generator().manual_seed(0)
    for _ in range(4):
        for images, labels in data.train.batches(64, shuffle=order):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    model.zero_grad()
    graph = analyse(model, torch.zeros(1, *data.image_shape))
    arrays = dict(measure(image_task(model, data.train), graph, num_samples=128))
    for name in COSTLY_STATISTICS:
        arrays[name] = measure_costly(name, image_task(model, data.train), graph, num_samples=16)
    return Digits(data, model, graph, arrays)


@pytest.fixture(scope="session")
def make_problem(trained_digits: Digits) -> MakeProblem:
    def make(seed: int = 0, max_networks: int = 24, budget: Budget | None = None) -> PruningProblem:
        data, model = trained_digits.data, copy.deepcopy(trained_digits.model)
        evaluator = Evaluator(
            image_task(model, data.train, data.search),
            trained_digits.graph,
            num_calibration=128,
            autocast=False,
        )
        return PruningProblem(
            model=model,
            graph=trained_digits.graph,
            budget=budget or Budget(keep_macs=0.4),
            evaluator=evaluator,
            statistics=dict(trained_digits.statistics),
            example_inputs=torch.zeros(1, *data.image_shape),
            seed=seed,
            max_networks=max_networks,
        )

    return make
