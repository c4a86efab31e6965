"""From the options of a search to those of its network, updates and environment."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from prunegraph.agent.config import PPOConfig
from prunegraph.agent.network import NetworkConfig
from prunegraph.agent.options import AgentOptions
from prunegraph.agent.policies import TrainedPolicy
from prunegraph.agent.train import AgentConfig
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ArtefactError, BudgetError
from prunegraph.core.reading import checked
from prunegraph.env import EnvConfig
from prunegraph.methods.method import SUBSET
from prunegraph.rewards import RewardConfig
from prunegraph.rewards.config import Metric

SEARCH_FLOOR = -10.0
"""Losing masks are told apart however far they lose: on digits most lose by more than 10 points."""

SHARED = ("max_memory", "max_latency", "round_to", "uniform")
"""Limits of the run that hold for every budget of a search."""


def trained_budgets(shares: Sequence[float], budget: Budget) -> tuple[Budget, ...]:
    """Return what a policy is trained for: the budgets of the shares, or the task's own.

    Args:
        shares: of the multiply-adds, one an episode.
        budget: the task's own, of which the others share ``SHARED``.
    """
    given = budget.as_dict()
    shared = {name: given[name] for name in SHARED if name in given}
    return tuple(Budget(keep_macs=share, **shared) for share in shares) or (budget,)


def calm(ppo: PPOConfig) -> PPOConfig:
    """Return options for searches that begin with a policy that learned their budget.

    They explore a quarter as far at first, less than half as far at the end.
    """
    return replace(
        ppo,
        temperature_start=0.075,
        temperature_end=0.05,
        group_noise_start=0.06,
        group_noise_end=0.05,
    )


def wide(ppo: PPOConfig) -> PPOConfig:
    """Return options for searches below all budgets that their policy learned.

    Channels are drawn as calmly, but the widths of groups move as far as from a heuristic: what the
    policy says of them is a guess there (``docs/lab/trials.md``, "How far a search from a policy
    explores below what it learned").
    """
    return replace(calm(ppo), group_noise_start=ppo.group_noise_start, group_noise_end=0.08)


def from_policy(ppo: PPOConfig, policy: TrainedPolicy, budgets: Sequence[Budget]) -> PPOConfig:
    """Return the options of a search that begins with a policy.

    Args:
        ppo: those of one that begins with a heuristic.
        policy: whose record names the budgets that it learned; one without them counts as
            trained for all.
        budgets: that are searched for.

    Raises:
        ArtefactError: the record names something else as budgets.
    """
    where = "the policy's record: budgets"
    try:
        record = checked(policy.record.get("budgets", []), list[Budget], where)
    except BudgetError as error:
        msg = f"{where} holds none: {error}; the file is damaged"
        raise ArtefactError(msg) from error
    learned, searched = _shares(record), _shares(budgets)
    below = bool(learned and searched) and min(searched) < min(learned)
    return wide(ppo) if below else calm(ppo)


def _shares(budgets: Iterable[Budget]) -> list[float]:
    return [budget.keep_macs for budget in budgets if budget.keep_macs is not None]


def agent_config(
    options: AgentOptions,
    seed: int,
    *,
    metric: Metric | None = None,
    initial: TrainedPolicy | None = None,
    budgets: Sequence[Budget] = (),
) -> AgentConfig:
    """Return the agent's configuration.

    Args:
        options: how to search.
        seed: of policy, episodes and image subsets.
        metric: what rewards compare; default: that of the options.
        initial: the policy to begin with: the network is as large as its own, and explores less.
        budgets: that are searched for: below those that it learned it explores further.
    """
    reward = RewardConfig(
        self_competition=options.self_competition,
        metric=metric or options.metric,
        constraint=options.constraint,
        floor=SEARCH_FLOOR,
    )
    one_step = options.granularity == "network" and options.constraint == "bias"
    ppo = PPOConfig(
        learning_rate=options.learning_rate,
        surrogate_steps=options.surrogate_steps * one_step,
        swaps=options.swaps,  # none without predicted steps
    )
    memory, latency = next(
        ((budget.max_memory, budget.max_latency) for budget in budgets), (None, None)
    )
    return AgentConfig(
        network=NetworkConfig() if initial is None else initial.network.config,
        ppo=ppo if initial is None else from_policy(ppo, initial, budgets),
        reward=reward,
        episodes_per_update=options.update_size,
        per_group=options.granularity == "group",
        max_memory=memory,
        max_latency=latency,
        seed=seed,
    )


def env_config(
    config: AgentConfig,
    *,
    subset_size: int | None = SUBSET,
    budgets: Sequence[Budget] | None = None,
) -> EnvConfig:
    """Return the environment's options.

    Args:
        config: the agent's configuration.
        subset_size: search samples that an update scores its networks on; None = all.
        budgets: that episodes are drawn from; None = the task's own alone.
    """
    return EnvConfig(
        metric=config.reward.metric,
        per_group=config.per_group,
        subset_size=subset_size,
        episodes_per_subset=config.episodes_per_update,
        budgets=None if budgets is None else tuple(budgets),
        seed=config.seed,
    )
