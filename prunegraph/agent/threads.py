"""Environments side by side, in threads of this process: for evaluators that wait for others."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv


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
