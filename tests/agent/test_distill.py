"""What a search found for its networks is learned to the policy network."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from prunegraph.agent.distill import DistillTarget, distill, num_steps
from prunegraph.agent.network import NetworkConfig, PruningNetwork
from prunegraph.agent.policies import TrainedPolicy
from prunegraph.core.budget import Budget
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.features import FEATURE_NAMES
from prunegraph.graph.pyg import to_pyg

HALF = Budget(keep_macs=0.5)
CONTEXT = np.zeros(len(NetworkConfig().context_names), dtype=np.float32)
TAUGHT = FEATURE_NAMES.index("l1")  # the prior is another column


def structure(width: int) -> StructureGraph:
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.Flatten(),
        nn.Linear(32 * width, 4),
    )
    return analyse(model.eval(), torch.zeros(1, 3, 4, 4))


def distill_target(width: int) -> DistillTarget:
    """Return a search that found one feature, with an offset of a group, to be all that counts."""
    graph = structure(width)
    features = np.random.default_rng(width).normal(size=(graph.num_units, len(FEATURE_NAMES)))
    features[~graph.free] = 0.0
    scores = 2.0 * features[:, TAUGHT] + (graph.group_of == graph.group_of[graph.free][0])
    return DistillTarget(
        graph=graph,
        node_features=features.astype(np.float32),
        context=CONTEXT,
        budget=HALF,
        scores=scores.astype(np.float32),
    )


def seen_by(policy: TrainedPolicy) -> tuple[str, ...]:
    return policy.network.config.feature_names


def agreement(policy: TrainedPolicy, about: DistillTarget) -> float:
    """Return the share of free channels that policy and distill_target decide alike."""
    graph = about.graph
    columns = [FEATURE_NAMES.index(name) for name in seen_by(policy)]
    own = policy.logits(to_pyg(graph), about.node_features[:, columns], about.context)
    masks = [graph.project(scores, HALF).keep[graph.free] for scores in (own, about.scores)]
    return float((masks[0] == masks[1]).mean())


@pytest.fixture(scope="module")
def untaught() -> TrainedPolicy:
    torch.manual_seed(0)
    return TrainedPolicy(PruningNetwork(NetworkConfig()).eval(), {"seed": 3})


@pytest.fixture(scope="module")
def learned(untaught: TrainedPolicy) -> TrainedPolicy:
    return distill(untaught, [distill_target(24), distill_target(40)], steps=150, seed=0)


def test_the_policy_decides_as_the_search_did(
    untaught: TrainedPolicy, learned: TrainedPolicy
) -> None:
    for width in (24, 40):
        assert agreement(untaught, distill_target(width)) < 0.7
        assert agreement(learned, distill_target(width)) > 0.9


def test_what_was_taught_holds_on_a_network_of_another_size(
    untaught: TrainedPolicy, learned: TrainedPolicy
) -> None:
    assert agreement(untaught, distill_target(32)) < 0.7
    assert agreement(learned, distill_target(32)) > 0.8


def test_the_policy_that_is_taught_stays_as_it_is(
    untaught: TrainedPolicy, learned: TrainedPolicy
) -> None:
    torch.manual_seed(0)
    fresh = PruningNetwork(NetworkConfig())
    for name, value in fresh.state_dict().items():
        assert torch.equal(untaught.network.state_dict()[name], value)
    assert learned.record == {"seed": 3, "distill_steps": 150}
    assert not learned.network.training


def test_a_policy_that_goes_on_learning_keeps_what_it_knew(
    untaught: TrainedPolicy, learned: TrainedPolicy
) -> None:
    kept, anew = (
        distill(untaught, [distill_target(8)], steps=5, seed=0, initial=initial)
        for initial in (learned, None)
    )
    assert not torch.equal(
        kept.network.channel_head[2].weight, learned.network.channel_head[2].weight
    )
    assert agreement(kept, distill_target(40)) > 0.9
    assert agreement(anew, distill_target(40)) < 0.8


def test_networks_are_taught_in_turns_of_their_distill_targets(untaught: TrainedPolicy) -> None:
    first, second = distill_target(24), distill_target(24)
    second = replace(first, scores=second.scores[::-1].copy())
    for steps, alike in ((1, True), (2, False)):
        alone, both = (
            distill(untaught, distill_targets, steps=steps, seed=0)
            for distill_targets in ([first], [first, second])
        )
        weights = [policy.network.channel_head[2].weight for policy in (alone, both)]
        assert torch.equal(*weights) is alike


def test_no_steps_return_the_policy_itself(untaught: TrainedPolicy) -> None:
    assert distill(untaught, [distill_target(8)], steps=0, seed=0) is untaught


def test_large_networks_get_fewer_steps() -> None:
    assert num_steps([distill_target(8)], 3) == 3
    assert num_steps([distill_target(8)], 10**9) < 10**9


def test_lessons_repeat_with_their_seed(untaught: TrainedPolicy) -> None:
    once, again = (distill(untaught, [distill_target(8)], steps=3, seed=1) for _ in range(2))
    for name, value in once.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], value)
