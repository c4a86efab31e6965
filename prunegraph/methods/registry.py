"""Every method by name, and where its class is: loaded when it is asked for.

A method is added in one file of this folder, which says what it is (``Method``), with one line here
and one row in ``tests/methods/test_conformance.py``. A criterion needs no line: it is decorated in
one file of ``criteria/``.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prunegraph.core.errors import ConfigError, suggest
from prunegraph.core.user_code import is_factory

if TYPE_CHECKING:
    from prunegraph.methods.method import Method

Homes = Mapping[str, str]
"""Name -> module of the package and class in it; all fields of the class have defaults."""

SEARCHES: Homes = {
    "random_search": "methods.random_search:RandomSearch",
    "cem": "methods.cem:CrossEntropySearch",
    "netadapt": "methods.netadapt:NetAdapt",
    "amc": "methods.amc.method:AmcSearch",
    "sampler": "agent.method:Sampler",
}
"""Baselines that search."""

NEURONS: Homes = {
    "struprune": "methods.struprune.method:StruPrune",
    "maskprune": "methods.maskprune.method:MaskPrune",
}
"""Methods that cut the neurons and heads of language models and change the weights that stay."""

WEIGHT_METHODS: Homes = {
    "magnitude": "methods.obs.magnitude:Magnitude",
    "wanda": "methods.obs.wanda:Wanda",
    "sparsegpt": "methods.obs.sparsegpt:SparseGPT",
    "thanos": "methods.obs.thanos:Thanos",
    "apt": "methods.obs.apt:APT",
}
"""Methods of single weights; their options are their fields."""

FEDERATED: Homes = {
    "fedmap": "methods.fedmap.method:FedMap",
    "fedavg": "methods.fedmap.method:FedAvg",
}
"""Methods of single weights that train from fresh weights, for minutes."""

RANDOMIZED: Homes = {
    "randomized": "methods.randomized.method:Randomized",
    "randomized_shares": "methods.randomized.method:RandomizedShares",
    "randomized_magnitude": "methods.randomized.method:RandomizedMagnitude",
    "randomized_uniform": "methods.randomized.method:RandomizedUniform",
}
"""Methods of single weights that train level by level, and their controls."""

PATHWAYS: Homes = {
    "pathways": "methods.pathways:Pathways",
    "language_masks": "methods.pathways:LanguageSpecific",
    "one_mask": "methods.pathways:OneMask",
    "one_mask_by_score": "methods.pathways:OneMaskByScore",
    "one_mask_of_union": "methods.pathways:OneMaskOfUnion",
}
"""Methods that train a network in several languages while weights go, and their controls."""

BY_NAME: Homes = {
    **NEURONS,
    **WEIGHT_METHODS,
    **FEDERATED,
    **RANDOMIZED,
    **PATHWAYS,
    "prior": "methods.controls:PriorControl",
}
"""What a command takes by its name alone: no list of baselines holds them. A control among them may
be asked for alone."""

CLASSES: Homes = {
    **SEARCHES,
    **BY_NAME,
    "agent": "agent.method:AgentSearch",
}
"""Every method that has a class of its own."""

POLICY = "policy"
"""What stands before a colon and the name of a policy that is applied."""


def load(home: str) -> Any:
    """Return a module of the package, or what is named in it, as in ``Homes``."""
    module, _, member = home.partition(":")
    loaded = importlib.import_module(f"prunegraph.{module}")
    return getattr(loaded, member) if member else loaded


def _halves() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the criteria and the allocations of heuristics."""
    criteria = load("methods.criteria.registry:CRITERIA")
    return tuple(criteria), tuple(load("methods.allocation:ALLOCATIONS"))


def heuristics() -> tuple[str, ...]:
    """Return every criterion with every allocation, those of criteria that came later too."""
    criteria, allocations = _halves()
    return tuple(
        f"{criterion}/{allocation}" for criterion in criteria for allocation in allocations
    )


def torch_pruning() -> tuple[str, ...]:
    """Return Torch-Pruning's own methods: asked for by name, since they need that package."""
    peer = load("methods.torch_pruning")
    return tuple(f"tp_{name}/{scope}" for name in peer.TP_CRITERIA for scope in peer.TP_SCOPES)


def method_names() -> tuple[str, ...]:
    """Return the name of every method that a name alone makes."""
    return (*heuristics(), *torch_pruning(), *CLASSES)


def method_groups() -> dict[str, tuple[str, ...]]:
    """Return the words that stand for several methods in a comparison, with their names."""
    chosen = heuristics()
    return {
        "all": (*chosen, *SEARCHES),
        "heuristics": chosen,
        "torch_pruning": torch_pruning(),
    }


def baseline_names() -> tuple[str, ...]:
    """Return every name that a comparison takes, the words for several first."""
    return (*method_groups(), *heuristics(), *torch_pruning(), *SEARCHES, *BY_NAME)


def make_method(name: str) -> "Method":
    """Return the method of a name, or of the user's ``package.module:factory``.

    Raises:
        PruneGraphError: there is none, or the user's is no method.
    """
    method: Method
    scheme, _, rest = name.partition(":")
    if name in CLASSES:
        method = load(CLASSES[name])()
    elif scheme == POLICY and rest:
        method = load("agent.method:AppliedPolicy")(rest)
    elif is_factory(name):
        method = load("methods.custom:CustomMethod")(name)
    elif name in torch_pruning():
        method = load("methods.torch_pruning:TorchPruning")(*name.removeprefix("tp_").split("/"))
    elif name in heuristics():
        method = load("methods.heuristic:Heuristic")(*name.split("/"))
    else:
        raise unknown_method(name, [*method_names(), f"{POLICY}:NAME"])
    return method


def unknown_method(name: str, valid: Sequence[str]) -> ConfigError:
    """Return the error for a name that no method has, with those that are valid in its place."""
    paired, (criteria, allocations) = heuristics(), _halves()
    near = suggest(f"{name}/{allocations[0]}" if name in criteria else name, valid)
    others = ", ".join(item for item in valid if item not in paired)
    msg = (
        f"unknown method {name!r}{near}; valid: a criterion and an allocation, as l1/uniform "
        f"(criteria: {', '.join(criteria)}; allocations: {', '.join(allocations)}); {others}, "
        "package.module:method"
    )
    return ConfigError(msg)
