"""prunegraph: a reinforcement-learning agent that prunes neural networks.

The names below are loaded when they are first used, so that ``import prunegraph`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from prunegraph.core.renamed import warn_renamed

if TYPE_CHECKING:
    from prunegraph import methods, tasks
    from prunegraph.artefacts.export import export
    from prunegraph.artefacts.masked import load_masked, save_masked
    from prunegraph.artefacts.pruned import PrunedInfo, load_pruned, save_pruned
    from prunegraph.artefacts.semi_structured import to_semi_structured
    from prunegraph.core.budget import Budget, Cost
    from prunegraph.core.errors import PruneGraphError
    from prunegraph.core.masks import ChannelMask
    from prunegraph.core.weight_mask import WeightMask
    from prunegraph.graph import StructureGraph, analyse
    from prunegraph.graph.apply import apply_mask, zero_mask
    from prunegraph.layerwise.recalibrate import recalibrate_bn
    from prunegraph.layerwise.reconstruct import Reconstruction
    from prunegraph.layerwise.sequential import LayerwiseReconstruction
    from prunegraph.models import load
    from prunegraph.runs.pretrained import save_pretrained
    from prunegraph.runs.prune import prune, scores
    from prunegraph.runs.result import PruneResult
    from prunegraph.training.callbacks import lightning_callback, trainer_callback
    from prunegraph.training.loop import FinetuneConfig, finetune
    from prunegraph.training.slimmable import Subnets

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "ChannelMask",
    "Cost",
    "FinetuneConfig",
    "LayerwiseReconstruction",
    "PruneGraphError",
    "PruneResult",
    "PrunedInfo",
    "Reconstruction",
    "StructureGraph",
    "Subnets",
    "WeightMask",
    "analyse",
    "apply_mask",
    "export",
    "finetune",
    "lightning_callback",
    "load",
    "load_masked",
    "load_pruned",
    "methods",
    "prune",
    "recalibrate_bn",
    "save_masked",
    "save_pretrained",
    "save_pruned",
    "scores",
    "tasks",
    "to_semi_structured",
    "trainer_callback",
    "zero_mask",
]

_HOMES = {
    "prunegraph.artefacts.export": ("export",),
    "prunegraph.artefacts.masked": (
        "load_masked",
        "save_masked",
    ),
    "prunegraph.artefacts.pruned": (
        "PrunedInfo",
        "load_pruned",
        "save_pruned",
    ),
    "prunegraph.artefacts.semi_structured": ("to_semi_structured",),
    "prunegraph.core.budget": (
        "Budget",
        "Cost",
    ),
    "prunegraph.core.errors": ("PruneGraphError",),
    "prunegraph.core.masks": ("ChannelMask",),
    "prunegraph.core.weight_mask": ("WeightMask",),
    "prunegraph.graph": (
        "StructureGraph",
        "analyse",
    ),
    "prunegraph.graph.apply": (
        "apply_mask",
        "zero_mask",
    ),
    "prunegraph.layerwise.recalibrate": ("recalibrate_bn",),
    "prunegraph.layerwise.reconstruct": ("Reconstruction",),
    "prunegraph.layerwise.sequential": ("LayerwiseReconstruction",),
    "prunegraph.methods": ("methods",),
    "prunegraph.models": ("load",),
    "prunegraph.runs.pretrained": ("save_pretrained",),
    "prunegraph.runs.prune": (
        "prune",
        "scores",
    ),
    "prunegraph.runs.result": ("PruneResult",),
    "prunegraph.training.callbacks": (
        "lightning_callback",
        "trainer_callback",
    ),
    "prunegraph.training.loop": (
        "FinetuneConfig",
        "finetune",
    ),
    "prunegraph.tasks": ("tasks",),
    "prunegraph.training.slimmable": ("Subnets",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_RENAMED = {
    "Compensation": "Reconstruction",
    "KeepMask": "ChannelMask",
    "SequentialCompensation": "LayerwiseReconstruction",
}
"""Old name -> the name of today."""


def __getattr__(name: str) -> Any:
    """Load a public name from the package that defines it (PEP 562)."""
    if name in _RENAMED:
        warn_renamed(f"prunegraph.{name}", _RENAMED[name])
        name = _RENAMED[name]
    if name not in _HOME_OF:
        msg = f"module 'prunegraph' has no attribute {name!r}"
        raise AttributeError(msg)
    home = importlib.import_module(_HOME_OF[name])
    value = home if name in ("methods", "tasks") else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted([*globals(), *__all__])
