"""A small federation on digits, and the network that it trains."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.splits import Dataset
from prunegraph.methods.context import Context
from prunegraph.methods.method import Problem
from prunegraph.tasks.image_classification import ImageClassification

SMALL: dict[str, Any] = {"clients": 4, "rounds": 4, "epochs": 1, "batch_size": 32, "lr": 0.1}
BUDGET = Budget(sparsity=0.8)


def make_task(digits: Dataset) -> ImageClassification:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 24), nn.GroupNorm(3, 24), nn.ReLU(), nn.Linear(24, 10)]
    return ImageClassification(
        model=nn.Sequential(nn.Flatten(), *layers).eval(),
        example_inputs=torch.zeros(1, 1, 8, 8),
        train=digits.train.take(torch.arange(400)),
        search=digits.search,
    )


def pose(digits: Dataset, seed: int = 0, folder: Path | None = None, **given: Any) -> Problem:
    context = Context(task=make_task(digits), structure=None, seed=seed, reconstruct=False)
    problem = context.problem(given.pop("budget", BUDGET), folder=folder)
    return replace(problem, **given)
