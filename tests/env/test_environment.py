"""The environment's contract: observations, actions, episodes, what a reward is made of."""

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError, ConfigError
from prunegraph.core.masks import unpack_bits
from prunegraph.env import CONTEXT_NAMES, ENV_ID, ChannelPruningEnv, EnvConfig, PruningTask

MakeTask = Callable[..., PruningTask]


def column(observation: dict[str, Any], name: str) -> float:
    return float(observation["context"][CONTEXT_NAMES.index(name)])


def play(env: ChannelPruningEnv, num_episodes: int, *, seed: int | None = 0) -> list[Any]:
    """Play with random bits; return everything that came back."""
    rng = np.random.default_rng(5)
    record: list[Any] = []
    for number in range(num_episodes):
        record.append(env.reset(seed=seed if number == 0 else None))
        done = False
        while not done:
            action = rng.integers(0, 2, env.num_nodes).astype(np.int8)
            step = env.step(action)
            record.append(step)
            done = step[2]
    return record


def assert_equal(first: Any, second: Any) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    elif isinstance(first, np.ndarray):
        np.testing.assert_array_equal(first, second)
    else:
        assert first == second


@pytest.mark.parametrize("options", [{}, {"per_group": True}])
def test_checkers_pass(make_task: MakeTask, options: dict[str, Any]) -> None:
    config = EnvConfig(subset_size=20, **options)
    tasks = (make_task("small"), make_task("large"))
    env = gymnasium.make(ENV_ID, tasks=tasks, config=config).unwrapped
    check_env(env)
    check_env_sb3(env)
    assert isinstance(env, ChannelPruningEnv)
    assert env.networks_evaluated > 0


def test_a_broken_environment_fails_the_checker(make_task: MakeTask) -> None:
    class Leaking(ChannelPruningEnv):
        def _observation(self) -> dict[str, Any]:
            observation = super()._observation()
            observation["context"] = np.full_like(observation["context"], 7.0)
            return observation

    with pytest.raises(AssertionError):
        check_env(Leaking(make_task(), EnvConfig()), skip_render_check=True)


@pytest.mark.parametrize("per_group", [False, True])
def test_equal_seeds_give_equal_rollouts(make_task: MakeTask, per_group: bool) -> None:
    config = EnvConfig(
        per_group=per_group,
        episodes_per_subset=4,
        episodes_per_pair=2,
        subset_size=20,
        budgets=(Budget(keep_macs=0.4), Budget(keep_macs=0.6)),
    )
    records = [
        play(ChannelPruningEnv((make_task("small"), make_task("large")), config), 20, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert_equal(records[0], records[1])
    digests = [[s[4].get("mask_digest") for s in r if len(s) == 5] for r in records]
    assert digests[0] != digests[2]


def test_a_seeded_reset_starts_all_over(make_task: MakeTask) -> None:
    env = ChannelPruningEnv(make_task(), EnvConfig(subset_size=20, episodes_per_subset=2))
    assert_equal(play(env, 6, seed=1), play(env, 6, seed=1))


def test_observations_share_no_memory(make_task: MakeTask) -> None:
    env = ChannelPruningEnv(make_task(), EnvConfig(per_group=True))
    observations = [item[0] for item in play(env, 3)]
    for first, second in pairwise(observations):
        for key in first:
            assert not np.shares_memory(first[key], second[key])
    assert not np.shares_memory(observations[0]["node_features"], env.pairs[0].features)


def test_an_episode_begins_as_the_first_did(make_task: MakeTask) -> None:
    env = ChannelPruningEnv(make_task(), EnvConfig(episodes_per_subset=1, per_group=True))
    starts = [item[0] for item in play(env, 5) if len(item) == 2]
    for observation in starts[1:]:
        assert_equal(observation, starts[0])
    assert column(starts[0], "cost_so_far") == 1.0
    assert column(starts[0], "step_share") == 0.0


def test_observation_of_a_smaller_network_is_padded(make_task: MakeTask) -> None:
    tasks = (make_task("small"), make_task("large"))
    env = ChannelPruningEnv(tasks, EnvConfig(episodes_per_pair=1))
    seen = set()
    for _ in range(4):
        observation, info = env.reset()
        task = tasks[info["graph_id"]]
        size = task.graph.num_units
        seen.add(info["graph_id"])
        assert observation["graph_id"] == [info["graph_id"]]
        assert observation["node_mask"].sum() == size
        assert observation["node_mask"][:size].all()
        features = observation["node_features"].reshape(env.num_nodes, -1)
        np.testing.assert_array_equal(features[:size], task.node_features)  # type: ignore[arg-type]
        assert not features[size:].any()
        np.testing.assert_array_equal(observation["action_mask"][:size], task.graph.free)
        assert not observation["action_mask"][size:].any()
        env.step(np.ones(env.num_nodes, dtype=np.int8))
    assert seen == {0, 1}


def test_bits_outside_the_action_mask_are_ignored(make_task: MakeTask) -> None:
    results = []
    for outside in (0, 1):
        env = ChannelPruningEnv((make_task("small"), make_task("large")))
        observation, info = env.reset(seed=0)
        while info["pair"] != "small@keep_macs=0.5":
            env.step(np.ones(env.num_nodes, dtype=np.int8))
            observation, info = env.reset()
        action = np.random.default_rng(1).integers(0, 2, env.num_nodes)
        action[observation["action_mask"] == 0] = outside
        results.append(env.step(action)[4])
    assert_equal(results[0], results[1])
    assert (observation["action_mask"] == 0).sum() > env.pairs[0].task.graph.frozen.sum() > 0


def test_the_evaluated_mask_is_the_reported_one(make_task: MakeTask) -> None:
    task = make_task()
    env = ChannelPruningEnv(task, EnvConfig(subset_size=20))
    env.reset(seed=0)
    info = env.step(np.ones(env.num_nodes, dtype=np.int8))[4]
    keep = unpack_bits(info["mask_bits"], task.graph.num_units)
    mask = task.graph.mask(keep)
    assert mask.digest() == info["mask_digest"] == info["outcome"].digest
    assert task.evaluator.calls[-1][0] == mask.digest()  # type: ignore[attr-defined]
    assert info["outcome"].cost == task.graph.cost(mask)
    assert info["cost_ratio"] == task.graph.cost(mask).macs / (0.5 * task.graph.dense_cost.macs)
    assert info["cost_ratio"] <= 1.0
    assert info["raw_cost"] == task.graph.dense_cost
    assert info["raw_cost_ratio"] == pytest.approx(2.0)
    assert info["overshoot"] == pytest.approx(0.95)
    assert info["budget"] == {"keep_macs": 0.5}


def test_group_by_group_ends_as_in_one_step(make_task: MakeTask) -> None:
    action = np.random.default_rng(2).integers(0, 2, 50)
    infos = []
    for per_group in (False, True):
        task = make_task("large")
        env = ChannelPruningEnv(task, EnvConfig(per_group=per_group))
        env.reset(seed=8)
        done, rewards = False, []
        while not done:
            _, reward, done, _, info = env.step(action[: env.num_nodes])
            rewards.append(reward)
        infos.append((info, rewards[-1], rewards[:-1]))
    assert_equal(infos[0][0], infos[1][0])
    assert infos[0][1] == infos[1][1]
    assert (infos[0][2], infos[1][2]) == ([], [0.0, 0.0])


def test_steps_open_the_groups_in_order(make_task: MakeTask) -> None:
    task = make_task("large")
    env = ChannelPruningEnv(task, EnvConfig(per_group=True))
    observation, _ = env.reset(seed=0)
    opened, costs, shares = [], [], []
    done = False
    while not done:
        classes = np.flatnonzero(observation["action_mask"])
        opened.append(np.unique(task.graph.group_of[classes]).tolist())
        costs.append(column(observation, "cost_so_far"))
        shares.append(column(observation, "step_share"))
        action = np.zeros(env.num_nodes, dtype=np.int8)
        action[classes[::2]] = 1
        observation, _, done, _, _ = env.step(action)
    free_groups = np.unique(task.graph.group_of[task.graph.free]).tolist()
    assert opened == [[group] for group in free_groups]
    assert costs[0] == 1.0
    assert costs[0] > costs[1] > costs[2]
    assert shares == pytest.approx([0.0, 1 / 3, 2 / 3])
    half_of_first = np.ones(task.graph.num_units, dtype=bool)
    half_of_first[np.flatnonzero(task.graph.group_of == free_groups[0])[1::2]] = False
    dense = task.graph.dense_cost.macs
    assert costs[1] == pytest.approx(task.graph.cost(half_of_first).macs / dense)


def test_workers_play_the_episodes_of_one(make_task: MakeTask) -> None:
    options: dict[str, Any] = {
        "subset_size": 20,
        "episodes_per_subset": 4,
        "episodes_per_pair": 1,
        "seed": 7,
    }

    def episodes(env: ChannelPruningEnv, numbers: range) -> dict[int, Any]:
        played = {}
        for number in numbers:
            observation, info = env.reset()
            assert info["episode_number"] == number
            action = np.random.default_rng(number).integers(0, 2, env.num_nodes)
            played[number] = (observation, env.step(action))
        return played

    def tasks() -> tuple[PruningTask, ...]:
        return (make_task("small"), make_task("large"))

    alone = episodes(ChannelPruningEnv(tasks(), EnvConfig(**options)), range(12))
    shared: dict[int, Any] = {}
    for worker in range(2):
        config = EnvConfig(first_episode=worker, episode_stride=2, **options)
        shared |= episodes(ChannelPruningEnv(tasks(), config), range(worker, 12, 2))
    assert_equal([alone[k] for k in range(12)], [shared[k] for k in range(12)])
    resumed = ChannelPruningEnv(tasks(), EnvConfig(**options))
    resumed.seek(9)
    assert_equal(episodes(resumed, range(9, 12)), {k: alone[k] for k in range(9, 12)})


def test_the_images_of_a_block_are_the_same(make_task: MakeTask) -> None:
    task = make_task()
    env = ChannelPruningEnv(task, EnvConfig(subset_size=20, episodes_per_subset=4))
    play(env, 12)
    assert env.networks_evaluated == 12
    images = [images for _, images in task.evaluator.calls]  # type: ignore[attr-defined]
    assert len(set(images)) == 3
    assert images == sorted(images, key=images.index)


def test_a_mask_is_measured_as_if_it_had_been_played(make_task: MakeTask) -> None:
    env = ChannelPruningEnv(make_task(), EnvConfig(subset_size=20, episodes_per_subset=4))
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.ones(env.num_nodes, dtype=np.int8))
    again = env.measure(info["pair"], info["mask_bits"], 0)
    assert (again.accuracy, again.bits) == (reward, info["mask_bits"])
    other = env.measure(info["pair"], info["mask_bits"], 1)
    assert other.accuracy != reward and other.bits == again.bits


def test_two_budgets_count_the_tightest(make_task: MakeTask) -> None:
    budget = Budget(keep_macs=0.9, keep_params=0.3)
    env = ChannelPruningEnv(make_task(), EnvConfig(budgets=(budget,)))
    observation, info = env.reset(seed=0)
    assert column(observation, "keep_macs") == pytest.approx(0.9)
    assert column(observation, "keep_params") == pytest.approx(0.3)
    assert info["pair"] == "small@keep_macs=0.9,keep_params=0.3"
    info = env.step(np.ones(env.num_nodes, dtype=np.int8))[4]
    assert info["raw_cost_ratio"] == pytest.approx(1 / 0.3)
    assert info["cost_ratio"] <= 1.0


def test_a_step_after_the_end_asks_for_a_reset(make_task: MakeTask) -> None:
    env = ChannelPruningEnv(make_task())
    action = np.ones(env.num_nodes, dtype=np.int8)
    with pytest.raises(ResetNeeded):
        env.step(action)
    env.reset()
    env.step(action)
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(action)


def test_bad_input_says_what_is_wrong(make_task: MakeTask) -> None:
    task = make_task()
    env = ChannelPruningEnv(task)
    env.reset()
    with pytest.raises(ConfigError, match=r"shape \(3,\)"):
        env.step(np.ones(3, dtype=np.int8))
    with pytest.raises(ConfigError, match="there are none"):
        env.reset(options={"budget": 0.5})
    with pytest.raises(ConfigError, match="each another name"):
        ChannelPruningEnv((task, task))
    with pytest.raises(BudgetError, match="the least that can"):
        ChannelPruningEnv(make_task(keep_macs=0.001))
    with pytest.raises(BudgetError, match="max_latency is met by measuring"):
        ChannelPruningEnv(dataclasses.replace(task, budget=Budget(max_latency=1.0)))
    with pytest.raises(BudgetError, match=r"max_memory=1000000, which the whole network meets: it"):
        ChannelPruningEnv(dataclasses.replace(task, budget=Budget(max_memory=10**6)))
    alike = (Budget(keep_macs=0.5), Budget(keep_macs=0.50000001))
    with pytest.raises(ConfigError, match="less than ledgers tell apart"):
        ChannelPruningEnv(task, EnvConfig(budgets=alike))
