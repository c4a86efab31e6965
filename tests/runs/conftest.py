"""What a small comparison found, without running one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from prunegraph.core.budget import Budget
from prunegraph.core.masks import ChannelMask
from prunegraph.runs.report.plots import Findings
from support.parts import part
from support.toy_env import toy_graph

HISTORY = {
    "networks": [16, 32, 48],
    "accuracy": [0.5, 0.6, 0.7],
    "reward": [-0.2, 0.1, 0.3],
    "multiplier": [0.0, 0.0, 0.0],
}


def row(name: str, mask: ChannelMask, macs: int, search: float, **values: Any) -> dict[str, Any]:
    """Return a row of a report."""
    return {
        "name": name,
        **part(name),
        "seed": 0,
        "macs": macs,
        "params": 40,
        "search_accuracy": search,
        "test_accuracy_recalibrated": search - 0.01,
        "test_accuracy_finetuned": None,
        "networks_evaluated": 16,
        "digest": mask.digest(),
        **values,
    }


@pytest.fixture
def make_findings() -> Callable[..., Findings]:
    """Return a function that makes findings; its arguments replace entries of the report."""

    def make(group_name: str | None = None, **entries: Any) -> Findings:
        graph = toy_graph((8, 8, 4), (16, 4, 4, 1))
        if group_name is not None:
            first, second, *others = graph.groups
            named = (first, dataclasses.replace(second, name=group_name), *others)
            graph = dataclasses.replace(graph, groups=named)
        generator = np.random.default_rng(0)
        masks = [
            graph.project(generator.random(graph.num_units).astype(np.float32), budget)
            for budget in [Budget(keep_macs=0.5)] * 4
        ]
        macs = [graph.cost(mask).macs for mask in masks]
        names = ("agent", "agent", "cem", "l1/uniform")
        rows = [
            row(name, mask, cost, 0.8 - 0.05 * number, seed=int(number == 1))
            for number, (name, mask, cost) in enumerate(zip(names, masks, macs, strict=True))
        ]
        rows[0] |= {"test_accuracy_finetuned": 0.88, "finetune_seed": 0, "cell": "pruned"}
        cost = graph.dense_cost
        content: dict[str, Any] = {
            "schema": 1,
            "command": "train",
            "arch": "toy",
            "dataset": "digits",
            "seed": 0,
            "budget": {"keep_macs": 0.5},
            "dense": {
                "macs": cost.macs,
                "params": cost.params,
                "test_accuracy": 0.9,
                "test_accuracy_finetuned": 0.91,
            },
            "pruned": {
                "macs": macs[0],
                "params": 40,
                "search_accuracy": 0.8,
                "test_accuracy_recalibrated": 0.79,
                "test_accuracy_finetuned": 0.88,
                "widths": graph.group_widths(masks[0]),
                "seed": 0,
                "mask_digest": masks[0].digest(),
            },
            "search": {
                "seconds": 61.0,
                "networks_evaluated": 32,
                "evaluation_seconds": 5.0,
                "seeds": [0, 1],
            },
            "methods": rows,
            "verdict": None,
            "verdict_reason": "no verdict: 2 seed(s), a verdict needs at least 3",
            "task": "image_classification",
            "score_name": "accuracy",
            "higher_is_better": True,
            "verdict_metric": "test_accuracy_recalibrated",
            "repaired": 0.01,
            "graph": graph.fingerprint(),
            "data": {
                name: {"samples": 10, "fingerprint": "ab"} for name in ("train", "search", "test")
            },
            "recipe": {"epochs": 2},
            "files": {},
            "machine": {"platform": "Linux", "gpu": None, "threads": 1},
            "precision": "float32",
            "versions": {"torch": "2.8"},
            "dense_widths": graph.group_widths(graph.dense_mask()),
            "peak_memory": {"dense": 100, "pruned": 60},
            "latency_ms": {"dense": 1.0, "pruned": 0.5, "on": "the CPU with 1 thread"},
        }
        return Findings(
            content=content | entries,
            structure=graph,
            masks={mask.digest(): mask for mask in masks},
            history=entries.get("history", {"agent, seed 0": HISTORY}),
        )

    return make
