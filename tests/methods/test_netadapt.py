import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from prunegraph.core.masks import ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.graph import StructureGraph
from prunegraph.methods.method import Problem
from prunegraph.methods.netadapt import NetAdapt
from support.toy_env import toy_graph


class KnownAccuracy:
    """An evaluator whose accuracy is a function of the widths; nothing is run."""

    def __init__(self, graph: StructureGraph, accuracy: Callable[[dict[str, int]], float]) -> None:
        self.graph, self.accuracy = graph, accuracy
        self.search = range(10)
        self.asked: list[tuple[int, ...]] = []
        self.num_networks = 0

    def evaluate(self, mask: ChannelMask, subset: Tensor | None = None) -> Outcome:
        widths = self.graph.group_widths(mask)
        self.asked.append(tuple(widths.values()))
        self.num_networks += 1
        accuracy = self.accuracy(widths)
        return Outcome(
            accuracy=accuracy,
            loss=1.0 - accuracy,
            kl=None,
            num_images=10,
            cost=self.graph.cost(mask),
            digest=mask.digest(),
            seconds=0.0,
        )

    def evaluate_all(self, masks: Sequence[ChannelMask]) -> list[Outcome]:
        return [self.evaluate(mask) for mask in masks]

    def is_cached(self, mask: ChannelMask, subset: Tensor | None = None) -> bool:
        return False

    def draw_subset(self, size: int, seed: int) -> Tensor:
        return torch.arange(len(self.search))

    def narrow(self, subset: Tensor | None) -> None:
        return None


def toy_problem(
    widths: tuple[int, ...],
    accuracy: Callable[[dict[str, int]], float],
    *,
    max_networks: int,
    keep_macs: float,
) -> Problem:
    """Return a chain of convolutions whose first and last are free: MACs are products of widths."""
    graph = toy_graph(widths, [1] * (len(widths) + 1))
    taylor = np.arange(graph.num_units, dtype=np.float32) + 1
    return Problem(
        task=SimpleNamespace(model=nn.Identity(), example_inputs=torch.zeros(1)),  # type: ignore[arg-type]
        structure=graph,
        budget=Budget(keep_macs=keep_macs),
        statistics={"taylor": taylor},
        make_evaluator=lambda _: KnownAccuracy(graph, accuracy),  # type: ignore[arg-type,return-value]
        make_unlabelled=lambda: KnownAccuracy(graph, accuracy),  # type: ignore[arg-type,return-value]
        max_networks=max_networks,
    )


def test_the_known_greedy_path_is_taken() -> None:
    def accuracy(widths: dict[str, int]) -> float:
        first, second = widths.values()
        free = first >= 6  # conv1 costs nothing down to 6 channels, conv2 a little each
        return (1.0 if free else 0.3) - 0.01 * (8 - second)

    # MACs 1 * w1 + w1 * w2 + 2 * w2: 88 dense, at most 44; the first of four steps is of 11
    problem = toy_problem((8, 8), accuracy, max_networks=9, keep_macs=0.5)
    result = NetAdapt().prune(problem)
    asked = problem.evaluator.asked  # type: ignore[attr-defined]
    assert asked == [
        *((6, 8), (8, 6)),  # 77: conv1 at 6 (70 MACs) wins; the rest in three steps
        *((5, 8), (6, 6)),  # 61.3: conv1 at 5 (61), or conv2 at 6 (54), which wins
        *((5, 6), (6, 5)),  # 49: conv1 at 5 (47), or conv2 at 5 (46), which wins
        *((5, 5), (6, 4)),  # 44: conv1 at 5 (40), or conv2 at 4 (38), which wins
        (7, 4),  # one channel of conv1 still fits on top: 7 + 28 + 8 = 43
    ]
    assert tuple(problem.graph.group_widths(result.mask).values()) == (7, 4)
    assert result.networks == 9


def test_channels_of_least_taylor_importance_go_first() -> None:
    problem = toy_problem((6, 6), lambda widths: 0.5, max_networks=40, keep_macs=0.5)
    keep = NetAdapt().prune(problem).mask.keep
    for group in problem.graph.groups:
        kept = keep[group.units]
        assert (np.sort(kept) == kept).all()  # taylor rises with the number: the tail stays


def test_groups_that_cannot_pay_make_no_proposal() -> None:
    problem = toy_problem((2, 12), lambda widths: 1.0, max_networks=3, keep_macs=0.3)
    NetAdapt().prune(problem)
    asked = problem.evaluator.asked  # type: ignore[attr-defined]
    # 50 MACs, at most 15, one round of two steps: 32.5. conv1 at 1 leaves 37, conv2 at 7 leaves 30
    assert asked[0] == (2, 7)
    assert len(asked) == 2


def test_a_deep_network_uses_its_networks_and_loses_no_group_at_once() -> None:
    widths = (8,) * 20
    problem = toy_problem(widths, lambda found: sum(found.values()), max_networks=90, keep_macs=0.5)
    result = NetAdapt().prune(problem)
    asked = problem.evaluator.asked  # type: ignore[attr-defined]
    assert len(asked) > 70  # 4 rounds of 20
    assert sorted(map(min, asked[:20]))[2] == 4  # but at the ends a step is half of a group at most
    assert min(problem.graph.group_widths(result.mask).values()) >= 2


def test_too_few_networks_for_a_step_are_refused() -> None:
    problem = toy_problem((4, 4, 4), lambda widths: 1.0, max_networks=3, keep_macs=0.5)
    with pytest.raises(ConfigError, match=r"networks=3 is too few for netadapt, which runs 4"):
        NetAdapt().prune(problem)


def test_a_budget_that_the_steps_cannot_be_measured_by_is_refused() -> None:
    problem = toy_problem((4, 4), lambda _: 0.5, max_networks=20, keep_macs=0.5)
    timed = dataclasses.replace(problem, budget=Budget(max_latency=1.0))
    with pytest.raises(
        ConfigError,
        match=r"netadapt goes by no latency, the budget is max_latency=.*: give keep_macs",
    ):
        NetAdapt().prune(timed)
