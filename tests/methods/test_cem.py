from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from prunegraph.core.masks import ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.data import load_dataset
from prunegraph.graph import analyse
from prunegraph.methods.cem import CrossEntropySearch
from prunegraph.methods.context import make_problem as pose
from prunegraph.methods.method import Problem
from prunegraph.methods.random_search import RandomSearch
from prunegraph.methods.registry import make_method
from prunegraph.models import build_model, load_weights, weights_info
from prunegraph.tasks.classification import evaluate
from prunegraph.tasks.image_classification import ImageClassification

MakeProblem = Callable[..., Problem]


class KnownLoss:
    """An evaluator whose loss is the distance from known widths; nothing is run.

    With ``steady`` that is the divergence or the soft accuracy, and accuracy and loss lie.
    """

    def __init__(self, problem: Problem, best: dict[str, int], *, steady: str) -> None:
        self.problem, self.best, self.steady = problem, best, steady
        self.search = problem.evaluator.search
        self.num_networks = 0

    def evaluate(self, mask: ChannelMask, subset: torch.Tensor | None = None) -> Outcome:
        self.num_networks += 1
        widths = self.problem.graph.group_widths(mask)
        distance = float(np.mean([abs(widths[k] - self.best[k]) / 16 for k in widths]))
        loss = -distance if self.steady else distance
        return Outcome(
            accuracy=float(np.exp(-1.0 - loss)),
            loss=loss,
            kl=distance if self.steady == "kl" else None,
            num_images=len(self.search) if subset is None else len(subset),
            cost=self.problem.graph.cost(mask),
            digest=mask.digest(),
            seconds=0.0,
            soft_accuracy=-distance if self.steady == "soft" else None,
        )

    def evaluate_all(self, masks: Sequence[ChannelMask]) -> list[Outcome]:
        return [self.evaluate(mask) for mask in masks]

    def is_cached(self, mask: ChannelMask, subset: torch.Tensor | None = None) -> bool:
        return False

    def draw_subset(self, size: int, seed: int) -> torch.Tensor:
        return torch.arange(len(self.search))[:size]

    def narrow(self, subset: torch.Tensor) -> torch.Tensor | None:
        return None if len(subset) == len(self.search) else subset


def with_known_best(problem: Problem, *, steady: str = "") -> tuple[Problem, float]:
    """Return the problem with its best widths far from the prior's, and the prior's loss."""
    graph = problem.graph
    scores = np.random.default_rng(7).normal(size=len(graph.groups))[graph.group_of]
    taylor = np.log(problem.statistics["taylor"] + 1e-9) - np.log(graph.class_costs()[0] + 1e-9)
    target = graph.project((taylor + 1.5 * scores).astype(np.float32), problem.budget)
    oracle = KnownLoss(problem, graph.group_widths(target), steady=steady)
    start = make_method("taylor/per_mac").prune(problem).mask
    loss = oracle.evaluate(start).loss
    oracle.num_networks = 0
    return replace(problem, make_evaluator=lambda _: oracle), loss


@pytest.mark.parametrize("seed", range(3))
def test_cross_entropy_finds_known_widths_and_random_search_does_not(
    seed: int, make_problem: MakeProblem
) -> None:
    problem, start = with_known_best(make_problem(seed, max_networks=240))
    cem = CrossEntropySearch().prune(problem)
    problem, _ = with_known_best(make_problem(seed, max_networks=240))
    random = RandomSearch().prune(problem)
    cem_loss, random_loss = (problem.evaluator.evaluate(r.mask).loss for r in (cem, random))
    assert cem_loss < 0.25 * start
    assert cem_loss < random_loss


@pytest.mark.parametrize("name", ["cem", "random_search", "netadapt"])
def test_where_a_steadier_figure_is_measured_it_is_what_searches_look_at(
    name: str, make_problem: MakeProblem
) -> None:
    chosen = []
    for steady in ("", "kl", "soft"):
        problem, _ = with_known_best(make_problem(max_networks=120), steady=steady)
        chosen.append(make_method(name).prune(problem).mask)
    assert chosen[0] == chosen[1] == chosen[2]


def test_cross_entropy_uses_its_networks_where_masks_repeat(make_problem: MakeProblem) -> None:
    problem = make_problem(max_networks=40)
    result = CrossEntropySearch(sigma=1e-4, least_sigma=1e-4).prune(problem)
    assert result.networks < 40  # so small a deviation finds nothing new, and it ends
    result = CrossEntropySearch(sigma=0.5, least_sigma=1e-4, num_elites=1, smoothing=1.0).prune(
        make_problem(max_networks=50)
    )
    assert result.networks >= 48  # finalists were run already; the last are for the mean


def test_random_search_uses_its_networks_where_masks_repeat(make_problem: MakeProblem) -> None:
    result = RandomSearch(least_share=0.7).prune(make_problem(max_networks=30))
    assert result.networks == 30
    result = RandomSearch(least_share=1.0).prune(make_problem(max_networks=30))
    assert result.networks == 1


def test_cross_entropy_does_not_end_below_its_start(make_problem: MakeProblem) -> None:
    problem = make_problem(max_networks=40)
    start = make_method("taylor/per_mac").prune(problem).mask
    result = CrossEntropySearch(sigma=3.0).prune(problem)
    evaluator = problem.evaluator
    assert evaluator.evaluate(result.mask).accuracy >= evaluator.evaluate(start).accuracy


@pytest.mark.parametrize("name", ["cem", "random_search"])
@pytest.mark.parametrize("max_networks", [1, 2, 17, 30])
def test_a_search_keeps_within_any_number_of_networks(
    name: str, max_networks: int, make_problem: MakeProblem
) -> None:
    problem = make_problem(max_networks=max_networks)
    result = make_method(name).prune(problem)
    assert 1 <= result.networks <= max_networks


@pytest.mark.parametrize("name", ["cem", "random_search"])
def test_a_search_without_networks_is_refused(name: str, make_problem: MakeProblem) -> None:
    with pytest.raises(ConfigError, match="networks=0 is too few for"):
        make_method(name).prune(make_problem(max_networks=0))


def test_elites_must_fit_the_population() -> None:
    with pytest.raises(ConfigError, match="num_elites=9"):
        CrossEntropySearch(population=8, num_elites=9)


@pytest.mark.slow
@pytest.mark.data
def test_cem_gains_three_points_over_taylor_per_mac(shared_dir: Path) -> None:
    weights = shared_dir / "weights" / "resnet20_cifar10_45k.safetensors"
    info = weights_info(weights)
    assert info is not None
    data = load_dataset(
        "cifar10", data_dir=shared_dir / "data" / "cifar10.tar", mean=info.mean, std=info.std
    )
    model = build_model("resnet20", num_classes=10, image_shape=data.image_shape)
    load_weights(model, weights)
    example = torch.zeros(1, *data.image_shape)
    graph = analyse(model, example)
    task = ImageClassification(
        model=model, example_inputs=example, train=data.train, search=data.search
    )
    problem = pose(
        task,
        graph,
        Budget(keep_macs=0.5),
        max_networks=384,
        reconstruct=False,
        metric="accuracy",
    )
    evaluator = problem.evaluator
    start = make_method("taylor/per_mac").prune(problem).mask
    result = make_method("cem").prune(problem)
    search = [evaluator.evaluate(mask).accuracy for mask in (start, result.mask)]
    test = [evaluate(evaluator.prune(mask), data.test).accuracy for mask in (start, result.mask)]
    print(f"Taylor per MAC -> CEM: search {search}, test {test}")
    assert result.networks <= 384
    assert graph.cost(result.mask).macs <= 0.5 * graph.dense_cost.macs
    assert search[1] >= search[0] + 0.03
