"""A pruning problem as a policy sees it: what it reads, and from which prior it starts."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import numpy as np

from prunegraph.agent.policies import TrainedPolicy
from prunegraph.core.budget import Budget
from prunegraph.core.masks import ChannelMask, FloatArray
from prunegraph.graph import StructureGraph
from prunegraph.graph.features import CONTEXT_NAMES
from prunegraph.graph.pyg import to_pyg
from prunegraph.methods.method import Problem
from prunegraph.methods.prior import Prior


@dataclass(frozen=True, eq=False)
class Subject:
    """A problem with the priors that were tried on it, each budget's once.

    Attributes:
        problem: the problem.
        chosen: budget -> name of the prior to start from; default: the one that is best alone.
    """

    problem: Problem
    chosen: Mapping[Budget, str] = field(default_factory=dict)

    @property
    def graph(self) -> StructureGraph:
        """The structure."""
        return self.problem.graph

    @property
    def budget(self) -> Budget:
        """The problem's own."""
        return self.problem.budget

    @cached_property
    def _priors(self) -> dict[Budget, list[Prior]]:
        return {}

    def priors(self, budget: Budget) -> list[Prior]:
        """Return what a policy may start from, the best by itself first."""
        if budget not in self._priors:
            self._priors[budget] = self.problem.priors(budget)
        return self._priors[budget]

    def prior(self, budget: Budget) -> Prior:
        """Return what a policy starts from."""
        found = self.priors(budget)
        name = self.chosen.get(budget, found[0].name)
        return next(prior for prior in found if prior.name == name)

    def starting_from(self, chosen: Mapping[Budget, str]) -> Self:
        """Return the same with other priors at some budgets."""
        subject = dataclasses.replace(self, chosen={**self.chosen, **chosen})
        subject.__dict__["_priors"] = self._priors
        return subject

    def features(self, budget: Budget, names: Sequence[str]) -> FloatArray:
        """Return the named features of each prunable unit ``[N, F]``."""
        return self.problem.features(names, budget, self.prior(budget).scores)

    def scores(self, policy: TrainedPolicy, budget: Budget, asked: Budget) -> FloatArray:
        """Return a policy's scores ``[N]``; it is told the budget ``asked``."""
        features = self.features(budget, policy.network.config.feature_names)
        return policy.logits(to_pyg(self.graph), features, first_context(asked))

    def mask(
        self,
        policy: TrainedPolicy,
        budget: Budget,
        offsets: FloatArray | None = None,
        *,
        asked: Budget | None = None,
    ) -> ChannelMask:
        """Return the mask that a policy chooses: its scores projected to the budget, no search.

        Args:
            policy: the policy.
            budget: what may remain.
            offsets: ``[N]`` what a search of this very network added to the scores.
            asked: the budget that the policy is told; default: ``budget``.
        """
        scores = self.scores(policy, budget, asked or budget)
        return self.problem.project(scores if offsets is None else scores + offsets, budget)


def first_context(budget: Budget) -> FloatArray:
    """Return the context of an episode's first observation."""
    values = {"cost_so_far": 1.0, "keep_macs": 1.0, "keep_params": 1.0} | budget.as_dict()
    return np.array([values.get(name, 0.0) for name in CONTEXT_NAMES], dtype=np.float32)
