"""From environments to a policy; and what it learns where the best mask is known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunegraph.agent.config import PPOConfig
from prunegraph.agent.network import NetworkConfig
from prunegraph.agent.policies import TrainedPolicy
from prunegraph.agent.threshold import BudgetThreshold
from prunegraph.agent.train import AgentConfig, TrainingResult, train_agent
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from prunegraph.env import ChannelPruningEnv, EnvConfig, PruningTask
from prunegraph.rewards import RewardConfig
from support.toy_env import (
    KnownMaskEvaluator,
    ToyPruningEnv,
    draw_signs,
    toy_accuracy,
    toy_graphs,
)

GRAPHS = toy_graphs()
TOPOLOGIES = [BudgetThreshold.of(graph) for graph in GRAPHS]

Factories = Callable[..., list[Callable[[], ToyPruningEnv]]]
MakeConfig = Callable[..., AgentConfig]


def normalised_score(policy: TrainedPolicy | None, seed: int, count: int = 200) -> float:
    """Return (A - random) / (best - random) on fresh signs; None = random masks."""
    env, rng = ToyPruningEnv(GRAPHS, seed=10_000 + seed), np.random.default_rng(seed)
    accuracies = []
    for _ in range(count):
        obs, _ = env.reset()
        scores = rng.random(env.graph.num_units).astype(np.float32)
        if policy is not None:
            features = obs["node_features"].reshape(env.size, -1)[: env.graph.num_units]
            scores = policy.logits(TOPOLOGIES[env.graph_id].data, features, obs["context"])
        keep = env.graph.project(scores, env.budget).keep
        accuracies.append(toy_accuracy(env.graph, env.best, keep))
    return (float(np.mean(accuracies)) - 0.5) / 0.5


def learn(
    toy_config: MakeConfig, toy_factories: Factories, seed: int, updates: int, **options: Any
) -> TrainingResult:
    config = toy_config(seed=seed, **options)
    block = config.episodes_per_update
    return train_agent(
        toy_factories(min(block, 32), block=block, seed=seed),
        GRAPHS,
        config,
        total_networks=updates * block,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_agent_learns_what_edges_alone_reveal(
    toy_config: MakeConfig,
    toy_factories: Factories,
    network_config: Callable[..., NetworkConfig],
    seed: int,
) -> None:
    agent = learn(toy_config, toy_factories, seed, 30)
    blind = learn(toy_config, toy_factories, seed, 30, network=network_config(use_edges=False))
    assert normalised_score(agent.policy, seed) >= 0.9
    assert 0.3 <= normalised_score(blind.policy, seed) <= 0.7
    assert abs(normalised_score(None, seed)) <= 0.1


@pytest.mark.slow
def test_the_agent_learns(toy_config: MakeConfig, toy_factories: Factories) -> None:
    result = learn(toy_config, toy_factories, 0, 20)
    assert normalised_score(result.policy, 0) >= 0.9
    assert result.history[-1]["reward"] > result.history[0]["reward"] + 0.2
    assert result.history[-1]["entropy_per_bit"] < 0.6
    assert result.networks_evaluated == 20 * 512


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_the_multiplier_ends_the_overshoot(
    toy_config: MakeConfig, toy_factories: Factories, seed: int
) -> None:
    reward = RewardConfig(
        self_competition="accuracy",
        constraint="lagrangian",
        multiplier_step=0.05,
    )
    result = learn(
        toy_config,
        toy_factories,
        seed,
        60,
        reward=reward,
        initial_cost_ratio=1.6,
        episodes_per_update=256,
    )
    overshoot = [record["overshoot"] for record in result.history]
    assert overshoot[0] > 0.2
    assert np.mean(overshoot[-5:]) < 0.02
    assert result.history[-1]["multiplier"] > 0.0
    assert result.history[-1]["raw_cost_ratio"] > 0.9  # and not by pruning everything
    assert normalised_score(result.policy, seed) >= 0.9


MakeEnvs = Callable[..., list[Callable[[], ChannelPruningEnv]]]


@pytest.fixture
def real_factories() -> MakeEnvs:
    """Return a maker of the real environment over toy networks with known best masks."""

    def task(index: int) -> PruningTask:
        graph = GRAPHS[index]
        features, best = draw_signs(graph, np.random.default_rng(index))
        return PruningTask(
            name=f"toy{index}",
            graph=graph,
            node_features=features,
            evaluator=KnownMaskEvaluator(graph, best),
            budget=Budget(keep_macs=0.35),
        )

    def make(*indices: int, workers: int = 1, **options: Any) -> list[Any]:
        def factory(first: int) -> Callable[[], ChannelPruningEnv]:
            config = EnvConfig(
                subset_size=50,
                episodes_per_subset=8,
                first_episode=first,
                episode_stride=workers,
                **options,
            )
            return lambda: ChannelPruningEnv([task(index) for index in indices], config)

        return [factory(first) for first in range(workers)]

    return make


def tiny(toy_config: MakeConfig, **options: Any) -> AgentConfig:
    return toy_config(episodes_per_update=8, reward=RewardConfig(), **options)


def test_self_competition_over_the_real_environment(
    toy_config: MakeConfig, real_factories: MakeEnvs
) -> None:
    seen: list[int] = []
    result = train_agent(
        real_factories(0, 1),
        GRAPHS[:2],
        tiny(toy_config),
        total_networks=36,
        progress=lambda record: seen.append(record["update"]),
    )
    assert seen == [1, 2, 3]
    assert result.networks_evaluated == 3 * (8 + 2)
    assert len(result.history) == 3
    pairs = {"toy0@keep_macs=0.35", "toy1@keep_macs=0.35"}
    assert result.competition.ledgers.keys() == pairs
    for record in result.history:
        assert record["greedy_masks"].keys() == pairs
        assert record["bar"] > 0.0
    assert result.policy.record["networks_evaluated"] == 30


@pytest.mark.parametrize("form", ["best", pytest.param("ema", marks=pytest.mark.slow)])
def test_any_number_of_environments_trains_the_same_policy(
    toy_config: MakeConfig, real_factories: MakeEnvs, form: Any
) -> None:
    config = toy_config(
        episodes_per_update=8,
        reward=RewardConfig(self_competition=form),
        ppo=PPOConfig(surrogate_steps=2, swaps=5),
    )
    alone, four, eight = (
        train_agent(
            real_factories(0, 2, workers=number),
            (GRAPHS[0], GRAPHS[2]),
            config,
            total_networks=40,
            threads=number > 1,
        )
        for number in (1, 4, 8)
    )
    assert four.history == alone.history == eight.history
    assert len(alone.history) >= 4
    state = alone.policy.network.state_dict()
    for name, value in eight.policy.network.state_dict().items():
        assert torch.equal(value, state[name]), name
        assert torch.equal(four.policy.network.state_dict()[name], state[name]), name


def test_a_group_at_a_time(toy_config: MakeConfig, real_factories: MakeEnvs) -> None:
    result = train_agent(
        real_factories(0, per_group=True),
        GRAPHS[:1],
        tiny(toy_config, per_group=True),
        total_networks=20,
    )
    assert result.networks_evaluated == 2 * 9
    assert [record["update"] for record in result.history] == [1, 2]
    with pytest.raises(ConfigError, match=r"these have \[4, 6\]"):
        train_agent(
            real_factories(0, 2, per_group=True),
            (GRAPHS[0], GRAPHS[2]),
            tiny(toy_config, per_group=True),
            total_networks=20,
        )


@pytest.mark.parametrize(
    "others",
    [
        {"swaps": 40},
        pytest.param({}, marks=pytest.mark.slow),
    ],
)
def test_surrogate_episodes_teach_more_of_as_many_networks(
    others: dict[str, Any], toy_config: MakeConfig, real_factories: MakeEnvs
) -> None:
    """The mean accuracy of the last update's episodes, after 8 updates of 8."""
    last = []
    for ppo in (PPOConfig(surrogate_steps=0), PPOConfig(surrogate_steps=20, **others)):
        result = train_agent(
            real_factories(0, 2),
            (GRAPHS[0], GRAPHS[2]),
            tiny(toy_config, ppo=ppo),
            total_networks=80,
        )
        assert result.networks_evaluated == 80
        last.append(result.history[-1]["accuracy"])
    assert last[1] > last[0] + 0.1


def test_episodes_of_several_steps_cannot_be_surrogate(
    toy_config: MakeConfig, real_factories: MakeEnvs
) -> None:
    config = tiny(toy_config, per_group=True, ppo=PPOConfig(surrogate_steps=2))
    with pytest.raises(ConfigError, match="surrogate_steps=2 needs episodes of one step"):
        train_agent(real_factories(0, per_group=True), GRAPHS[:1], config, total_networks=20)


def test_training_starts_from_a_policy(
    toy_config: MakeConfig,
    real_factories: MakeEnvs,
    network_config: Callable[..., NetworkConfig],
) -> None:
    frozen = PPOConfig(learning_rate=0.0)
    first = train_agent(real_factories(0), GRAPHS[:1], tiny(toy_config), total_networks=9)
    config = tiny(toy_config, ppo=frozen, seed=5)
    second = train_agent(
        real_factories(1), GRAPHS[1:2], config, total_networks=9, initial=first.policy
    )
    for name, value in first.policy.network.state_dict().items():
        assert torch.equal(second.policy.network.state_dict()[name], value), name
    other = tiny(toy_config, network=network_config(hidden=16))
    with pytest.raises(ConfigError, match="another hidden"):
        train_agent(real_factories(1), GRAPHS[1:2], other, total_networks=9, initial=first.policy)


def test_learning_curves_are_written(
    toy_config: MakeConfig, real_factories: MakeEnvs, tmp_path: Path
) -> None:
    train_agent(
        real_factories(0), GRAPHS[:1], tiny(toy_config), total_networks=20, tensorboard=tmp_path
    )
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"train/approx_kl" in events.read_bytes()


def test_a_single_episode_an_update_is_refused(toy_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="episodes_per_update=1"):
        toy_config(episodes_per_update=1)
