from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from prunegraph.agent.adapt import STRENGTHS, Adapted
from prunegraph.agent.adapt import adapt as adapt_policy
from prunegraph.agent.distill import with_strength
from prunegraph.agent.network import NetworkConfig, PruningNetwork
from prunegraph.agent.policies import TrainedPolicy
from prunegraph.agent.subject import Subject, first_context
from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError
from prunegraph.core.masks import ChannelMask, FloatArray
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.features import FEATURE_NAMES
from prunegraph.graph.pyg import to_pyg
from prunegraph.methods.method import Problem
from prunegraph.methods.prior import Prior
from prunegraph.models import build_model

BUDGET = Budget(keep_macs=0.5)


@pytest.fixture(scope="module")
def graph() -> StructureGraph:
    model = build_model("digits_resnet8_w8", num_classes=10, image_shape=(1, 8, 8))
    return analyse(model.eval(), torch.zeros(1, 1, 8, 8))


@pytest.fixture(scope="module")
def features(graph: StructureGraph) -> FloatArray:
    values = np.random.default_rng(0).normal(size=(graph.num_units, len(FEATURE_NAMES)))
    return values.astype(np.float32)


@pytest.fixture(scope="module")
def policy() -> TrainedPolicy:
    torch.manual_seed(0)
    network = PruningNetwork(NetworkConfig()).eval()
    torch.nn.init.normal_(network.channel_head[-1].weight)
    return TrainedPolicy(network, {"seed": 3})


def scores(policy: TrainedPolicy, graph: StructureGraph, features: FloatArray) -> FloatArray:
    return policy.logits(to_pyg(graph), features, first_context(BUDGET))


def case(
    graph: StructureGraph,
    features: Mapping[str, FloatArray],
    divergence: Callable[[ChannelMask], float],
    project: Callable[[FloatArray], ChannelMask] | None = None,
) -> Subject:
    """Return a network with known features from each prior, and a known divergence of masks."""
    rows = {name: own[:, FEATURE_NAMES.index("start")] for name, own in features.items()}

    def features_from(_: Any, __: Budget, prior: FloatArray) -> FloatArray:
        return next(features[name] for name, own in rows.items() if own is prior)

    problem = SimpleNamespace(
        graph=graph,
        features=features_from,
        project=lambda values, budget: (project or (lambda v: graph.project(v, budget)))(values),
        priors=lambda _: [Prior(name=n, scores=own, divergence=0.0) for n, own in rows.items()],
        unlabelled=SimpleNamespace(evaluate=lambda mask: SimpleNamespace(kl=divergence(mask))),
    )
    return Subject(cast(Problem, problem))


def adapt(policy: TrainedPolicy, *subjects: Subject) -> Adapted:
    return adapt_policy(policy, subjects, [BUDGET])


def test_half_of_a_policy_lies_between_its_prior_and_all_of_it(
    policy: TrainedPolicy, graph: StructureGraph, features: FloatArray
) -> None:
    start = features[:, FEATURE_NAMES.index("start")]
    whole = scores(policy, graph, features)
    half, none = (
        scores(with_strength(policy, strength), graph, features) for strength in (0.5, 0.0)
    )
    np.testing.assert_allclose(half, (whole + start) / 2.0, atol=1e-5)
    np.testing.assert_allclose(none, start, atol=1e-6)
    np.testing.assert_array_equal(scores(policy, graph, features), whole)


@pytest.mark.parametrize("best", STRENGTHS)
def test_the_strength_whose_mask_is_best_is_taken(
    best: float, policy: TrainedPolicy, graph: StructureGraph, features: FloatArray
) -> None:
    wanted = graph.project(scores(with_strength(policy, best), graph, features), BUDGET)

    def divergence(mask: ChannelMask) -> float:
        return float((mask.keep != wanted.keep).sum())

    subject = case(graph, {"taylor/per_mac": features}, divergence)
    adapted = adapt(policy, subject)
    assert adapted.strength == best
    assert adapted.divergence[best] == 0.0
    assert adapted.masks[0] == wanted
    assert adapted.policy.record == {"seed": 3, "strength": best}


def test_where_all_are_alike_the_policy_adds_nothing(
    policy: TrainedPolicy, graph: StructureGraph, features: FloatArray
) -> None:
    subject = case(graph, {"taylor/per_mac": features}, lambda mask: 1.0)
    assert adapt(policy, subject, subject).strength == 0.0


def test_a_strength_that_misses_the_budget_is_left_out(
    policy: TrainedPolicy, graph: StructureGraph, features: FloatArray
) -> None:
    whole = scores(policy, graph, features)

    def project(values: FloatArray) -> ChannelMask:  # as one that is too slow on the clock
        if not np.allclose(values, whole, atol=1e-5):
            msg = "too slow"
            raise BudgetError(msg)
        return graph.project(values, BUDGET)

    def never(values: FloatArray) -> ChannelMask:
        msg = "too slow"
        raise BudgetError(msg)

    subject = case(graph, {"taylor/per_mac": features}, lambda _: 0.0, project)
    assert adapt(policy, subject).strength == 1.0
    with pytest.raises(BudgetError, match="too slow"):
        adapt(policy, case(graph, {"taylor/per_mac": features}, lambda _: 0.0, never))


def test_what_is_no_number_is_not_chosen(
    policy: TrainedPolicy, graph: StructureGraph, features: FloatArray
) -> None:
    start = graph.project(features[:, FEATURE_NAMES.index("start")], BUDGET)
    subject = case(
        graph, {"taylor/per_mac": features}, lambda mask: float("nan") if mask == start else 2.0
    )
    assert adapt(policy, subject).strength == 0.5


@pytest.mark.parametrize("best", ["taylor/per_mac", "l2/uniform"])
def test_the_prior_is_chosen_together_with_the_strength(
    best: str, policy: TrainedPolicy, graph: StructureGraph, features: FloatArray
) -> None:
    other = features.copy()
    other[:, FEATURE_NAMES.index("start")] *= -1.0
    starts = {"taylor/per_mac": features, "l2/uniform": other}
    wanted = graph.project(scores(with_strength(policy, 0.5), graph, starts[best]), BUDGET)
    alone = graph.project(features[:, FEATURE_NAMES.index("start")], BUDGET)  # good by itself
    rank = {wanted: 0.0, alone: 1.0}
    subject = case(graph, starts, lambda mask: rank.get(mask, 2.0))
    adapted = adapt(policy, subject, subject)
    assert [found.prior(BUDGET).name for found in adapted.subjects] == [best, best]
    assert adapted.strength == 0.5
    assert adapted.divergence[0.0] == 1.0
    assert adapted.masks == [wanted, wanted]


def test_a_prior_that_misses_the_budget_is_left_out(
    policy: TrainedPolicy, graph: StructureGraph, features: FloatArray
) -> None:
    other = features.copy()
    other[:, FEATURE_NAMES.index("start")] *= -1.0
    slow = [scores(with_strength(policy, strength), graph, features) for strength in STRENGTHS]

    def project(values: FloatArray) -> ChannelMask:
        if any(np.allclose(values, own, atol=1e-5) for own in slow):
            msg = "too slow"
            raise BudgetError(msg)
        return graph.project(values, BUDGET)

    subject = case(graph, {"taylor/per_mac": features, "l2/uniform": other}, lambda _: 0.0, project)
    assert adapt(policy, subject).subjects[0].prior(BUDGET).name == "l2/uniform"
