"""Policies over toy networks, observations of them, and options that learn the toy environment."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prunegraph.agent.config import PPOConfig
from prunegraph.agent.network import NetworkConfig
from prunegraph.agent.policy import ChannelPruningPolicy
from prunegraph.agent.threshold import BudgetThreshold
from prunegraph.agent.train import AgentConfig
from prunegraph.graph.graph import StructureGraph
from prunegraph.rewards import RewardConfig
from support.toy_env import TOY_FEATURE_NAMES, ToyPruningEnv, toy_graph, toy_graphs

GRAPHS = toy_graphs()

Factories = list[Callable[[], ToyPruningEnv]]


def _network_config(**options: Any) -> NetworkConfig:
    defaults = {"feature_names": TOY_FEATURE_NAMES, "hidden": 32}
    return NetworkConfig(**{**defaults, **options})


@pytest.fixture(autouse=True)
def logs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let models that are given no logger leave their folder where pytest cleans up."""
    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path / "logs"))


@pytest.fixture
def network_config() -> Callable[..., NetworkConfig]:
    """Return a maker of options for networks over toy features."""
    return _network_config


@pytest.fixture
def toy_config() -> Callable[..., AgentConfig]:
    """Return a maker of options with which the toy environment is learnt."""

    def make(**options: Any) -> AgentConfig:
        defaults = {
            "network": _network_config(),
            "ppo": PPOConfig(learning_rate=2e-3, temperature_start=1.0, temperature_end=1.0),
            "reward": RewardConfig(self_competition="accuracy"),
            "episodes_per_update": 512,
        }
        return AgentConfig(**{**defaults, **options})

    return make


@pytest.fixture
def toy_factories() -> Callable[..., Factories]:
    """Return a maker of toy environment factories, one a worker."""

    def make(count: int, *, block: int, seed: int = 0, repeat: int = 16) -> Factories:
        def factory(first: int) -> Callable[[], ToyPruningEnv]:
            return lambda: ToyPruningEnv(
                GRAPHS,
                repeat=repeat,
                block=block,
                seed=seed,
                first_episode=first,
                episode_stride=count,
            )

        return [factory(first) for first in range(count)]

    return make


@pytest.fixture
def make_policy() -> Callable[..., ChannelPruningPolicy]:
    """Return a maker of policies over toy networks; their heads are not zero if ``trained``."""

    def make(
        *,
        trained: bool = True,
        pad_to: int | None = None,
        constraint: Any = "bias",
        initial_cost_ratio: float = 1.0,
        **options: Any,
    ) -> ChannelPruningPolicy:
        padding = () if pad_to is None else (toy_graph((pad_to,), (1, 1)),)
        env = ToyPruningEnv((*GRAPHS, *padding))
        torch.manual_seed(0)
        policy = ChannelPruningPolicy(
            env.observation_space,
            env.action_space,
            lambda _: 1e-3,
            thresholds={index: BudgetThreshold.of(graph) for index, graph in enumerate(GRAPHS)},
            network_config=_network_config(**options),
            constraint=constraint,
            initial_cost_ratio=initial_cost_ratio,
        )
        network = policy.network
        for head in (network.channel_head, network.group_head) * trained:
            torch.nn.init.normal_(head[-1].weight)
        return policy

    return make


@pytest.fixture
def observe() -> Callable[..., dict[str, Tensor]]:
    """Return a maker of batches of observations of toy networks."""

    def make(
        count: int,
        *,
        seed: int = 0,
        pad_to: int | None = None,
        graphs: tuple[StructureGraph, ...] = GRAPHS,
    ) -> dict[str, Tensor]:
        env = ToyPruningEnv(graphs, seed=seed)
        rows = [env.reset()[0] for _ in range(count)]
        batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        if pad_to is not None:
            size = toy_graph((pad_to,), (1, 1)).num_units
            for name, width in (("node_features", 5), ("node_mask", 1), ("action_mask", 1)):
                missing = size * width - batch[name].shape[1]
                batch[name] = torch.nn.functional.pad(batch[name], (0, missing))
        return batch

    return make
