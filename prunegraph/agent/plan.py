"""What a search of the agent goes by, checked before any work."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prunegraph.agent.adapt import NUM_ADAPT_NETWORKS
from prunegraph.agent.options import AgentOptions
from prunegraph.agent.policies import TrainedPolicy
from prunegraph.agent.settings import agent_config, env_config, trained_budgets
from prunegraph.agent.train import AgentConfig
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from prunegraph.env import check_at_stake
from prunegraph.evaluation.evaluator import metric_of
from prunegraph.methods.method import Problem
from prunegraph.methods.prior import NUM_PRIORS
from prunegraph.methods.search_run import FINALISTS
from prunegraph.rewards.config import Metric


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchPlan:
    """What a search goes by.

    Attributes:
        options: how to search.
        config: the agent's configuration.
        budgets: what the policy is trained for.
        budget: the problems' own.
        networks: that may be run for each problem.
        adapts: whether it begins with a policy.
    """

    options: AgentOptions
    config: AgentConfig
    budgets: tuple[Budget, ...]
    budget: Budget
    networks: int
    adapts: bool

    @property
    def probes(self) -> int:
        """Networks that are run for the features of each problem."""
        adapted = NUM_ADAPT_NETWORKS * len(self.budgets) if self.adapts else 0
        return NUM_PRIORS * len({self.budget, *self.budgets}) + adapted


def check_search(
    problems: Sequence[Problem],
    options: AgentOptions,
    *,
    shares: Sequence[float] = (),
    initial: TrainedPolicy | None = None,
) -> None:
    """Say before any work what a search could not do.

    Raises:
        ConfigError: too few networks may be evaluated.
        BudgetError: one of the budgets is out of reach, or met by the whole network.
    """
    for problem in problems:
        problem.budget.check_channels()
        graph, budget = problem.graph, problem.budget
        if budget.max_latency is None:  # it is predicted when the layers have been timed
            check_at_stake(problem.task.name, graph, budget)
        for searched in trained_budgets(shares, budget):
            zeros = np.zeros(graph.num_units, dtype=np.float32)
            graph.project(zeros, searched.without_latency())
    plan = plan_search(problems, options, shares, initial, None)
    env_config(plan.config, budgets=plan.budgets)
    groups = {len(problem.graph.free_groups) for problem in problems}
    if plan.config.per_group and len(groups) > 1:
        msg = "--agent.granularity group takes networks of one number of groups: leave it away"
        raise ConfigError(msg)
    pairs = len(problems) * len(plan.budgets)
    update = options.update_size + min(pairs, options.update_size)
    least = plan.probes + FINALISTS + -(-update // len(problems))
    if plan.networks < least:
        msg = f"networks={plan.networks} allows no update of the policy: give at least {least}"
        raise ConfigError(msg)


def plan_search(
    problems: Sequence[Problem],
    options: AgentOptions,
    shares: Sequence[float],
    initial: TrainedPolicy | None,
    config: AgentConfig | None = None,
) -> SearchPlan:
    """Return what a search goes by; see ``train_policy`` for the arguments."""
    problem = problems[0]
    budgets = trained_budgets(shares, problem.budget)
    return SearchPlan(
        options=options,
        config=config
        or agent_config(
            options,
            problem.seed,
            metric=_metric(problems, options),
            initial=initial,
            budgets=budgets,
        ),
        budgets=budgets,
        budget=problem.budget,
        networks=problem.max_networks,
        adapts=initial is not None,
    )


def _metric(problems: Sequence[Problem], options: AgentOptions) -> Metric:
    """Return what rewards compare: the score, where networks are not compared by one other."""
    found = {metric_of(problem.task, options.metric) for problem in problems}
    return found.pop() if len(found) == 1 else "accuracy"
