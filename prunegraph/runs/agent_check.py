"""Whether the agent's search could do its work, told before any."""

import math
from collections.abc import Sequence

import numpy as np

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from prunegraph.env import check_at_stake
from prunegraph.runs.agent_options import (
    agent_config,
    env_config,
    given_policy,
    num_probes,
    search_budgets,
)
from prunegraph.runs.agent_search import FINALISTS
from prunegraph.runs.options.config import SearchOptions
from prunegraph.runs.prepare import Target


def check_networks(targets: Sequence[Target], options: SearchOptions, budget: Budget) -> None:
    """Raise an error if a search could make no update, or the policy to begin with is not there.

    Raises:
        ConfigError: too few networks may be evaluated.
        BudgetError: one of the budgets is out of reach, or met by the whole network.
        ArtefactError: there is no such policy.
    """
    for target in targets:
        if budget.max_latency is None:  # it is predicted when the layers have been timed
            check_at_stake(target.arch, target.graph, budget)
        for searched in search_budgets(options, budget) or ():
            zeros = np.zeros(target.graph.num_units, dtype=np.float32)
            target.graph.project(zeros, searched.without_latency())
    agent = agent_config(options, 0, given_policy(options))
    env_config(options, agent, 0, budget)
    if agent.per_group and len({len(target.graph.free_groups) for target in targets}) > 1:
        msg = "--agent.granularity group takes networks of one number of groups: leave it away"
        raise ConfigError(msg)
    probes = num_probes(options, budget) + FINALISTS
    cells = len(targets) * max(len(options.budgets), 1)
    update = options.agent.update_size + min(cells, options.agent.update_size)
    least = probes + math.ceil(update / len(targets))
    if options.networks < least:
        msg = f"networks={options.networks} allows no update of the policy: give at least {least}"
        raise ConfigError(msg)
