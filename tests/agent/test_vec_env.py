"""Rewards in the main process, over the real environment with a stand-in evaluator."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from prunegraph.agent.train import make_vec_env
from prunegraph.agent.vec_env import SelfCompetitionVecEnv
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from prunegraph.core.masks import pack_bits
from prunegraph.core.outcome import Outcome
from prunegraph.env import ChannelPruningEnv, EnvConfig, PruningTask
from prunegraph.graph.graph import StructureGraph
from prunegraph.rewards import RewardConfig
from support.toy_env import KnownMaskEvaluator, draw_signs, toy_graphs

GRAPHS = toy_graphs()


def task(index: int = 0) -> PruningTask:
    graph = GRAPHS[index]
    features, best = draw_signs(graph, np.random.default_rng(index))
    return PruningTask(
        name=f"toy{index}",
        graph=graph,
        node_features=features,
        evaluator=KnownMaskEvaluator(graph, best),
        budget=Budget(keep_macs=0.4),
    )


def factory(first: int, stride: int, **options: object) -> Callable[[], ChannelPruningEnv]:
    config = EnvConfig(
        subset_size=50,
        episodes_per_subset=8,
        episodes_per_pair=2,
        first_episode=first,
        episode_stride=stride,
        **options,  # type: ignore[arg-type]
    )
    return lambda: ChannelPruningEnv([task(0), task(1)], config)


@pytest.fixture
def make_env() -> Iterator[Callable[..., SelfCompetitionVecEnv]]:
    opened: list[SelfCompetitionVecEnv] = []

    def make(
        workers: int = 1, *, threads: bool = False, form: str = "best", **options: object
    ) -> SelfCompetitionVecEnv:
        reward = RewardConfig(self_competition=form)  # type: ignore[arg-type]
        factories = [factory(i, workers, **options) for i in range(workers)]
        venv = make_vec_env(factories, threads=threads)
        opened.append(SelfCompetitionVecEnv(venv, reward, episodes_per_update=8))
        return opened[-1]

    yield make
    for env in opened:
        env.close()


def keep_all(row: dict[str, np.ndarray], budget: Budget) -> np.ndarray:
    graph: StructureGraph = GRAPHS[int(row["graph_id"][0])]
    return graph.project(np.arange(graph.num_units, dtype=np.float32), budget).keep


def play(env: SelfCompetitionVecEnv, updates: int) -> dict[str, list[float]]:
    """Play updates with actions fixed by the number of the episode; return what came of it."""
    env.greedy = keep_all
    found: dict[str, list[float]] = {"rewards": [], "bars": [], "networks": []}
    size = env.action_space.shape[0]
    for update in range(updates):
        env.start_block(update)
        for step in range(8 // env.num_envs):
            episodes = update * 8 + step * env.num_envs + np.arange(env.num_envs)
            actions = [np.random.default_rng(e).integers(0, 2, size) for e in episodes]
            _, rewards, dones, _ = env.step(np.stack(actions))
            assert dones.all()
            found["rewards"] += rewards.tolist()
        found["bars"] += [row["bar"] for row in env.records]
        found["networks"].append(env.num_networks)
    return found


def test_one_and_two_workers_give_the_same_rewards(
    make_env: Callable[..., SelfCompetitionVecEnv],
) -> None:
    alone = play(make_env(1), 3)
    assert play(make_env(2), 3) == alone
    assert play(make_env(8, threads=True), 3) == alone
    assert len(set(alone["rewards"])) > 3


def test_environments_wait_for_their_networks_at_once(
    make_env: Callable[..., SelfCompetitionVecEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = threading.Barrier(8, timeout=30)
    evaluate = KnownMaskEvaluator.evaluate

    def wait_for_the_others(*arguments: Any) -> Outcome:
        if threading.current_thread() is not threading.main_thread():  # which measures the bars
            meeting.wait()
        return evaluate(*arguments)

    monkeypatch.setattr(KnownMaskEvaluator, "evaluate", wait_for_the_others)
    assert len(play(make_env(8, threads=True), 2)["rewards"]) == 16


def test_an_error_in_a_thread_reaches_the_caller(
    make_env: Callable[..., SelfCompetitionVecEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_env(2, threads=True, form="accuracy")
    env.start_block(0)
    monkeypatch.setattr(KnownMaskEvaluator, "evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        env.step(np.ones((2, *env.action_space.shape)))


def test_the_first_bar_is_the_policys_own_mask(
    make_env: Callable[..., SelfCompetitionVecEnv],
) -> None:
    env = make_env()
    found = play(env, 1)
    graph, best = GRAPHS[0], draw_signs(GRAPHS[0], np.random.default_rng(0))[1]
    mask = keep_all({"graph_id": np.zeros(1)}, Budget(keep_macs=0.4))
    assert env.greedy_masks["toy0@keep_macs=0.4"] == pack_bits(mask)
    evaluator = KnownMaskEvaluator(graph, best)
    subset_noise = {
        round(bar - evaluator.evaluate(graph.mask(mask)).accuracy, 3) for bar in found["bars"]
    }
    assert any(abs(noise) <= evaluator.noise for noise in subset_noise)
    assert found["networks"] == [8 + 2]  # two networks in turn, each with its own bar
    assert min(found["rewards"]) < 0.0


def test_the_best_mask_is_measured_once_an_update(
    make_env: Callable[..., SelfCompetitionVecEnv],
) -> None:
    found = play(make_env(), 3)
    assert found["networks"] == [10, 20, 30]
    per_update = [set(found["bars"][8 * k : 8 * k + 8]) for k in range(3)]
    assert all(1 <= len(bars) <= 2 for bars in per_update)  # a network's bar stands for the update
    assert per_update[0].isdisjoint(per_update[1])  # and moves with the images


def test_plain_accuracy_measures_nothing_else(
    make_env: Callable[..., SelfCompetitionVecEnv],
) -> None:
    env = make_env(form="accuracy")
    found = play(env, 2)
    assert found["networks"] == [8, 16]
    assert found["rewards"][8:] == pytest.approx([row["accuracy"] for row in env.records])


def test_the_cells_of_an_update_are_those_that_it_can_touch(
    make_env: Callable[..., SelfCompetitionVecEnv],
) -> None:
    env = make_env(budgets=tuple(Budget(keep_macs=share) for share in (0.3, 0.5, 0.7)))
    turn, num_pairs = 2, 6
    for episodes in range(1, 12):
        env.episodes_per_update = episodes
        touched = [
            len({(first + number) // turn % num_pairs for number in range(episodes)})
            for first in range(0, 60 * episodes, episodes)
        ]
        assert env.cells_per_update == max(touched)


def test_an_uneven_share_is_refused(make_env: Callable[..., SelfCompetitionVecEnv]) -> None:
    with pytest.raises(ConfigError, match="8 episodes an update cannot be shared by 3"):
        make_env(3)


def test_blocks_of_another_length_are_refused(
    make_env: Callable[..., SelfCompetitionVecEnv],
) -> None:
    env = make_env()
    env.episodes_per_update = 16
    env.start_block(0)
    with pytest.raises(ConfigError, match="episodes_per_subset=16"):
        for _ in range(16):
            env.step(np.ones((1, *env.action_space.shape)))
