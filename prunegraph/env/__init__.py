"""The constrained decision process; importing this registers it with Gymnasium."""

import gymnasium

from prunegraph.env.config import EnvConfig
from prunegraph.env.environment import ChannelPruningEnv
from prunegraph.env.task import PruningTask, check_at_stake, pair_name
from prunegraph.graph.features import CONTEXT_NAMES

ENV_ID = "prunegraph/ChannelPruning-v0"
"""The id for ``gymnasium.make(ENV_ID, tasks=..., config=...)``."""

gymnasium.register(id=ENV_ID, entry_point="prunegraph.env.environment:ChannelPruningEnv")

__all__ = [
    "CONTEXT_NAMES",
    "ENV_ID",
    "ChannelPruningEnv",
    "EnvConfig",
    "PruningTask",
    "check_at_stake",
    "pair_name",
]
