"""The agent as methods: its search, the search without learning, and a policy that is applied."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from prunegraph.agent.adapt import NUM_DECISION_NETWORKS, adapt
from prunegraph.agent.options import AgentOptions
from prunegraph.agent.plan import check_search
from prunegraph.agent.policies import TrainedPolicy, find_policy
from prunegraph.agent.search import train_policy
from prunegraph.agent.subject import Subject
from prunegraph.methods.method import ChannelMethod, Problem, Result, Role

Given = TrainedPolicy | Path | str
"""A policy: itself, its file, the folder of its run, or the name of one of the package."""


@dataclass(frozen=True, kw_only=True)
class AgentSearch(ChannelMethod):
    """Trains a policy on the pruned networks of one problem and chooses the best mask it found.

    The policy serves this network alone and is not kept; ``train_policy`` returns it, for one
    network or a family.

    Args:
        options: how to search.
        shares: of the multiply-adds to train for, one an episode; default: the budget.
        policy: to begin with; default: an untrained one.
    """

    options: AgentOptions = field(default_factory=AgentOptions)
    shares: tuple[float, ...] = ()
    policy: Given | None = None

    name: ClassVar[str] = "agent"
    role: ClassVar[Role] = "agent"
    searches: ClassVar[bool] = True

    @cached_property
    def initial(self) -> TrainedPolicy | None:
        """The policy to begin with."""
        return None if self.policy is None else _found(self.policy)

    def check(self, problem: Problem) -> None:
        """Say before any work what it cannot serve.

        Raises:
            PruneGraphError: too few networks, a budget out of reach, or no such policy.
        """
        self.check_family([problem])

    def check_family(self, problems: Sequence[Problem]) -> None:
        """Say before any work what cannot be served by one policy: see ``check``."""
        check_search(problems, self.options, shares=self.shares, initial=self.initial)

    def prune(self, problem: Problem) -> Result:
        """Search, and choose the best finalist."""
        self.check(problem)
        found = train_policy(
            [problem],
            replace(self.options, distill_steps=0),  # the policy is not kept
            shares=self.shares,
            initial=self.initial,
        )
        return found.results[0]


@dataclass(frozen=True, kw_only=True)
class Sampler(AgentSearch):
    """The best of all masks that the agent draws: nothing learns, nothing is swapped."""

    name: ClassVar[str] = "sampler"
    role: ClassVar[Role] = "baseline"

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", still(self.options))


def still(options: AgentOptions) -> AgentOptions:
    """Return the options of a search that learns nothing."""
    return replace(options, learning_rate=0.0, swaps=0)


@dataclass(frozen=True)
class AppliedPolicy(ChannelMethod):
    """Lets a trained policy decide: no search, no look at the search split.

    Priors and strengths of what it learned are tried by the outputs on train data.

    Args:
        policy: the policy.
        label: what its rows are called after ``policy:``; default: the policy's path or name.
    """

    policy: Given
    label: str | None = None

    role: ClassVar[Role] = "agent"

    @property
    def name(self) -> str:
        """``"policy:NAME"``."""
        own = "given" if isinstance(self.policy, TrainedPolicy) else str(self.policy)
        return f"policy:{self.label or own}"

    @cached_property
    def trained(self) -> TrainedPolicy:
        """The policy."""
        return _found(self.policy)

    def check(self, problem: Problem) -> None:
        """Say before any work what it cannot serve.

        Raises:
            PruneGraphError: a budget out of reach, or no such policy.
        """
        super().check(problem)
        _ = self.trained
        zeros = np.zeros(problem.graph.num_units, dtype=np.float32)
        problem.graph.project(zeros, problem.budget.without_latency())

    def prune(self, problem: Problem) -> Result:
        """Choose the mask that moves the network's outputs least.

        ``details`` holds the prior, the strength, the divergence with each strength, and seconds.
        """
        self.check(problem)
        started = time.monotonic()
        if problem.budget.max_latency is not None:  # one out of reach is told before anything long
            problem.project(np.zeros(problem.graph.num_units, dtype=np.float32))
        report = None if problem.progress is None else partial(_report, problem)
        with problem.unlabelled.watched(report):
            adapted = adapt(self.trained, [Subject(problem)], [problem.budget])
        return Result(
            mask=adapted.masks[0],
            networks=NUM_DECISION_NETWORKS,
            details={
                "prior": adapted.subjects[0].prior(problem.budget).name,
                "strength": adapted.strength,
                "divergence": {str(name): value for name, value in adapted.divergence.items()},
                "seconds": time.monotonic() - started,
            },
        )


def _report(problem: Problem, networks: int) -> None:
    assert problem.progress is not None
    problem.progress(networks, "")


def _found(policy: Given) -> TrainedPolicy:
    return policy if isinstance(policy, TrainedPolicy) else find_policy(policy)
