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
from prunegraph.core.task import Task
from prunegraph.data import load_dataset
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.evaluation.log import OutcomeLog
from prunegraph.graph import StructureGraph, analyse
from prunegraph.methods.criteria.measured import costly_names, measure_costly
from prunegraph.methods.criteria.taylor import measure
from prunegraph.methods.method import Problem
from prunegraph.models import build_model
from prunegraph.rewards.config import Metric
from prunegraph.tasks.image_classification import ImageClassification

MakeProblem = Callable[..., Problem]


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
    task = digits_task(model, data)
    arrays = dict(measure(task, graph, num_samples=128))
    for name in costly_names():
        arrays[name] = measure_costly(name, task, graph, num_samples=16)
    return Digits(data, model, graph, arrays)


def digits_task(model: nn.Module, data: Dataset) -> Task:
    return ImageClassification(
        model=model,
        example_inputs=torch.zeros(1, *data.image_shape),
        train=data.train,
        search=data.search,
        test=data.test,
    )


@pytest.fixture(scope="session")
def make_problem(trained_digits: Digits) -> MakeProblem:
    def make(seed: int = 0, max_networks: int = 24, budget: Budget | None = None) -> Problem:
        graph = trained_digits.graph
        task = digits_task(copy.deepcopy(trained_digits.model), trained_digits.data)

        def evaluator(log: OutcomeLog | None, metric: Metric = "accuracy") -> Evaluator:
            return Evaluator(
                task, graph, num_calibration=128, autocast=False, metric=metric, log=log
            )

        return Problem(
            task=task,
            structure=graph,
            budget=budget or Budget(keep_macs=0.4),
            statistics=dict(trained_digits.statistics),
            make_evaluator=evaluator,
            make_unlabelled=lambda: evaluator(None, "kl"),
            seed=seed,
            max_networks=max_networks,
        )

    return make
