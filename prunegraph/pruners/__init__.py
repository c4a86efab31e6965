"""Heuristics and search baselines behind the same Protocol as the agent."""

from prunegraph.pruners.heuristics import HeuristicPruner, WidthsPruner
from prunegraph.pruners.registry import PRUNERS, at_widths, make_pruner
from prunegraph.pruners.search import CrossEntropySearch, RandomSearch

__all__ = [
    "PRUNERS",
    "CrossEntropySearch",
    "HeuristicPruner",
    "RandomSearch",
    "WidthsPruner",
    "at_widths",
    "make_pruner",
]
