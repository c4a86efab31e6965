import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from prunegraph.core.budget import Budget
from prunegraph.core.masks import ChannelMask
from prunegraph.methods.amc.ddpg import BASELINE_DECAY, _EpisodeBuffer, noise, train_widths
from prunegraph.methods.amc.env import LEAST_SHARE, OBSERVATION_NAMES, WidthEnv
from support.toy_env import toy_graph

WIDTHS = (10, 16, 6, 12)


def make_env(
    budget: Budget, evaluate: Callable[[ChannelMask], float] = lambda mask: 0.5
) -> WidthEnv:
    graph = toy_graph(WIDTHS, (16, 16, 8, 8, 1))
    importance = np.random.default_rng(0).random(graph.num_units).astype(np.float32)
    return WidthEnv(graph, importance, budget, lambda s: graph.project(s, budget), evaluate)


def play(env: WidthEnv, actions: list[float]) -> ChannelMask:
    env.reset()
    for number, action in enumerate(actions):
        _, reward, done, _, _ = env.step(np.array([action], dtype=np.float32))
        assert done == (number == len(actions) - 1)
        assert (reward > 0) == done
    return env.mask()


@pytest.mark.parametrize(
    "budget",
    [
        Budget(keep_macs=0.5),
        Budget(keep_macs=0.9),
        Budget(keep_params=0.3),
        Budget(keep_macs=0.6, keep_params=0.35),
        Budget(keep_macs=0.02),
    ],
)
def test_the_wall_always_meets_the_budget(budget: Budget) -> None:
    env, rng = make_env(budget), np.random.default_rng(1)
    for trial in range(40):
        high = [1.0] * 4 if trial == 0 else rng.uniform(0.0, 1.0, 4).tolist()
        mask = play(env, high)
        cost, limits = env.graph.cost(mask), env.graph.limits(budget)[:2]
        assert cost.macs <= limits[0]
        assert cost.params <= limits[1]
        totals = np.array([cost.macs, cost.params])
        more = totals[:, None] + env.graph.cost_model.added_by_each(mask.keep)[:, ~mask.keep]
        assert (more > limits[:, None]).any(axis=0).all()


def test_the_wall_is_where_the_later_groups_keep_their_least() -> None:
    budget = Budget(keep_macs=0.4)
    env = make_env(budget)
    env.reset()
    least = [int(np.ceil(LEAST_SHARE * width)) for width in WIDTHS]

    def cost_ratio(widths: list[int]) -> float:
        keep = np.ones(env.graph.num_units, dtype=bool)
        for group, width in zip(env.groups, widths, strict=True):
            keep[group.units[width:]] = False
        return env.graph.cost_ratio(keep, budget)

    for number in range(len(WIDTHS)):
        wall, before = env.wall(), list(env.widths)
        assert cost_ratio([*before, wall, *least[number + 1 :]]) <= 1.0
        if wall < WIDTHS[number]:
            assert cost_ratio([*before, wall + 1, *least[number + 1 :]]) > 1.0
        env.step(np.array([1.0]))
        assert env.widths[-1] == wall
    assert env.widths[-1] < WIDTHS[-1]  # it was hit


def test_shares_go_as_low_as_the_budget_asks() -> None:
    assert make_env(Budget(keep_macs=0.4)).action_space.low == pytest.approx(LEAST_SHARE)
    env = make_env(Budget(keep_macs=0.03))
    assert env.action_space.low == 0.0
    play(env, [0.0] * len(WIDTHS))
    assert env.widths == [group.min_keep for group in env.groups]


def test_the_agent_s_widths_are_kept_and_the_most_important_stay() -> None:
    env = make_env(Budget(keep_macs=0.5))
    mask = play(env, [0.5, 0.75, 0.5, 1.0])
    widths = list(env.graph.group_widths(mask).values())
    assert env.widths[0] == 5
    assert all(found >= chosen for found, chosen in zip(widths, env.widths, strict=True))
    importance = np.random.default_rng(0).random(env.graph.num_units).astype(np.float32)
    for group in env.groups:
        kept = mask.keep[group.units]
        if not kept.all():
            values = importance[group.units]
            assert values[kept].min() > values[~kept].max()


def test_observations_are_eleven_bounded_features_that_follow_the_episode() -> None:
    env = make_env(Budget(keep_macs=0.5))
    first, _ = env.reset()
    seen = [first, *(env.step(np.array([0.5]))[0] for _ in WIDTHS)]
    assert len(OBSERVATION_NAMES) == 11
    for state in seen:
        assert env.observation_space.contains(state)
    column = {name: [float(state[i]) for state in seen] for i, name in enumerate(OBSERVATION_NAMES)}
    assert column["t"] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    assert column["n"] == pytest.approx([0.4, 1.0, 0.0, 0.6, 0.6])
    assert column["last_action"][:2] == [1.0, 0.5]
    assert column["reduced"] == sorted(column["reduced"])
    assert column["rest"][3:] == [0.0, 0.0]
    again, _ = env.reset()
    np.testing.assert_array_equal(first, again)


def test_noise_is_constant_at_first_and_then_decays() -> None:
    assert [noise(episode, 10) for episode in (0, 10)] == [0.5, 0.5]
    assert noise(30, 10) == pytest.approx(0.5 * 0.95**20)


def test_every_step_gets_the_episode_s_reward_less_the_baseline() -> None:
    env = make_env(Budget(keep_macs=0.5))
    buffer = _EpisodeBuffer(20, env.observation_space, env.action_space, seed=0)
    state, action = np.zeros((1, 11), dtype=np.float32), np.zeros((1, 1), dtype=np.float32)
    for reward in (0.4, 0.9):
        for step in range(3):
            done = step == 2
            final = np.array([reward if done else 0.0])
            buffer.add(state, state, action, final, np.array([done]), [{}])
            assert buffer.size() in ((0, 3) if reward == 0.4 else (3, 6))
    np.testing.assert_allclose(buffer.rewards[:6, 0], [0.0] * 3 + [0.5] * 3, atol=1e-6)
    assert buffer._baseline == pytest.approx(BASELINE_DECAY * 0.4 + (1 - BASELINE_DECAY) * 0.9)


def test_it_learns_widths_and_leaves_others_random_numbers_alone() -> None:
    rewards: list[float] = []

    def evaluate(mask: ChannelMask) -> float:
        widths = np.array(list(env.graph.group_widths(mask).values())) / WIDTHS
        rewards.append(float(1.0 - abs(widths[0] - 0.3) - abs(widths[1] - 0.9)))
        return rewards[-1]

    env = make_env(Budget(keep_macs=0.45), evaluate)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    train_widths(env, num_episodes=240, seed=0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002
    assert len(rewards) == 240
    assert np.mean(rewards[-30:]) > np.mean(rewards[:60]) + 0.1


def test_it_plays_on_until_told_to_stop_and_leaves_no_folder(tmp_path: Path) -> None:
    masks: list[ChannelMask] = []

    def evaluate(mask: ChannelMask) -> float:
        masks.append(mask)
        return 0.5

    env = make_env(Budget(keep_macs=0.5), evaluate)
    played = {"num_episodes": 4, "seed": 0, "most_episodes": 12}
    train_widths(env, **played, goes_on=lambda: len(masks) < 9)
    assert len(masks) == 9
    masks.clear()
    train_widths(env, **played)
    assert len(masks) == 12
    assert not list(tmp_path.iterdir())  # where the fixture ``logs`` sends those of SB3
