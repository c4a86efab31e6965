"""AMC's agent: stable-baselines3's DDPG with truncated-normal exploration."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import truncnorm
from stable_baselines3 import DDPG
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch.optim import Optimizer

from prunegraph.core.seeding import seeded
from prunegraph.methods.amc.env import WidthEnv

WARM_UP_SHARE = 0.25
"""Episodes of constant noise and no updates: 100 of the paper's 400."""

NOISE, NOISE_DECAY = 0.5, 0.95
"""Deviation of the shares at first, in units of their range, and its decay an episode after."""

ACTOR_RATE, CRITIC_RATE = 1e-4, 1e-3
HIDDEN = (300, 300)
BATCH_SIZE = 64
EPISODES_KEPT = 100
BASELINE_DECAY = 0.95


def train_widths(
    env: WidthEnv,
    *,
    num_episodes: int,
    seed: int,
    most_episodes: int | None = None,
    goes_on: Callable[[], bool] = lambda: True,
) -> None:
    """Let AMC's agent play; the environment's ``evaluate`` sees every mask.

    Section 3.2 of the paper: every step of an episode gets the episode's reward, less a moving
    average of earlier ones, and nothing is discounted. An update a step; sizes and rates are those
    of AMC's published settings.

    Args:
        env: the environment.
        num_episodes: by which the share of the warm-up counts.
        seed: of initial weights, exploration and batches.
        most_episodes: played at most; default: ``num_episodes``.
        goes_on: asked after each step; False ends the training.
    """
    num_steps = len(env.groups)
    warm_up = int(WARM_UP_SHARE * num_episodes)
    with seeded(seed):  # the agent's own seed would set the generators of Python and NumPy too
        agent = _AmcDDPG(
            "MlpPolicy",
            env,
            learning_starts=warm_up * num_steps,
            buffer_size=EPISODES_KEPT * num_steps,
            batch_size=BATCH_SIZE,
            tau=0.01,
            gamma=1.0,
            train_freq=(1, "episode"),
            gradient_steps=-1,
            replay_buffer_class=_EpisodeBuffer,
            replay_buffer_kwargs={"seed": seed},
            policy_kwargs={"net_arch": list(HIDDEN)},
            device="cpu",
        )
        agent.set_logger(Logger(folder=None, output_formats=[]))  # its own leaves a folder behind
        agent.begin(warm_up, seed)
        most = (most_episodes or num_episodes) * num_steps
        agent.learn(most, callback=lambda _locals, _globals: goes_on())


def noise(episode: int, warm_up: int) -> float:
    """Return the deviation of an episode's shares, in units of their range."""
    return float(NOISE * NOISE_DECAY ** max(episode - warm_up, 0))


class _AmcDDPG(DDPG):
    """DDPG that explores as AMC does, with a learning rate each for actor and critic."""

    def begin(self, warm_up: int, seed: int) -> None:
        """Set what exploration needs.

        Args:
            warm_up: episodes of constant noise.
            seed: of the noise.
        """
        self.warm_up = warm_up
        self.noise_generator = np.random.default_rng(seed)

    def _sample_action(
        self, learning_starts: int, action_noise: Any = None, n_envs: int = 1
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Draw from a normal distribution around the actor's choice, truncated to the range."""
        assert self._last_obs is not None
        chosen, _ = self.predict(self._last_obs, deterministic=True)
        mean = self.policy.scale_action(chosen)  # in [-1, 1]: a range of 2
        scale = 2.0 * noise(self._episode_num, self.warm_up)
        drawn = truncnorm.rvs(
            (-1.0 - mean) / scale,
            (1.0 - mean) / scale,
            loc=mean,
            scale=scale,
            size=mean.shape,
            random_state=self.noise_generator,
        ).astype(np.float32)
        scaled = np.clip(drawn, -1.0, 1.0)
        return self.policy.unscale_action(scaled), scaled

    def _update_learning_rate(self, optimizers: list[Optimizer] | Optimizer) -> None:
        for optimizer, rate in (
            (self.actor.optimizer, ACTOR_RATE),
            (self.critic.optimizer, CRITIC_RATE),
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate


class _EpisodeBuffer(ReplayBuffer):
    """Holds an episode back until its reward is known, and gives that to all of its steps."""

    def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._generator = np.random.default_rng(seed)
        self._episode: list[tuple[Any, ...]] = []
        self._baseline: float | None = None

    def add(
        self,
        obs: np.ndarray[Any, Any],
        next_obs: np.ndarray[Any, Any],
        action: np.ndarray[Any, Any],
        reward: np.ndarray[Any, Any],
        done: np.ndarray[Any, Any],
        infos: list[dict[str, Any]],
    ) -> None:
        """Hold a step back; add the episode with its last step."""
        self._episode.append((obs.copy(), next_obs.copy(), action.copy(), done.copy(), infos))
        if not done.any():
            return
        final = float(reward[0])
        baseline = final if self._baseline is None else self._baseline
        for before, after, taken, end, info in self._episode:
            super().add(before, after, taken, np.array([final - baseline]), end, info)
        self._baseline = BASELINE_DECAY * baseline + (1.0 - BASELINE_DECAY) * final
        self._episode = []

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Draw steps from random numbers of its own."""
        known = self.buffer_size if self.full else self.pos
        return self._get_samples(self._generator.integers(known, size=batch_size), env)
