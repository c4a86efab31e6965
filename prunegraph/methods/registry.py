"""Baselines by name."""

from collections.abc import Callable, Mapping
from functools import partial

from prunegraph.core.errors import ConfigError
from prunegraph.methods.cem import CrossEntropySearch, RandomSearch
from prunegraph.methods.criteria.registry import CRITERION_NAMES
from prunegraph.methods.heuristic import ALLOCATIONS, HeuristicPruner, WidthsPruner
from prunegraph.methods.netadapt import NetAdapt
from prunegraph.methods.problem import Pruner
from prunegraph.methods.torch_pruning import TP_CRITERIA, TP_SCOPES, TorchPruningPruner

PRUNERS: Mapping[str, Callable[[], Pruner]] = {
    **{
        f"{criterion}/{allocation}": partial(HeuristicPruner, criterion, allocation)
        for criterion in CRITERION_NAMES
        for allocation in ALLOCATIONS
    },
    **{
        f"tp_{criterion}/{scope}": partial(TorchPruningPruner, criterion, scope)
        for criterion in TP_CRITERIA
        for scope in TP_SCOPES
    },
    "random_search": RandomSearch,
    "cem": CrossEntropySearch,
    "netadapt": NetAdapt,
}
"""Name -> factory of every baseline."""


def make_pruner(name: str) -> Pruner:
    """Return the baseline of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRUNERS:
        msg = f"unknown pruning method {name!r}; there are {', '.join(PRUNERS)}"
        raise ConfigError(msg)
    return PRUNERS[name]()


def control_widths(criterion: str, widths: Mapping[str, int]) -> Pruner:
    """Return a pruner that keeps given widths, with channels chosen by a criterion.

    Args:
        criterion: as ``"l1"`` or ``"random"``.
        widths: kept units of each group, as ``StructureGraph.group_widths`` of a mask.
    """
    return WidthsPruner(criterion, dict(widths))
