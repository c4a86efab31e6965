"""Pruning methods behind one protocol; those with options of their own, for ``pg.prune``.

The names below are loaded when they are first used.
"""

from typing import TYPE_CHECKING, Any

from prunegraph.methods.registry import CLASSES, load

if TYPE_CHECKING:
    from prunegraph.methods.fedmap.method import FedAvg, FedMap
    from prunegraph.methods.maskprune.method import MaskPrune
    from prunegraph.methods.obs.apt import APT
    from prunegraph.methods.obs.magnitude import Magnitude
    from prunegraph.methods.obs.sparsegpt import SparseGPT
    from prunegraph.methods.obs.thanos import Thanos
    from prunegraph.methods.obs.wanda import Wanda
    from prunegraph.methods.pathways import Pathways
    from prunegraph.methods.randomized.method import Randomized, RandomizedShares
    from prunegraph.methods.struprune.method import StruPrune

__all__ = [
    "APT",
    "FedAvg",
    "FedMap",
    "Magnitude",
    "MaskPrune",
    "Pathways",
    "Randomized",
    "RandomizedShares",
    "SparseGPT",
    "StruPrune",
    "Thanos",
    "Wanda",
]


def __getattr__(name: str) -> Any:
    """Load a class from the module that the registry names (PEP 562)."""
    homes = {home.partition(":")[2]: home for home in CLASSES.values()}
    if name not in __all__:
        msg = f"module 'prunegraph.methods' has no attribute {name!r}"
        raise AttributeError(msg)
    return load(homes[name])


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted([*globals(), *__all__])
