"""Baselines by name."""

from collections.abc import Callable, Mapping
from functools import partial

from prunegraph.core.errors import ConfigError
from prunegraph.methods.cem import CrossEntropySearch, RandomSearch
from prunegraph.methods.criteria.registry import CRITERION_NAMES
from prunegraph.methods.heuristic import ALLOCATIONS, Heuristic, WidthsControl
from prunegraph.methods.netadapt import NetAdapt
from prunegraph.methods.method import Method
from prunegraph.methods.torch_pruning import TP_CRITERIA, TP_SCOPES, TorchPruning

METHODS: Mapping[str, Callable[[], Method]] = {
    **{
        f"{criterion}/{allocation}": partial(Heuristic, criterion, allocation)
        for criterion in CRITERION_NAMES
        for allocation in ALLOCATIONS
    },
    **{
        f"tp_{criterion}/{scope}": partial(TorchPruning, criterion, scope)
        for criterion in TP_CRITERIA
        for scope in TP_SCOPES
    },
    "random_search": RandomSearch,
    "cem": CrossEntropySearch,
    "netadapt": NetAdapt,
}
"""Name -> factory of every baseline."""


def make_method(name: str) -> Method:
    """Return the baseline of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in METHODS:
        msg = f"unknown pruning method {name!r}; there are {', '.join(METHODS)}"
        raise ConfigError(msg)
    return METHODS[name]()


def control_widths(criterion: str, widths: Mapping[str, int]) -> Method:
    """Return a pruner that keeps given widths, with channels chosen by a criterion.

    Args:
        criterion: as ``"l1"`` or ``"random"``.
        widths: kept units of each group, as ``StructureGraph.group_widths`` of a mask.
    """
    return WidthsControl(criterion, dict(widths))
