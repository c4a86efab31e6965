"""One policy trained on many networks at once, for networks that it has never seen.

Nothing is learned of a single network: no offsets, no surrogate, no finalists. Each update draws
several networks with a budget each, and several masks for each of these pairs; a mask competes with
the best of its own pair, and its advantage is over the others of the pair. Masks are scored on few
images, in a network that is silenced and reconstructed at once: milliseconds a mask. Without the
reconstruction what is scored says little of what a mask becomes. The score is the divergence from
the dense network's outputs: it ranks masks more as their finished networks rank than labels do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from prunegraph.agent.config import PPOConfig
from prunegraph.agent.options import AgentOptions
from prunegraph.agent.policies import TrainedPolicy
from prunegraph.agent.settings import agent_config, env_config
from prunegraph.agent.subject import Subject
from prunegraph.agent.train import AgentConfig, Checkpoint, TrainingResult, train_agent
from prunegraph.core.budget import Budget
from prunegraph.env import ChannelPruningEnv, PruningTask
from prunegraph.methods.context import Context
from prunegraph.methods.method import Problem

PAIRS = 8
"""Networks, each with a budget, of which an update holds masks."""

SHARES = (0.15, 0.25, 0.35, 0.5, 0.65, 0.8)
"""Of the multiply-adds: what a policy is trained for, unless it is told."""

SUBSET = 128
"""Of a quick evaluator's search images those that an update scores masks on."""


def wider(ppo: PPOConfig) -> PPOConfig:
    """Return options that move the widths of groups as far as priors are wrong about them.

    Bits are drawn more calmly, since their noise hides what the widths are worth.
    """
    return replace(
        ppo,
        temperature_start=0.2,
        temperature_end=0.1,
        group_noise_start=0.6,
        group_noise_end=0.3,
    )


def catalogue_config(
    options: AgentOptions, seed: int, initial: TrainedPolicy | None = None
) -> AgentConfig:
    """Return the agent's configuration: all is left to the policy network.

    Args:
        options: how it learns; ``update_size`` masks for each of ``PAIRS``.
        seed: of policy, episodes and images.
        initial: the policy to begin with.
    """
    options = replace(options, surrogate_steps=0, swaps=0)
    config = agent_config(options, seed, metric="kl", initial=initial)
    ppo = replace(
        wider(config.ppo) if initial is None else config.ppo,
        offset_rate=0.0,
        group_offset_rate=0.0,
        group_noise_rate=0.0,
        group_noise_weight=1.0,
    )
    return replace(config, ppo=ppo, episodes_per_update=PAIRS * options.update_size)


def quick_problem(context: Context, budget: Budget) -> Problem:
    """Return a problem whose masks are scored in milliseconds."""
    few = context.quick_evaluator(SUBSET)
    unlabelled = context.quick_evaluator(SUBSET, labelled=False)
    return replace(
        context.problem(budget), make_evaluator=lambda _: few, make_unlabelled=lambda: unlabelled
    )


def train_on_catalogue(
    subjects: Sequence[Subject],
    config: AgentConfig,
    budgets: Sequence[Budget],
    *,
    networks: int,
    initial: TrainedPolicy | None = None,
    checkpoint: Path | None = None,
    events: Path | None = None,
    progress: Callable[[Mapping[str, Any]], None] | None = None,
) -> TrainingResult:
    """Train one policy on all (network, budget) pairs in turn.

    Args:
        subjects: of ``quick_problem``.
        config: see ``catalogue_config``.
        budgets: each within reach of every network.
        networks: pruned networks to run, all together.
        initial: the policy to begin with; default: an untrained one.
        checkpoint: where the state is kept; an equal call goes on from it.
        events: folder for learning curves.
        progress: called with the record of each update.

    Raises:
        PruneGraphError: a budget out of reach, or the checkpoint is of another training.
    """
    names = config.network.feature_names
    tasks = [
        PruningTask(
            name=f"{number}:{subject.problem.task.name}",
            graph=subject.graph,
            node_features=cache(partial(subject.features, names=names)),
            evaluator=subject.problem.evaluator,
            budget=subject.budget,
        )
        for number, subject in enumerate(subjects)
    ]
    masks = config.episodes_per_update // PAIRS
    environment = replace(
        env_config(config, subset_size=SUBSET, budgets=budgets),
        episodes_per_pair=masks,
        episode_stride=masks,
    )
    env = ChannelPruningEnv(tasks, environment)  # each of the others acts on the same pair
    identity = {
        "networks": [task.name for task in tasks],
        "budgets": [budget.as_dict() for budget in budgets],
        "config": repr(config),
    }
    return train_agent(
        [lambda: env, *(partial(env.beside, number) for number in range(1, masks))],
        [subject.graph for subject in subjects],
        config,
        total_networks=networks,
        initial=initial,
        tensorboard=events,
        progress=progress,
        checkpoint=None if checkpoint is None else Checkpoint(path=checkpoint, identity=identity),
    )
