"""The processes that ``torchrun`` started beside this one; known before torch is loaded."""

import os
from collections.abc import Mapping

SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def num_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many processes ``torchrun`` started for this command; 1 without it."""
    under_torchrun = all(name in environment for name in SET_BY_TORCHRUN)
    return int(environment["WORLD_SIZE"]) if under_torchrun else 1


def speaks(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is the one of its machine that tells people what went wrong."""
    return num_ranks(environment) == 1 or environment["LOCAL_RANK"] == "0"
