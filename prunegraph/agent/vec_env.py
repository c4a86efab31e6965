"""Self-competition in the main process: parallel environments report figures, not rewards."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from prunegraph.core.masks import BoolArray, FloatArray
from prunegraph.graph.features import FEATURE_BOUND
from prunegraph.rewards import (
    COMPETITION_CONTEXT_NAMES,
    Episode,
    RewardConfig,
    SelfCompetition,
    pack_bits,
)

VecObservation = dict[str, np.ndarray[Any, Any]]
GreedyMask = Callable[[Mapping[str, FloatArray], Budget], BoolArray]


class SelfCompetitionVecEnv(VecEnvWrapper):
    """Turns the figures of finished episodes into rewards, whichever worker played them.

    Ledgers and multipliers of all (network, budget) pairs live here. The first bar of ``"best"`` is
    the untrained policy's own mask. The wrapped environments are
    built with ``external_reward=True``, environment i with ``first_episode=i`` and
    ``episode_stride=num_envs``, and a block of as many episodes as an update. ``start_block``
    begins an update: episode numbers, and so all randomness of the environments, follow from its
    number.

    Args:
        venv: the environments.
        config: the reward.
        episodes_per_update: episodes of an update, all environments together.

    Attributes:
        competition: ledgers and multipliers.
        num_networks: pruned networks that the environments ran, also before a checkpoint.
        records: figures of the current update's episodes.
        greedy_masks: packed greedy mask of each cell of the current update.
        greedy: makes the policy's own mask from one observation and a budget; set by the trainer.
    """

    def __init__(self, venv: VecEnv, config: RewardConfig, *, episodes_per_update: int) -> None:
        super().__init__(venv)
        if episodes_per_update % venv.num_envs:
            msg = (
                f"{episodes_per_update} episodes an update cannot be shared by {venv.num_envs} "
                "environments: choose a number of workers that divides it"
            )
            raise ConfigError(msg)
        self.competition = SelfCompetition(config)
        self.episodes_per_update = episodes_per_update
        self.records: list[dict[str, float]] = []
        self.greedy_masks: dict[str, str] = {}
        self.greedy: GreedyMask | None = None
        self._networks_before = 0

    @property
    def cells_per_update(self) -> int:
        """(Network, budget) pairs whose episodes an update holds, at the most."""
        if not (self.venv.has_attr("cells") and self.venv.has_attr("config")):
            return 1
        cells, config = (self.venv.get_attr(name, [0])[0] for name in ("cells", "config"))
        episodes, turn = self.episodes_per_update, config.episodes_per_cell
        turns = episodes // turn if episodes % turn == 0 else math.ceil((episodes - 1) / turn) + 1
        return int(min(len(cells), turns, episodes))

    @property
    def networks_per_episode(self) -> int:
        """Pruned networks that an episode runs."""
        if not self.venv.has_attr("config"):
            return 1
        return 1 + int(self.venv.get_attr("config", [0])[0].refinements)

    @property
    def num_networks(self) -> int:
        """Pruned networks run so far."""
        return self._networks_before + int(sum(self.venv.get_attr("networks_evaluated")))

    def resume(self, competition: Mapping[str, Any], num_networks: int) -> None:
        """Go on from a checkpoint."""
        self.competition.load_state_dict(dict(competition))
        self._networks_before = num_networks - int(sum(self.venv.get_attr("networks_evaluated")))

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Leave the environments' seeds as they are built: PPO would give each worker another."""
        return [None] * self.num_envs

    def reset(self) -> VecObservation:
        """Begin the current block's episodes; measures nothing, ``start_block`` does."""
        return self._seek(self.competition.block)

    def start_block(self, block: int) -> VecObservation:
        """Begin update ``block`` and return the first observations."""
        self.competition.begin_block(block)
        self.records = []
        self.greedy_masks = {}
        return self._with_competition(self._seek(block))

    def _seek(self, block: int) -> VecObservation:
        first = block * self.episodes_per_update
        for worker in range(self.num_envs):
            self.venv.env_method("seek", first + worker, indices=[worker])
        observation = self.venv.reset()
        assert isinstance(observation, dict)
        return observation

    def step_wait(self) -> VecEnvStepReturn:
        """Return the last step of all environments with rewards and contexts filled in."""
        observation, rewards, dones, infos = self.venv.step_wait()
        finished = [worker for worker, info in enumerate(infos) if "result" in info]
        for worker in finished:
            self._check_block(infos[worker]["block"])
        results: list[Episode] = [infos[worker]["result"] for worker in finished]
        for worker, reward in zip(finished, self.competition.score(results), strict=True):
            rewards[worker] = reward.value
            infos[worker]["reward_terms"] = dict(reward.terms)
            self._record(infos[worker], reward.value)
        assert isinstance(observation, dict)
        return self._with_competition(observation), rewards, dones, infos

    def _check_block(self, block: int) -> None:
        if block != self.competition.block:
            msg = (
                f"an episode of block {block} ended in update {self.competition.block}: build the "
                f"environments with episodes_per_subset={self.episodes_per_update} and "
                f"episode_stride={self.num_envs}"
            )
            raise ConfigError(msg)

    def _record(self, info: Mapping[str, Any], reward: float) -> None:
        result: Episode = info["result"]
        terms = info["reward_terms"]
        names = ("metric", "bar", "overshoot", "multiplier")
        self.records.append(
            {
                "reward": reward,
                "accuracy": result.accuracy,
                "repaired": float(info["repaired"]),
                "cost_ratio": result.cost_ratio,
                "raw_cost_ratio": result.raw_cost_ratio,
                **{name: float(terms[name]) for name in names},
            }
        )

    def _with_competition(self, observation: VecObservation) -> VecObservation:
        """Fill the context's last columns of the environments that are in the current block."""
        columns = slice(-len(COMPETITION_CONTEXT_NAMES), None)
        for worker, info in enumerate(self.venv.reset_infos):
            if info["block"] == self.competition.block:
                row = {name: array[worker] for name, array in observation.items()}
                self._prepare(info["cell"], Budget(**info["budget"]), row)
                values = np.array(self.competition.context(info["cell"]))
                bounded = np.clip(values, -FEATURE_BOUND, FEATURE_BOUND)
                observation["context"][worker, columns] = bounded
        return observation

    def _prepare(self, cell: str, budget: Budget, row: Mapping[str, FloatArray]) -> None:
        """Measure what a cell's episodes compete with on this update's images, once."""
        if cell in self.greedy_masks:
            return
        mask = None if self.greedy is None else self.greedy(row, budget)
        self.greedy_masks[cell] = "" if mask is None else pack_bits(mask)
        competition = self.competition
        form, first = competition.config.self_competition, cell not in competition.ledgers
        bits = competition.mask_to_measure(cell)
        if form == "greedy" or (form == "best" and first):
            bits = self.greedy_masks[cell]
        if not bits:
            return
        measured = self.venv.env_method("measure", cell, bits, competition.block, indices=[0])[0]
        if form == "best" and first:  # else the first update would beat an empty ledger
            ledger = competition.ledger(cell)
            competition.ledgers[cell] = ledger.update(measured, competition.config)
        competition.set_reference(cell, measured)
