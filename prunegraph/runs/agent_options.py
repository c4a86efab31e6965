"""From the command line's options to those of the agent and its environment."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from prunegraph.agent.config import PPOConfig
from prunegraph.agent.network import NetworkConfig
from prunegraph.agent.policies import TrainedPolicy
from prunegraph.agent.train import AgentConfig
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ArtefactError, BudgetError
from prunegraph.core.reading import checked
from prunegraph.env import EnvConfig
from prunegraph.methods.prior import NUM_PRIORS
from prunegraph.rewards import RewardConfig
from prunegraph.runs.adapt import NUM_SUIT_NETWORKS
from prunegraph.runs.options.config import SearchOptions
from prunegraph.runs.policies import find_policy

SEARCH_FLOOR = -10.0
"""Losing masks are told apart however far they lose: on digits most lose by more than 10 points."""

SHARED = ("max_memory", "max_latency", "round_to")
"""Limits of the run that hold for every budget of a search."""

DEFAULT_SUBSET = 1500
"""Search images an update scores its networks on."""


def given_policy(options: SearchOptions) -> TrainedPolicy | None:
    """Return the policy that the options begin with, or None."""
    return None if options.policy is None else find_policy(options.policy)


def search_budgets(options: SearchOptions, budget: Budget | None) -> tuple[Budget, ...] | None:
    """Return the budgets that episodes are drawn from; None = the task's own alone."""
    shared = {} if budget is None else budget.as_dict()
    shared = {name: shared[name] for name in SHARED if name in shared}
    return tuple(Budget(keep_macs=share, **shared) for share in options.budgets) or None


def trained_budgets(options: SearchOptions, budget: Budget) -> tuple[Budget, ...]:
    """Return what a policy is trained for: the budgets of the options, or the run's own."""
    return search_budgets(options, budget) or (budget,)


def num_probes(options: SearchOptions, budget: Budget) -> int:
    """Return how many networks a search runs for the features of one network.

    Args:
        options: how to search.
        budget: the run's own.
    """
    searched = trained_budgets(options, budget)
    adapted = NUM_SUIT_NETWORKS * len(searched) if options.policy is not None else 0
    return NUM_PRIORS * len({budget, *searched}) + adapted


def calm(ppo: PPOConfig) -> PPOConfig:
    """Return options for searches that begin with a policy that was taught their budget.

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
    """Return options for searches below all budgets that their policy was taught.

    Channels are drawn as calmly, but the widths of groups move as far as from a heuristic: what the
    policy says of them is a guess there (``docs/lab/trials.md``, "How far a search from a policy
    explores below what it was taught").
    """
    return replace(calm(ppo), group_noise_start=ppo.group_noise_start, group_noise_end=0.08)


def from_policy(ppo: PPOConfig, policy: TrainedPolicy, budgets: Sequence[Budget]) -> PPOConfig:
    """Return the options of a search that begins with a policy.

    Args:
        ppo: those of one that begins with a heuristic.
        policy: whose record names the budgets that it was taught; one without them counts as
            taught for all.
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
    taught, searched = _shares(record), _shares(budgets)
    below = bool(taught and searched) and min(searched) < min(taught)
    return wide(ppo) if below else calm(ppo)


def _shares(budgets: Iterable[Budget]) -> list[float]:
    return [budget.keep_macs for budget in budgets if budget.keep_macs is not None]


def agent_config(
    options: SearchOptions,
    seed: int,
    initial: TrainedPolicy | None = None,
    budgets: Sequence[Budget] = (),
) -> AgentConfig:
    """Return the agent's options.

    Args:
        options: how to search.
        seed: of policy, episodes and image subsets.
        initial: the policy to begin with: the network is as large as its own, and explores less.
        budgets: that are searched for: below those that it was taught it explores further.
    """
    own = options.agent
    reward = RewardConfig(
        self_competition=own.self_competition,
        metric=own.metric,
        constraint=own.constraint,
        floor=SEARCH_FLOOR,
    )
    one_step = own.granularity == "network" and own.constraint == "bias"
    ppo = PPOConfig(
        learning_rate=own.learning_rate,
        surrogate_steps=own.surrogate_steps * one_step,
        swaps=own.swaps,  # none without predicted steps
    )
    return AgentConfig(
        network=NetworkConfig() if initial is None else initial.network.config,
        ppo=ppo if initial is None else from_policy(ppo, initial, budgets),
        reward=reward,
        episodes_per_update=own.update_size,
        per_group=own.granularity == "group",
        seed=seed,
    )


def env_config(
    options: SearchOptions, config: AgentConfig, seed: int, budget: Budget | None = None
) -> EnvConfig:
    """Return the environment's options.

    Args:
        options: how to search.
        config: the agent's options.
        seed: of episodes and image subsets.
        budget: the run's own, of which the budgets of ``options`` share ``SHARED``.
    """
    return EnvConfig(
        metric=config.reward.metric,
        per_group=config.per_group,
        subset_size=options.agent.subset or DEFAULT_SUBSET,
        episodes_per_subset=config.episodes_per_update,
        budgets=search_budgets(options, budget),
        seed=seed,
    )
