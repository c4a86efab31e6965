"""Heuristics and search baselines behind the same Protocol as the agent."""

from prunegraph.pruners.heuristics import HeuristicPruner, WidthsPruner, allocate
from prunegraph.pruners.netadapt import NetAdapt
from prunegraph.pruners.registry import PRUNERS, at_widths, make_pruner
from prunegraph.pruners.search import CrossEntropySearch, RandomSearch
from prunegraph.pruners.torch_pruning import TorchPruningPruner

__all__ = [
    "PRUNERS",
    "CrossEntropySearch",
    "HeuristicPruner",
    "NetAdapt",
    "RandomSearch",
    "TorchPruningPruner",
    "WidthsPruner",
    "allocate",
    "at_widths",
    "make_pruner",
]
