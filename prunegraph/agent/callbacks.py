"""What happens between two updates: checkpoints, then progress."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunegraph.agent.ppo import ChannelPPO
from prunegraph.agent.saving import save_checkpoint

Progress = Callable[[dict[str, Any]], None]
"""Called after each update with its record (see ``ChannelPPO.history``)."""


class CheckpointListener:
    """Writes a checkpoint after each update.

    Args:
        path: the file, replaced each time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, model: ChannelPPO) -> None:
        """Write the checkpoint."""
        save_checkpoint(self.path, model)


class ProgressListener:
    """Reports each update's record.

    Args:
        report: called with the record.
    """

    def __init__(self, report: Progress) -> None:
        self.report = report

    def __call__(self, model: ChannelPPO) -> None:
        """Report the last record."""
        self.report(model.history[-1])
