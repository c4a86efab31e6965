"""Self-competition in the main process: parallel environments report figures, not rewards."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from prunegraph.core.masks import BoolArray, FloatArray, pack_bits
from prunegraph.rewards import Episode, RewardConfig, SelfCompetition

VecObservation = dict[str, np.ndarray[Any, Any]]
GreedyMask = Callable[[Mapping[str, FloatArray], Budget], BoolArray]


class SelfCompetitionVecEnv(VecEnvWrapper):
    """Turns the figures of finished episodes into rewards, whichever worker played them.

    Ledgers and multipliers of all (network, budget) pairs live here. The first bar of ``"best"`` is
    the untrained policy's own mask. Environment i is built with ``first_episode=i``,
    ``episode_stride=num_envs`` and a block of as many episodes as an update. ``start_block`` begins
    an update: episode numbers, and so all randomness of the environments, follow from its number.

    Args:
        venv: the environments.
        config: the reward.
        episodes_per_update: episodes of an update, all environments together.

    Attributes:
        competition: ledgers and multipliers.
        num_networks: pruned networks that the environments ran, those of ``networks_before`` an
            interruption included.
        records: figures of the current update's episodes.
        greedy_masks: packed greedy mask of each pair of the current update.
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
        self.networks_before = 0
        self.episodes_per_update = episodes_per_update
        self.records: list[dict[str, float]] = []
        self.greedy_masks: dict[str, str] = {}
        self.greedy: GreedyMask | None = None

    @property
    def cells_per_update(self) -> int:
        """(Network, budget) pairs whose episodes an update holds, at the most."""
        if not (self.venv.has_attr("pairs") and self.venv.has_attr("config")):
            return 1
        pairs, config = (self.venv.get_attr(name, [0])[0] for name in ("pairs", "config"))
        episodes, turn = self.episodes_per_update, config.episodes_per_pair
        turns = episodes // turn if episodes % turn == 0 else math.ceil((episodes - 1) / turn) + 1
        return int(min(len(pairs), turns, episodes))

    @property
    def num_networks(self) -> int:
        """Pruned networks run so far."""
        return self.networks_before + int(sum(self.venv.get_attr("networks_evaluated")))

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
        observation = self._seek(block)
        self._prepare(observation)
        return observation

    def _seek(self, block: int) -> VecObservation:
        first = block * self.episodes_per_update
        for worker in range(self.num_envs):
            self.venv.env_method("seek", first + worker, indices=[worker])
        observation = self.venv.reset()
        assert isinstance(observation, dict)
        return observation

    def step_wait(self) -> VecEnvStepReturn:
        """Return the last step of all environments with rewards filled in."""
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
        self._prepare(observation)
        return observation, rewards, dones, infos

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

    def _prepare(self, observation: VecObservation) -> None:
        """Measure, once an update, what the episodes that begin in it compete with."""
        for worker, info in enumerate(self.venv.reset_infos):
            if info["block"] == self.competition.block and info["pair"] not in self.greedy_masks:
                row = {name: array[worker] for name, array in observation.items()}
                self._measure_bar(info["pair"], Budget(**info["budget"]), row)

    def _measure_bar(self, pair: str, budget: Budget, row: Mapping[str, FloatArray]) -> None:
        """Measure what a pair's episodes compete with on this update's images."""
        mask = None if self.greedy is None else self.greedy(row, budget)
        self.greedy_masks[pair] = "" if mask is None else pack_bits(mask)
        competition = self.competition
        bits = competition.mask_to_measure(pair)
        if competition.config.self_competition == "best" and pair not in competition.ledgers:
            bits = self.greedy_masks[pair]  # else the first update would beat an empty ledger
        if bits:
            block = competition.block
            measured = self.venv.env_method("measure", pair, bits, block, indices=[0])[0]
            competition.set_bar(pair, measured)


class ThreadedVecEnv(DummyVecEnv):
    """Steps all its environments at once, each in a thread.

    Threads share Python's lock: what is gained is the time in which an environment waits for its
    network to be evaluated by another process or machine.

    Args:
        env_factories: one an environment.
    """

    def __init__(self, env_factories: Sequence[Callable[[], gymnasium.Env[Any, Any]]]) -> None:
        self._threads = ThreadPoolExecutor(len(env_factories), thread_name_prefix="environment")
        super().__init__([partial(_StepAhead, make, self._threads) for make in env_factories])

    def step_async(self, actions: np.ndarray[Any, Any]) -> None:
        """Begin a step of every environment."""
        super().step_async(actions)
        for env, action in zip(self.envs, actions, strict=True):
            assert isinstance(env, _StepAhead)
            env.begin(action)

    def close(self) -> None:
        """End; steps that have not begun never do."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        super().close()


class _StepAhead(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose step begins before its result is asked for."""

    def __init__(
        self, make: Callable[[], gymnasium.Env[Any, Any]], threads: ThreadPoolExecutor
    ) -> None:
        super().__init__(make())
        self._threads = threads
        self._result: Future[tuple[Any, Any, bool, bool, dict[str, Any]]]

    def begin(self, action: Any) -> None:
        """Begin a step."""
        self._result = self._threads.submit(self.env.step, action)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Return the result of the step that was begun."""
        return self._result.result()
