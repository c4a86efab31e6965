"""Train the agent: environments and thresholds in, a policy and what it went through out."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from prunegraph.agent.config import EPISODES_PER_UPDATE, PPOConfig
from prunegraph.agent.network import NetworkConfig
from prunegraph.agent.policies import TrainedPolicy
from prunegraph.agent.ppo import ChannelPPO
from prunegraph.agent.surrogate import Surrogate
from prunegraph.agent.threshold import BudgetThreshold
from prunegraph.agent.vec_env import SelfCompetitionVecEnv, ThreadedVecEnv
from prunegraph.core.checks import check_at_least
from prunegraph.core.errors import ConfigError
from prunegraph.core.masks import FloatArray
from prunegraph.core.reading import checked
from prunegraph.graph.graph import StructureGraph
from prunegraph.rewards import RewardConfig, SelfCompetition
from prunegraph.rewards.lagrangian import LagrangianMultiplier
from prunegraph.rewards.ledger import SelfCompetitionLedger
from prunegraph.training.checkpoint import TrainingState
from prunegraph.training.loop import CHECKPOINT_SECONDS

EnvFactory = Callable[[], gymnasium.Env[Any, Any]]

Progress = Callable[[dict[str, Any]], None]
"""Called after each update with its record (see ``ChannelPPO.history``)."""


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Options of the agent.

    Attributes:
        network: names and sizes of its network.
        ppo: its updates.
        reward: what a pruned network competes with, and how the budget enters (``constraint``).
        episodes_per_update: masks an update; the environments' block.
        per_group: the environments decide group by group.
        initial_cost_ratio: expected cost over budget at the start of ``constraint="lagrangian"``.
        max_memory: that of the environments' budgets, which is the same in all of them.
        max_latency: likewise.
        seed: seed of initial weights and sampling noise.
    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    episodes_per_update: int = EPISODES_PER_UPDATE
    per_group: bool = False
    initial_cost_ratio: float = 1.0
    max_memory: int | None = None
    max_latency: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("episodes_per_update", self.episodes_per_update, 2)


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingResult:
    """What a training leaves.

    Attributes:
        policy: the trained policy.
        history: one record an update, as JSON values: ``networks``, ``accuracy``, ``reward``,
            ``bar``, ``overshoot``, ``multiplier``, ``repaired``, ``entropy_per_bit``,
            ``approx_kl``, ``clip_fraction``, ``equal_actions``, ``distance_to_uniform``,
            ``greedy_masks`` (pair -> the policy's own mask before the update, packed), ...
        competition: ledgers (the best mask of each pair among them) and multipliers.
        offsets: graph id -> what the search added to the policy's scores ``[N]`` of that network.
        surrogate: what all run masks together say of masks.
        networks_evaluated: pruned networks that were run.
    """

    policy: TrainedPolicy
    history: tuple[Mapping[str, Any], ...]
    competition: SelfCompetition
    offsets: Mapping[int, FloatArray]
    surrogate: Surrogate
    networks_evaluated: int


@dataclass(kw_only=True)
class Checkpoint:
    """The state of a training between two updates, on disk.

    Attributes:
        path: the file.
        identity: what tells the training from others.
        seconds: least time between two writes.
    """

    path: Path
    identity: Mapping[str, Any]
    seconds: float = CHECKPOINT_SECONDS

    def attach(self, model: ChannelPPO) -> None:
        """Go on from the file if it is there; from now on write it after updates."""
        self._model, self._written = model, time.monotonic()
        self._state = TrainingState(
            model=model.policy.network,
            trainable=dict(model.policy.network.named_parameters()),
            optimizer=model.policy.optimizer,
            identity=dict(self.identity),
            steps_per_epoch=1,
        )
        if self.path.is_file():
            self._state.restore(self.path)
            self._restore(model)
        told = model.progress

        def progress(record: dict[str, Any]) -> None:
            if told is not None:
                told(record)
            if time.monotonic() - self._written >= self.seconds:
                self.write()

        model.progress = progress

    def _restore(self, model: ChannelPPO) -> None:
        where, env = str(self.path), model.competitors
        notes = checked(self._state.done.notes, NOTES, where)
        model.num_rollouts, env.networks_before = notes["updates"], notes["networks"]
        model.history = notes["history"]
        env.competition.ledgers = notes["ledgers"]
        env.competition.multipliers = notes["multipliers"]
        env.competition.block = model.num_rollouts

    def write(self) -> None:
        """Write the state; the episodes of the last update go into the ledgers."""
        model, competition = self._model, self._model.competitors.competition
        competition.begin_block(model.num_rollouts)
        self._state.done.notes = {
            "updates": model.num_rollouts,
            "networks": model.num_networks,
            "history": [{**record, "greedy_masks": {}} for record in model.history],
            "ledgers": {name: asdict(each) for name, each in competition.ledgers.items()},
            "multipliers": {name: asdict(each) for name, each in competition.multipliers.items()},
        }
        self._state.write(self.path, {})
        self._written = time.monotonic()


NOTES = {
    "updates": int,
    "networks": int,
    "history": list[Any],
    "ledgers": dict[str, SelfCompetitionLedger],
    "multipliers": dict[str, LagrangianMultiplier],
}
"""What a checkpoint keeps beside network and averages."""


def train_agent(
    env_factories: Sequence[EnvFactory],
    graphs: Sequence[StructureGraph],
    config: AgentConfig,
    *,
    total_networks: int,
    threads: bool = False,
    initial: TrainedPolicy | None = None,
    tensorboard: Path | None = None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> TrainingResult:
    """Train a policy until another update would run more pruned networks than are allowed.

    Args:
        env_factories: one an environment. Environment i has
            ``episodes_per_subset=config.episodes_per_update``, ``first_episode=i`` and
            ``episode_stride`` = number of environments; its evaluator is its own.
        graphs: the environments' networks; a graph id is a position here.
        config: the options.
        total_networks: pruned networks that may be run.
        threads: step the environments at once, for evaluators that wait for other processes. With
            episodes of one step the result is that of one environment, to the last bit.
        initial: policy to start from, of the same sizes; None = an untrained one.
        tensorboard: folder for learning curves.
        progress: called with the record of each update.
        checkpoint: where the state is kept; an equal call goes on from it, to the same result. Only
            without surrogate and offsets, which are not kept.

    Raises:
        ConfigError: options that contradict each other.
        ArtefactError: the checkpoint is damaged or of another training.
    """
    venv = make_vec_env(env_factories, threads=threads)
    try:
        model = build_model(venv, graphs, config)
        if initial is not None:
            _start_from(model, initial)
        model.set_logger(_logger(tensorboard))
        model.max_networks = total_networks
        model.progress = progress
        if checkpoint is not None:
            checkpoint.attach(model)
        model.learn(_NO_LIMIT, log_interval=1)
        if checkpoint is not None:
            checkpoint.write()
        return _result(model, config)
    finally:
        venv.close()


_NO_LIMIT = 2**62
"""Steps: training ends when the networks are used up."""


def make_vec_env(env_factories: Sequence[EnvFactory], *, threads: bool = False) -> VecEnv:
    """Return the environments, stepped one after another or all at once."""
    return (ThreadedVecEnv if threads else DummyVecEnv)(list(env_factories))


def build_model(venv: VecEnv, graphs: Sequence[StructureGraph], config: AgentConfig) -> ChannelPPO:
    """Return the untrained algorithm over ``venv``, the rewards made in this process."""
    wrapped = SelfCompetitionVecEnv(
        venv, config.reward, episodes_per_update=config.episodes_per_update
    )
    steps = _steps_per_episode(graphs) if config.per_group else 1
    return ChannelPPO(
        wrapped,
        policy_kwargs={
            "thresholds": {
                number: BudgetThreshold.of(graph, config.max_memory, config.max_latency)
                for number, graph in enumerate(graphs)
            },
            "network_config": config.network,
            "constraint": config.reward.constraint,
            "initial_cost_ratio": config.initial_cost_ratio,
            "row_by_row": isinstance(venv, ThreadedVecEnv),
        },
        num_steps=steps * config.episodes_per_update // venv.num_envs,
        config=config.ppo,
        seed=config.seed,
    )


def _steps_per_episode(graphs: Sequence[StructureGraph]) -> int:
    counts = {len(graph.free_groups) for graph in graphs}
    if len(counts) != 1:
        msg = (
            f"per_group=True needs networks with equally many groups, these have {sorted(counts)}: "
            "train them with per_group=False"
        )
        raise ConfigError(msg)
    return counts.pop()


def _start_from(model: ChannelPPO, initial: TrainedPolicy) -> None:
    ours, theirs = model.policy.network_config, initial.network.config
    if ours != theirs:
        odd = [
            item.name
            for item in dataclasses.fields(ours)
            if getattr(ours, item.name) != getattr(theirs, item.name)
        ]
        msg = f"the policy to start from has another {', '.join(odd)} than the options ask for"
        raise ConfigError(msg)
    model.policy.network.load_state_dict(initial.network.state_dict())


def _logger(tensorboard: Path | None) -> Logger:
    """Return where learning curves go; ``configure`` would leave a temporary folder behind."""
    if tensorboard is None:
        return Logger(folder=None, output_formats=[])
    return Logger(str(tensorboard), [TensorBoardOutputFormat(str(tensorboard))])


def _result(model: ChannelPPO, config: AgentConfig) -> TrainingResult:
    env = model.competitors
    env.competition.begin_block(env.competition.block + 1)  # records the last update's episodes
    record = {
        "config": dataclasses.asdict(config),
        "updates": len(model.history),
        "networks_evaluated": env.num_networks,
        "temperature": model.policy.temperature,
    }
    return TrainingResult(
        policy=TrainedPolicy(model.policy.network.eval(), record),
        history=tuple(model.history),
        competition=env.competition,
        offsets={
            graph_id: model.policy.offsets(graph_id).detach().cpu().numpy()
            for graph_id in model.policy.thresholds
        },
        surrogate=model.surrogate,
        networks_evaluated=env.num_networks,
    )
