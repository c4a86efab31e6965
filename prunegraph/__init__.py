"""prunegraph: a reinforcement-learning agent that prunes neural networks.

The names below are loaded when they are first used, so that ``import prunegraph`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunegraph.errors import PruneGraphError
    from prunegraph.experiment.api import PruneResult, prune
    from prunegraph.experiment.own_search import search
    from prunegraph.graph import StructureGraph, analyse
    from prunegraph.pruning import (
        Compensation,
        PrunedInfo,
        SequentialCompensation,
        Subnets,
        apply_mask,
        export,
        finetune,
        load_pruned,
        recalibrate_bn,
        save_pruned,
        zero_mask,
    )
    from prunegraph.types import Budget, Cost, KeepMask

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Compensation",
    "Cost",
    "KeepMask",
    "PruneGraphError",
    "PruneResult",
    "PrunedInfo",
    "SequentialCompensation",
    "StructureGraph",
    "Subnets",
    "analyse",
    "apply_mask",
    "export",
    "finetune",
    "load_pruned",
    "prune",
    "recalibrate_bn",
    "save_pruned",
    "search",
    "zero_mask",
]

_HOMES = {
    "prunegraph.types": ("Budget", "Cost", "KeepMask"),
    "prunegraph.errors": ("PruneGraphError",),
    "prunegraph.experiment.api": ("PruneResult", "prune"),
    "prunegraph.experiment.own_search": ("search",),
    "prunegraph.graph": ("StructureGraph", "analyse"),
    "prunegraph.pruning": (
        "Compensation",
        "PrunedInfo",
        "SequentialCompensation",
        "Subnets",
        "apply_mask",
        "export",
        "finetune",
        "load_pruned",
        "recalibrate_bn",
        "save_pruned",
        "zero_mask",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load a public name from the package that defines it (PEP 562)."""
    if name not in _HOME_OF:
        msg = f"module 'prunegraph' has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted([*globals(), *__all__])
