from collections import Counter
from typing import Any

import pytest

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from prunegraph.env import EnvConfig
from prunegraph.env.config import episode_generator, pair_of_episode, subset_seed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subset_size": 0}, "subset_size=0"),
        ({"episodes_per_subset": 0}, "episodes_per_subset=0"),
        ({"episode_stride": 0}, "episode_stride=0"),
        ({"seed": -1}, "seed=-1"),
        ({"budgets": ()}, "at least one budget"),
        ({"budgets": (Budget(keep_macs=0.5), Budget(keep_macs=0.5))}, "each once"),
        ({"metric": "loss"}, "accuracy, soft_accuracy, kl"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EnvConfig(**options)


def test_cells_are_played_in_turn_in_random_order() -> None:
    pairs = [pair_of_episode(3, episode, 5, 4) for episode in range(200)]
    assert Counter(pairs) == dict.fromkeys(range(5), 40)
    runs = pairs[::4]
    assert pairs == [pair for pair in runs for _ in range(4)]
    turns = {tuple(runs[first : first + 5]) for first in range(0, 50, 5)}
    assert all(sorted(turn) == list(range(5)) for turn in turns)
    assert len(turns) > 5


def test_random_streams_differ_by_seed_and_number() -> None:
    draws = {episode_generator(seed, number).random() for seed in (0, 1) for number in (0, 1)}
    seeds = {subset_seed(seed, number) for seed in (0, 1) for number in (0, 1)}
    assert len(draws) == len(seeds) == 4
    assert subset_seed(1, 1) == subset_seed(1, 1)


def test_blocks_follow_the_episode_number() -> None:
    config = EnvConfig(episodes_per_subset=16)
    assert [config.block_of(episode) for episode in (0, 15, 16, 47)] == [0, 0, 1, 2]
