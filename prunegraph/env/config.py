"""Options of the environment, and the order of networks, budgets and image subsets they fix."""

from dataclasses import dataclass, field

import numpy as np

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from prunegraph.rewards import RewardConfig

_TASK_ORDER, _EPISODE, _SUBSET = range(3)  # streams of random numbers that must not coincide


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Options of ``ChannelPruningEnv``.

    All randomness of an episode follows from (seed, number of the episode), so n workers, worker i
    with ``first_episode=i, episode_stride=n`` and the same ``seed``, play the episodes of a single
    one.

    Attributes:
        reward: what a pruned network competes with; see ``RewardConfig``.
        repair: flip raw bits in random order until they meet the budget; False = evaluate them
            whatever they cost (the literal CMDP). The form ``"wall"`` has its own way.
        per_group: one step a group in topological order, instead of one for the whole network.
        refinements: further steps of an episode. Each decides on the whole network again, sees the
            mask of the step before and what it reached, in the last two node features
            (``graph.features.LAST_NAMES``), and runs a network of its own.
        subset_size: search images that a mask is scored on; None = all.
        episodes_per_subset: episodes scored on one image subset and against one ledger: a block.
        episodes_per_cell: episodes in a row with the same network and budget, where there are
            several.
        budgets: the grid that budgets come from; None = each task's own.
        external_reward: leave reward, ledger and their context columns (0) to whoever steps the
            environments.
        seed: seed before the first ``reset(seed=...)``.
        first_episode: number of the first episode.
        episode_stride: distance between the numbers of two episodes.
    """

    reward: RewardConfig = field(default_factory=RewardConfig)
    repair: bool = True
    per_group: bool = False
    refinements: int = 0
    subset_size: int | None = 1500
    episodes_per_subset: int = 16
    episodes_per_cell: int = 4
    budgets: tuple[Budget, ...] | None = None
    external_reward: bool = False
    seed: int = 0
    first_episode: int = 0
    episode_stride: int = 1

    def __post_init__(self) -> None:
        for name in ("subset_size", "episodes_per_subset", "episodes_per_cell", "episode_stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                msg = f"{name}={value} must be at least 1"
                raise ConfigError(msg)
        whole = self.refinements >= 0 and float(self.refinements).is_integer()
        if not whole or (self.refinements and self.per_group):
            msg = (
                f"refinements={self.refinements} must be a whole number from 0 on, and be 0 where "
                "episodes go group by group"
            )
            raise ConfigError(msg)
        if min(self.seed, self.first_episode) < 0:
            msg = f"seed={self.seed} and first_episode={self.first_episode} must not be negative"
            raise ConfigError(msg)
        if self.budgets is not None and len(set(self.budgets)) != max(len(self.budgets), 1):
            msg = f"budgets={self.budgets} must hold at least one budget, each once"
            raise ConfigError(msg)
        if self.reward.self_competition == "wall" and not self.repair:
            msg = "self_competition='wall' limits the actions itself: repair=False contradicts it"
            raise ConfigError(msg)

    def block_of(self, episode: int) -> int:
        """Return the number of the image subset that an episode is scored on."""
        return episode // self.episodes_per_subset


def cell_of_episode(seed: int, episode: int, num_cells: int, episodes_per_cell: int) -> int:
    """Return which (network, budget) pair an episode is played on: all in turn, in random order."""
    turn, position = divmod(episode // episodes_per_cell, num_cells)
    order = np.random.default_rng([seed, turn, _TASK_ORDER]).permutation(num_cells)
    return int(order[position])


def episode_generator(seed: int, episode: int) -> np.random.Generator:
    """Return the generator of an episode's random flips."""
    return np.random.default_rng([seed, episode, _EPISODE])


def subset_seed(seed: int, block: int) -> int:
    """Return the seed of a block's image subset."""
    return int(np.random.default_rng([seed, block, _SUBSET]).integers(2**62))
