"""Every method by name.

A method is added in one file of this folder, which says what it is (``Method``), with one line here
and one row in ``tests/methods/test_conformance.py``. A criterion needs no line: it is decorated in
one file of ``criteria/``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from prunegraph.core.errors import ConfigError, suggest
from prunegraph.core.user_code import is_factory
from prunegraph.methods.allocation import ALLOCATIONS
from prunegraph.methods.amc.method import AmcSearch
from prunegraph.methods.cem import CrossEntropySearch
from prunegraph.methods.controls import PriorControl, WidthsControl
from prunegraph.methods.criteria.registry import CRITERIA
from prunegraph.methods.custom import CustomMethod
from prunegraph.methods.fedmap.method import FedAvg, FedMap
from prunegraph.methods.heuristic import Heuristic
from prunegraph.methods.maskprune.method import MaskPrune
from prunegraph.methods.method import Method
from prunegraph.methods.netadapt import NetAdapt
from prunegraph.methods.obs.apt import APT
from prunegraph.methods.obs.magnitude import Magnitude
from prunegraph.methods.obs.sparsegpt import SparseGPT
from prunegraph.methods.obs.thanos import Thanos
from prunegraph.methods.obs.wanda import Wanda
from prunegraph.methods.pathways import (
    LanguageSpecific,
    OneMask,
    OneMaskByScore,
    OneMaskOfUnion,
    Pathways,
)
from prunegraph.methods.random_search import RandomSearch
from prunegraph.methods.randomized.method import (
    Randomized,
    RandomizedMagnitude,
    RandomizedShares,
    RandomizedUniform,
)
from prunegraph.methods.struprune.method import StruPrune
from prunegraph.methods.torch_pruning import TP_CRITERIA, TP_SCOPES, TorchPruning

Factory = Callable[[], Method]


def heuristics() -> dict[str, Factory]:
    """Return every criterion with every allocation, those of criteria that came later too."""
    return {
        f"{criterion}/{allocation}": partial(Heuristic, criterion, allocation)
        for criterion in CRITERIA
        for allocation in ALLOCATIONS
    }


SEARCHES: dict[str, Factory] = {
    "random_search": RandomSearch,
    "cem": CrossEntropySearch,
    "netadapt": NetAdapt,
    "amc": AmcSearch,
}
"""Baselines that search; ``agent/method.py`` adds its sampler."""

TORCH_PRUNING: Mapping[str, Factory] = {
    f"tp_{criterion}/{scope}": partial(TorchPruning, criterion, scope)
    for criterion in TP_CRITERIA
    for scope in TP_SCOPES
}
"""Torch-Pruning's own methods: asked for by name, since they need that package."""

WEIGHT_METHODS: dict[str, Factory] = {
    method.name: method for method in (Magnitude, Wanda, SparseGPT, Thanos, APT)
}
"""Methods of single weights; their options are their fields."""

FEDERATED: dict[str, Factory] = {method.name: method for method in (FedMap, FedAvg)}
"""Methods of single weights that train from fresh weights, for minutes: asked for by name."""

RANDOMIZED: dict[str, Factory] = {
    method.name: method
    for method in (Randomized, RandomizedShares, RandomizedMagnitude, RandomizedUniform)
}
"""Methods of single weights that train level by level, and their controls."""

PATHWAYS: dict[str, Factory] = {
    method.name: method
    for method in (Pathways, LanguageSpecific, OneMask, OneMaskByScore, OneMaskOfUnion)
}
"""Methods that train a network in several languages while weights go, and their controls."""

TRAINED: dict[str, Factory] = {**FEDERATED, **RANDOMIZED, **PATHWAYS}
"""Methods that train for minutes: asked for by name, a control of them alone too."""

OTHERS: dict[str, Factory] = {
    "prior": PriorControl,
    StruPrune.name: StruPrune,
    MaskPrune.name: MaskPrune,
    **WEIGHT_METHODS,
    **TRAINED,
}
"""What no list of baselines holds: controls, methods of single weights or of language models."""

CONTROL_CRITERIA = ("l1", "random")
"""Criteria that choose channels at the agent's own widths."""

SCHEMES: dict[str, Callable[[str], Method]] = {}
"""What stands before a colon -> factory from what stands after it; the agent adds ``policy``."""


class Methods(Mapping[str, Factory]):
    """Name -> factory of every method that a name alone makes."""

    def _all(self) -> dict[str, Factory]:
        return {**heuristics(), **TORCH_PRUNING, **SEARCHES, **OTHERS}

    def __getitem__(self, name: str) -> Factory:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


METHODS = Methods()


def method_groups() -> dict[str, tuple[str, ...]]:
    """Return the words that stand for several methods in a comparison, with their names."""
    chosen, searched = tuple(heuristics()), tuple(SEARCHES)
    return {
        "all": (*chosen, *searched),
        "heuristics": chosen,
        "torch_pruning": tuple(TORCH_PRUNING),
    }


def baseline_names() -> tuple[str, ...]:
    """Return every name that a comparison takes, the words for several first."""
    return (*method_groups(), *heuristics(), *TORCH_PRUNING, *SEARCHES)


def make_method(name: str) -> Method:
    """Return the method of a name, or of the user's ``package.module:factory``.

    Raises:
        PruneGraphError: there is none, or the user's is no method.
    """
    scheme, _, rest = name.partition(":")
    if name in METHODS:
        return METHODS[name]()
    if rest and scheme in SCHEMES:
        return SCHEMES[scheme](rest)
    if is_factory(name):
        return CustomMethod(name)
    raise unknown_method(name, [*METHODS, *(f"{scheme}:NAME" for scheme in SCHEMES)])


def unknown_method(name: str, valid: Sequence[str]) -> ConfigError:
    """Return the error for a name that no method has, with those that are valid in its place."""
    near, paired = suggest(name, list(valid)), heuristics()
    others = ", ".join(item for item in valid if item not in paired)
    msg = (
        f"unknown method {name!r}{near}; valid: a criterion and an allocation, as l1/uniform "
        f"(criteria: {', '.join(CRITERIA)}; allocations: {', '.join(ALLOCATIONS)}); {others}, "
        "package.module:method"
    )
    return ConfigError(msg)


def control_widths(criterion: str, widths: Mapping[str, int]) -> Method:
    """Return the control that keeps given widths, with channels chosen by a criterion.

    Args:
        criterion: one of ``CONTROL_CRITERIA``, or any other.
        widths: kept units of each group, as ``StructureGraph.group_widths`` of a mask.
    """
    return WidthsControl(criterion, dict(widths))
