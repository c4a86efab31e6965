"""What happens between two updates: checkpoints and progress."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from prunegraph.agent.ppo import ChannelPPO
from prunegraph.agent.saving import save_checkpoint

Progress = Callable[[dict[str, Any]], None]
"""Called after each update with its record (see ``ChannelPPO.history``)."""


class UpdateCallback(BaseCallback):
    """Runs ``after_update`` after each update of the policy, the last one included.

    stable-baselines3 has no such hook: an update is over when the next rollout, or the end, comes.
    """

    model: ChannelPPO

    def __init__(self) -> None:
        super().__init__()
        self._updates_seen = 0

    def after_update(self) -> None:
        """Do something between two updates."""
        raise NotImplementedError

    def _on_training_start(self) -> None:
        self._updates_seen = len(self.model.history)

    def _on_rollout_start(self) -> None:
        self._notice()

    def _on_training_end(self) -> None:
        self._notice()

    def _on_step(self) -> bool:
        return True

    def _notice(self) -> None:
        if len(self.model.history) > self._updates_seen:
            self._updates_seen = len(self.model.history)
            self.after_update()


class CheckpointCallback(UpdateCallback):
    """Writes a checkpoint after each update.

    Args:
        path: the file, replaced each time.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def after_update(self) -> None:
        """Write the checkpoint."""
        save_checkpoint(self.path, self.model)


class ProgressCallback(UpdateCallback):
    """Reports each update's record.

    Args:
        report: called with the record.
    """

    def __init__(self, report: Progress) -> None:
        super().__init__()
        self.report = report

    def after_update(self) -> None:
        """Report the last record."""
        self.report(self.model.history[-1])
