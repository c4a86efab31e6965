"""A method of the user's own, ``package.module:factory``: held to the rules of all methods."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from prunegraph.core.errors import ConfigError
from prunegraph.core.masks import ChannelMask
from prunegraph.core.user_code import as_one_line, find_factory
from prunegraph.methods.method import Kind, Method, Problem, Result, Role

ROLES = ("agent", "baseline", "control")
KINDS = ("channels", "weights")


@dataclass(frozen=True)
class CustomMethod:
    """Runs the user's method, counts its networks, and checks what it returns.

    What the method does not say of itself is taken as a baseline's that searches channels and
    depends on the seed.

    Args:
        name: ``package.module:factory``, the name of its rows.
        given: the user's method itself, if it is at hand; default: what the factory returns.

    Raises:
        PruneGraphError: there is none, or it is no method.
    """

    name: str
    given: object = None
    role: Role = field(init=False, default="baseline")
    kind: Kind = field(init=False, default="channels")
    searches: bool = field(init=False, default=True)
    per_seed: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        for name in ("role", "kind", "searches", "per_seed"):
            object.__setattr__(self, name, getattr(self._own, name, getattr(self, name)))

    @cached_property
    def _own(self) -> Any:
        own = self.given
        if own is None:
            factory = find_factory(self.name)
            with as_one_line(self.name):
                own = factory()
        if not callable(getattr(own, "prune", None)):
            msg = f"{self.name} returned {type(own).__name__}, which has no method prune(problem)"
            raise ConfigError(msg)
        for attribute, valid in (("role", ROLES), ("kind", KINDS)):
            value = getattr(own, attribute, valid[0])
            if value not in valid:
                msg = f"{self.name} says {attribute} = {value!r}: it is one of {', '.join(valid)}"
                raise ConfigError(msg)
        return own

    def check(self, problem: Problem) -> None:
        """Ask the method, if it can be asked.

        Raises:
            PruneGraphError: the budget is of another kind than its masks, there are no networks for
                a search, or it says so itself.
        """
        if self.kind == "channels":
            problem.budget.check_channels()
        if self.searches and problem.max_networks < 1:
            msg = f"networks={problem.max_networks} is too few for {self.name}: give at least 1"
            raise ConfigError(msg)
        own = getattr(self._own, "check", None)
        if own is not None:
            with as_one_line(self.name):
                own(problem)

    def prune(self, problem: Problem) -> Result:
        """Return what it chose, with the networks that it ran.

        Raises:
            ConfigError: it failed, or broke the rules that all methods keep.
        """
        self.check(problem)
        with as_one_line(self.name), _unchanged(problem.task.model):
            if self.kind == "weights":
                return _checked_weights(self._own.prune(problem))
            with problem.evaluator.watched(_stopping(problem)):
                return _checked(self._own.prune(problem), problem)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Raise ConfigError if the network is another one after the block; modes are put back."""
    before, modes = copy.deepcopy(model.state_dict()), {m: m.training for m in model.modules()}
    yield
    for module in model.modules():
        module.training = modes.get(module, module.training)
    after = model.state_dict()
    if not all(torch.equal(before[key], value) for key, value in after.items()):
        msg = "prune changed problem.task.model (weights or statistics): work on a copy of it"
        raise ConfigError(msg)


def _stopping(problem: Problem) -> Callable[[int], None]:
    """Return what stops a method at the first network that is too many, and reports the others."""

    def report(networks: int) -> None:
        if networks > problem.max_networks:
            msg = f"prune ran {networks} networks where {problem.max_networks} are allowed"
            raise ConfigError(msg)
        problem.tell(networks, "")

    return report


def _checked(result: object, problem: Problem) -> Result:
    """Return a result, its networks counted, if the rules were kept."""
    graph, result = problem.graph, _checked_weights(result)
    if not isinstance(result.mask, ChannelMask):
        what = type(result.mask).__name__
        msg = f"prune returned a {what}, not a ChannelMask: a method says kind = 'weights'"
        raise ConfigError(msg)
    networks = max(result.networks, problem.evaluator.num_networks)
    if networks > problem.max_networks:
        msg = f"prune ran {networks} networks where {problem.max_networks} are allowed"
    elif not graph.fits(graph.mask(result.mask.keep), problem.budget):
        msg = "prune chose a mask that is over the budget: return problem.project(scores)"
    else:
        return replace(result, networks=networks)
    raise ConfigError(msg)


def _checked_weights(result: object) -> Result:
    if not isinstance(result, Result):
        msg = (
            f"prune returned {type(result).__name__}, not a Result: return Result(mask=...) of "
            "prunegraph.methods.method"
        )
        raise ConfigError(msg)
    return result


def as_method(method: str | Method | object) -> Method:
    """Return a method object as it is if it declares all, else the user's in its adapter.

    Raises:
        ConfigError: it is a class, or no method.
    """
    if isinstance(method, type):
        msg = f"method is the class {method.__name__}: give an object, {method.__name__}()"
        raise ConfigError(msg)
    declared = ("name", "role", "kind", "searches", "per_seed", "check", "prune")
    if all(hasattr(method, attribute) for attribute in declared):
        return method  # type: ignore[return-value]  # the attributes of the protocol are there
    return CustomMethod(str(getattr(method, "name", type(method).__name__)), method)
