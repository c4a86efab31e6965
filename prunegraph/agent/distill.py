"""Distill into the policy network what searches found, so that it knows it without searching.

A search moves offsets that belong to one network (``InstanceOffsets``); the policy network, which
is what can be used on other networks, learns little beside them. After the search the network is
distilled from the keep probabilities that both together gave.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import Data

from prunegraph.agent.network import PruningNetwork
from prunegraph.agent.policies import TrainedPolicy
from prunegraph.agent.threshold import join, solve_threshold, with_features
from prunegraph.core.budget import Budget
from prunegraph.core.masks import FloatArray
from prunegraph.core.seeding import seeded
from prunegraph.graph.graph import StructureGraph
from prunegraph.graph.pyg import to_pyg

TEMPERATURE = 0.3
"""Of the keep probabilities that are distilled: that at which searches begin."""

LEARNING_RATE = 3e-3
ADAPTING_RATE = 3e-4
"""Of a policy that goes on learning."""

FEATURE_NOISE = 0.3
"""Deviation of the noise on the features, which are standardised."""

MOST_CHANNEL_STEPS = 8_000_000
"""Channels of all networks times steps: large networks get fewer steps."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DistillTarget:
    """What a search found for one network and budget.

    Attributes:
        graph: the network.
        node_features: ``[N, F]`` those that the searched policy reads.
        context: ``[K]`` what the policy reads beside the network.
        budget: what may remain.
        scores: ``[N]`` keep scores of policy and offsets together.
    """

    graph: StructureGraph
    node_features: FloatArray
    context: FloatArray
    budget: Budget
    scores: FloatArray


def distill(
    policy: TrainedPolicy,
    distill_targets: Sequence[DistillTarget],
    *,
    steps: int,
    seed: int,
    initial: TrainedPolicy | None = None,
) -> TrainedPolicy:
    """Return a policy that gives the targets' keep probabilities by itself.

    Policy distillation (Rusu et al. 2016, arXiv 1511.06295): the cross-entropy between the target's
    and the own keep probability of each free channel, each target weighted alike.

    Args:
        policy: what the searches trained; it stays as it is.
        distill_targets: at least one.
        steps: steps of AdamW at most (``num_steps``), each on one target of every network, which
            take turns; 0 returns the policy itself.
        seed: of the noise on the features.
        initial: the policy that the search began with, which goes on learning, so that it does not
            forget what it knew of other networks; None = a network drawn anew learns.
    """
    steps = num_steps(distill_targets, steps)
    if steps <= 0:
        return policy
    if initial is None:
        with seeded(seed):
            network = type(policy.network)(policy.network.config)
    else:
        network = copy.deepcopy(initial.network)
    network.train()
    turns: dict[int, list[_Prepared]] = {}
    for distill_target in distill_targets:
        turns.setdefault(id(distill_target.graph), []).append(_Prepared.of(distill_target))
    rate = LEARNING_RATE if initial is None else ADAPTING_RATE
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        for prepared in turns.values():  # one after the other: large graphs need their memory alone
            loss = prepared[step % len(prepared)].loss(network, generator)
            (loss / len(turns)).backward()
        optimizer.step()
    record = {**policy.record, "distill_steps": steps}
    return TrainedPolicy(network.eval(), record)


def num_steps(distill_targets: Sequence[DistillTarget], steps: int) -> int:
    """Return how many of the steps ``distill`` takes: fewer where the networks are large."""
    channels = sum(
        {
            id(distill_target.graph): distill_target.graph.num_units
            for distill_target in distill_targets
        }.values()
    )
    return min(steps, max(MOST_CHANNEL_STEPS // channels, 1))


def with_strength(policy: TrainedPolicy, strength: float) -> TrainedPolicy:
    """Return a policy of which a part counts beside the scores that it starts from.

    Args:
        policy: stays as it is.
        strength: 1 = the same policy, 0 = its prior alone.
    """
    network = copy.deepcopy(policy.network)
    with torch.no_grad():
        for head in (network.channel_head, network.group_head):
            for parameter in head[-1].parameters():
                parameter.mul_(strength)
    return TrainedPolicy(network, {**policy.record, "strength": strength})


@dataclass(frozen=True, eq=False, kw_only=True)
class _Prepared:
    """A target as tensors: ``[N]`` scores and free units, a ``[1]`` threshold."""

    data: Data
    context: Tensor
    targets: Tensor
    free: Tensor
    threshold: Tensor

    @classmethod
    def of(cls, distill_target: DistillTarget) -> "_Prepared":
        graph = distill_target.graph
        scores = distill_target.scores.astype(np.float64)
        limits = np.array([graph.limits(distill_target.budget)])
        threshold = solve_threshold(graph, scores[None], limits, TEMPERATURE)
        features = torch.as_tensor(distill_target.node_features)
        return cls(
            data=join([with_features(to_pyg(graph), features)]),
            context=torch.as_tensor(distill_target.context).reshape(1, -1),
            targets=torch.sigmoid(torch.from_numpy((scores - threshold) / TEMPERATURE)).float(),
            free=torch.from_numpy(graph.free),
            threshold=torch.from_numpy(threshold).float(),
        )

    def loss(self, network: PruningNetwork, generator: torch.Generator) -> Tensor:
        """Return the mean cross-entropy of the free channels, with noisy features."""
        clean = self.data.x
        noise = torch.randn(clean.shape, generator=generator)
        data = with_features(self.data, clean + FEATURE_NOISE * noise)
        scores = network.scores(data, network.encode(data), self.context)  # [N]
        logits = (scores - self.threshold) / TEMPERATURE
        return F.binary_cross_entropy_with_logits(logits[self.free], self.targets[self.free])
