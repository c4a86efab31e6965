"""Options of the environment, and the order of networks, budgets and image subsets they fix."""

from dataclasses import dataclass
from typing import get_args

import numpy as np

from prunegraph.core.budget import Budget
from prunegraph.core.checks import check_choice, check_fields
from prunegraph.core.errors import ConfigError
from prunegraph.rewards.config import Metric

_TASK_ORDER, _EPISODE, _SUBSET = range(3)  # streams of random numbers that must not coincide


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Options of ``ChannelPruningEnv``.

    All randomness of an episode follows from (seed, number of the episode), so n workers, worker i
    with ``first_episode=i, episode_stride=n`` and the same ``seed``, play the episodes of a single
    one.

    Attributes:
        metric: what a mask is rewarded by; see ``RewardConfig``.
        per_group: one step a group in topological order, instead of one for the whole network.
        subset_size: search images that a mask is scored on; None = all.
        episodes_per_subset: episodes scored on one image subset: a block.
        episodes_per_pair: episodes in a row with the same network and budget, where there are
            several.
        budgets: the grid that budgets come from; None = each task's own.
        seed: seed before the first ``reset(seed=...)``.
        first_episode: number of the first episode.
        episode_stride: distance between the numbers of two episodes.
    """

    metric: Metric = "accuracy"
    per_group: bool = False
    subset_size: int | None = 1500
    episodes_per_subset: int = 16
    episodes_per_pair: int = 4
    budgets: tuple[Budget, ...] | None = None
    seed: int = 0
    first_episode: int = 0
    episode_stride: int = 1

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, get_args(Metric))
        check_fields(self, subset_size=1, episodes_per_subset=1, episodes_per_pair=1)
        check_fields(self, episode_stride=1, seed=0, first_episode=0)
        if self.budgets is not None and len(set(self.budgets)) != max(len(self.budgets), 1):
            msg = f"budgets={self.budgets} must hold at least one budget, each once"
            raise ConfigError(msg)

    def block_of(self, episode: int) -> int:
        """Return the number of the image subset that an episode is scored on."""
        return episode // self.episodes_per_subset


def pair_of_episode(seed: int, episode: int, num_pairs: int, episodes_per_pair: int) -> int:
    """Return which (network, budget) pair an episode is played on: all in turn, in random order."""
    turn, position = divmod(episode // episodes_per_pair, num_pairs)
    order = np.random.default_rng([seed, turn, _TASK_ORDER]).permutation(num_pairs)
    return int(order[position])


def episode_generator(seed: int, episode: int) -> np.random.Generator:
    """Return the generator of an episode's random flips."""
    return np.random.default_rng([seed, episode, _EPISODE])


def subset_seed(seed: int, block: int) -> int:
    """Return the seed of a block's image subset."""
    return int(np.random.default_rng([seed, block, _SUBSET]).integers(2**62))
