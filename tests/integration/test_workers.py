"""Environment, rewards and the agent's vectorised wrapper together: workers change nothing."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

from prunegraph.agent.vec_env import SelfCompetitionVecEnv
from prunegraph.core.budget import Budget
from prunegraph.core.masks import ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.env import ChannelPruningEnv, EnvConfig, PruningTask
from prunegraph.graph import StructureGraph, analyse
from prunegraph.rewards import RewardConfig

EPISODES = 8


class BitEvaluator:
    """Accuracy follows from the bits and the images."""

    def __init__(self, graph: StructureGraph) -> None:
        self.graph = graph
        self.num_networks = 0

    def evaluate(self, mask: ChannelMask, subset: Tensor | None = None) -> Outcome:
        assert subset is not None
        self.num_networks += 1
        shift = 0.01 * float(np.sin(int(subset.sum())))
        accuracy = 0.1 + 0.8 * float(mask.keep[::2].mean()) + shift
        cost = self.graph.cost(mask)
        return Outcome(
            accuracy=accuracy,
            loss=2.0 - accuracy,
            kl=None,
            num_images=len(subset),
            cost=cost,
            digest=mask.digest(),
            seconds=0.0,
        )

    def draw_subset(self, size: int, seed: int) -> Tensor:
        return torch.randperm(100, generator=torch.Generator().manual_seed(seed))[:size]


def structure(width: int) -> StructureGraph:
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.Flatten(),
        nn.Linear(16 * width, 4),
    )
    return analyse(model.eval(), torch.zeros(1, 3, 4, 4))


GRAPHS = (structure(6), structure(10))


def make(worker: int, workers: int) -> Callable[[], ChannelPruningEnv]:
    def build() -> ChannelPruningEnv:
        tasks = [
            PruningTask(
                name=f"net{number}",
                graph=graph,
                node_features=np.zeros((graph.num_units, 2), dtype=np.float32),
                evaluator=BitEvaluator(graph),
                budget=Budget(keep_macs=0.5),
            )
            for number, graph in enumerate(GRAPHS)
        ]
        config = EnvConfig(
            subset_size=20,
            episodes_per_subset=EPISODES,
            episodes_per_pair=2,
            first_episode=worker,
            episode_stride=workers,
            seed=3,
        )
        return ChannelPruningEnv(tasks, config)

    return build


def play(reward: RewardConfig, workers: int, blocks: Sequence[int]) -> list[Any]:
    venv = DummyVecEnv([make(worker, workers) for worker in range(workers)])
    env = SelfCompetitionVecEnv(venv, reward, episodes_per_update=EPISODES)
    env.seed(11)  # as PPO does
    env.reset()
    record = []
    for block in blocks:
        contexts = env.start_block(block)["context"]
        for step in range(EPISODES // workers):
            first = block * EPISODES + step * workers
            actions = [
                np.random.default_rng(first + worker).random(env.action_space.shape) < 0.7
                for worker in range(workers)
            ]
            before = contexts.copy()
            observation, rewards, _, infos = env.step(np.stack(actions))
            contexts = observation["context"]
            for worker, info in enumerate(infos):
                name = (info["episode_number"], info["pair"], info["mask_digest"])
                record.append((name, before[worker].tolist(), float(rewards[worker])))
    return record


@pytest.mark.parametrize(
    ("form", "constraint"), [("best", "bias"), ("ema", "bias"), ("accuracy", "lagrangian")]
)
def test_any_number_of_workers_gives_the_same_rewards(form: Any, constraint: Any) -> None:
    reward = RewardConfig(self_competition=form, constraint=constraint, multiplier_period=1)
    alone = play(reward, 1, range(5))
    assert alone == play(reward, 2, range(5)) == play(reward, 4, range(5))
    assert [name[0] for name, _, _ in alone] == list(range(5 * EPISODES))
    assert len({cell for (_, cell, _), _, _ in alone}) == 2
    assert len({value for _, _, value in alone}) >= 3


def test_a_later_block_plays_its_own_episodes() -> None:
    reward = RewardConfig(self_competition="accuracy")
    resumed = [(name, value) for name, _, value in play(reward, 2, [3, 4])]
    complete = [(name, value) for name, _, value in play(reward, 1, range(5))]
    assert resumed == complete[3 * EPISODES :]
