import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as check_gymnasium
from stable_baselines3.common.env_checker import check_env as check_sb3

from support.toy_env import (
    TOY_FEATURE_NAMES,
    KnownMaskEvaluator,
    ToyPruningEnv,
    best_budget,
    draw_signs,
    toy_accuracy,
    toy_graphs,
)

GRAPHS = toy_graphs()


def draws(index: int, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Return features and best bits of the free units of many episodes."""
    rng = np.random.default_rng(0)
    pairs = [draw_signs(GRAPHS[index], rng) for _ in range(count)]
    free = GRAPHS[index].free
    return np.stack([x[free] for x, _ in pairs]), np.stack([best[free] for _, best in pairs])


def test_passes_gymnasiums_checker() -> None:
    spec_free = ToyPruningEnv()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*not have a spec.*")  # it is not registered
        check_gymnasium(spec_free, skip_render_check=True)
    assert isinstance(spec_free.observation_space, gymnasium.spaces.Dict)


def test_passes_stable_baselines3s_checker() -> None:
    env = ToyPruningEnv()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_sb3(env, warn=True)
    assert env.networks_evaluated > 0


@pytest.mark.parametrize("index", range(3))
def test_no_single_feature_reveals_the_best_mask(index: int) -> None:
    features, best = draws(index)
    signs = np.where(best, 1.0, -1.0)[..., None]
    correlation = (features * signs).mean(axis=(0, 1))
    assert np.abs(correlation).max() < 0.05, dict(zip(TOY_FEATURE_NAMES, correlation, strict=True))


@pytest.mark.parametrize("index", range(3))
def test_node_features_reveal_about_half_of_it(index: int) -> None:
    features, best = draws(index)
    by_node = np.sign(features[..., 0] * features[..., 1]) * np.where(best, 1.0, -1.0)
    assert set(by_node.ravel()) == {0.0, 1.0}  # right where something is shown
    assert 0.3 < by_node.mean() < 0.7


@pytest.mark.parametrize("index", range(3))
def test_consumers_reveal_the_other_half(index: int) -> None:
    graph = GRAPHS[index]
    features, best = draw_signs(graph, np.random.default_rng(3))
    for position, group in enumerate(graph.groups):
        if group.frozen is None and (features[group.units, 1] == 0).all():
            (sign,) = set(features[graph.groups[position + 1].units, 2])
            right = features[group.units, 0] * sign > 0
            assert np.array_equal(right, best[group.units])


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_best_mask_fits_the_budget_exactly(graph) -> None:
    features, best = draw_signs(graph, np.random.default_rng(0))
    mask = graph.project(best.astype(np.float32), best_budget(graph))
    assert np.array_equal(mask.keep, best)
    assert toy_accuracy(graph, best, mask.keep) == 1.0
    assert toy_accuracy(graph, best, ~best | graph.frozen) == 0.0
    assert features.shape == (graph.num_units, len(TOY_FEATURE_NAMES))


def test_random_masks_are_right_by_half() -> None:
    env = ToyPruningEnv(seed=1)
    accuracies = []
    for _ in range(300):
        env.reset()
        accuracies.append(env.step(env.action_space.sample())[1])
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.03)


def test_signs_repeat_and_then_change() -> None:
    env = ToyPruningEnv(repeat=3)
    episodes = [env.reset()[0]["node_features"].tobytes() for _ in range(6)]
    assert len(set(episodes[:3])) == len(set(episodes[3:])) == 1
    assert episodes[0] != episodes[3]


def test_workers_share_the_episodes_of_one() -> None:
    alone = ToyPruningEnv(seed=5)
    expected = [alone.reset()[0]["node_features"] for _ in range(6)]
    pair = [ToyPruningEnv(seed=5, first_episode=i, episode_stride=2) for i in range(2)]
    found = [pair[k % 2].reset()[0]["node_features"] for k in range(6)]
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    alone.seek(2)
    assert np.array_equal(alone.reset()[0]["node_features"], expected[2])


def test_a_seed_starts_over() -> None:
    env = ToyPruningEnv()
    first = env.reset(seed=3)[0]["node_features"]
    env.reset()
    assert np.array_equal(env.reset(seed=3)[0]["node_features"], first)
    assert not np.array_equal(env.reset(seed=4)[0]["node_features"], first)


def test_the_result_tells_what_was_raw_and_what_was_repaired() -> None:
    env = ToyPruningEnv()
    env.reset()
    _, reward, _, _, info = env.step(np.ones(env.size))
    assert info["result"].raw_cost_ratio > 2.0
    assert info["result"].cost_ratio <= 1.0
    assert info["result"].accuracy == reward
    assert info["repaired"] == pytest.approx(0.5, abs=0.2)


def test_known_mask_evaluator_knows() -> None:
    graph = GRAPHS[0]
    _, best = draw_signs(graph, np.random.default_rng(0))
    evaluator = KnownMaskEvaluator(graph, best)
    subsets = [evaluator.draw_subset(50, seed) for seed in (0, 0, 1)]
    outcomes = [evaluator.evaluate(graph.mask(best), subset) for subset in (None, *subsets)]
    assert outcomes[0].accuracy == 1.0
    assert outcomes[1].accuracy == outcomes[2].accuracy != outcomes[3].accuracy
    assert torch.equal(subsets[0], subsets[1])
    assert evaluator.num_networks == 4
