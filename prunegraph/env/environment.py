"""The constrained decision process of pruning a network's channels, for Gymnasium.

The environment only sequences: raw bits, a mask that meets the budget, its evaluation. Its reward
is what the mask reaches; whoever trains an agent compares that with the past (``SelfCompetition``).
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.error import ResetNeeded

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from prunegraph.core.masks import BoolArray, ChannelMask, FloatArray, pack_bits, unpack_bits
from prunegraph.core.outcome import Outcome
from prunegraph.env.config import EnvConfig, episode_generator, pair_of_episode, subset_seed
from prunegraph.env.task import Pair, PruningTask, make_pair
from prunegraph.graph.features import CONTEXT_NAMES, FEATURE_BOUND
from prunegraph.rewards import Episode

Observation = dict[str, FloatArray]
Action = npt.NDArray[Any]


class ChannelPruningEnv(gymnasium.Env[Observation, Action]):
    """Choose which channels of a network stay.

    One step decides on the whole network, or with ``per_group`` on one group: then the reward comes
    with the last step. Action bits outside the action mask are ignored. ``reset(seed=...)`` starts
    all over.

    The ``info`` of a step with a reward holds ``raw_cost`` (a ``Cost``), ``raw_cost_ratio`` and
    ``cost_ratio`` (over the budget), ``repaired`` (share of free bits flipped), ``overshoot``,
    ``outcome``, ``mask_digest``, ``mask_bits`` (see ``core.masks.unpack_bits``) and ``result`` (an
    ``Episode`` for ``SelfCompetition.score``). Every ``info`` holds ``graph_id``, ``pair``,
    ``budget``, ``block`` (number of the image subset) and ``episode_number``.

    Args:
        tasks: one or several networks; their position is the graph id.
        config: the options.

    Shapes:
        - observation: ``graph_id [1]``, ``node_features [N_max * F]``, ``node_mask [N_max]``,
          ``action_mask [N_max]``, ``context [K]`` in the order of ``CONTEXT_NAMES``
        - action: ``[N_max]`` bits, 1 = keep

    Raises:
        ConfigError: no tasks, equal names, features that do not fit, or nothing to prune.
        BudgetError: a budget that cannot be met.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own declaration

    def __init__(
        self, tasks: PruningTask | Sequence[PruningTask], config: EnvConfig | None = None
    ) -> None:
        self.tasks = (tasks,) if isinstance(tasks, PruningTask) else tuple(tasks)
        self.config = EnvConfig() if config is None else config
        self.pairs = _make_pairs(self.tasks, self.config.budgets)
        self.num_nodes = max(task.graph.num_units for task in self.tasks)
        space = _observation_space(self.pairs, self.num_nodes)
        self.observation_space = space  # type: ignore[assignment]  # gymnasium types it as Any
        self.action_space = spaces.MultiBinary(self.num_nodes)
        self.seed_in_use = self.config.seed
        self.episode_number = self.config.first_episode
        self._next_episode = self.config.first_episode
        self._pair = self.pairs[0]
        self._keep: BoolArray = np.ones(0, dtype=bool)
        self._num_steps = 0  # made in this episode
        self._steps_left = 0
        self._counts = True

    def beside(self, first_episode: int) -> Self:
        """Return an environment of the same networks that plays other episodes of the same block.

        What both run, this one counts.
        """
        other = copy.copy(self)
        other.config = replace(self.config, first_episode=first_episode)
        other.episode_number = other._next_episode = first_episode
        other._counts = False
        return other

    def seek(self, episode: int) -> None:
        """Go on with the episode of this number at the next ``reset``."""
        self._next_episode = episode

    @property
    def networks_evaluated(self) -> int:
        """Pruned networks that the tasks' evaluators ran so far."""
        if not self._counts:
            return 0
        evaluators = {id(task.evaluator): task.evaluator for task in self.tasks}
        return sum(evaluator.num_networks for evaluator in evaluators.values())

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin the next episode."""
        super().reset(seed=seed)
        if options:
            msg = f"unknown reset options {sorted(options)}: there are none"
            raise ConfigError(msg)
        if seed is not None:
            self.seed_in_use = seed
            self._next_episode = self.config.first_episode
        self.episode_number = self._next_episode
        self._next_episode += self.config.episode_stride
        self.np_random = episode_generator(self.seed_in_use, self.episode_number)
        index = pair_of_episode(
            self.seed_in_use, self.episode_number, len(self.pairs), self.config.episodes_per_pair
        )
        self._pair = self.pairs[index]
        self._keep = np.ones(self._pair.task.graph.num_units, dtype=bool)
        self._num_steps = 0
        self._steps_left = len(self._pair.steps) if self.config.per_group else 1
        return self._observation(), self._identity()

    @property
    def block(self) -> int:
        """Number of the image subset that this episode is scored on."""
        return self.config.block_of(self.episode_number)

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take the keep bits of the whole network, or of the group that is open."""
        if self._steps_left == 0:
            msg = "the episode is over: call reset() before step()"
            raise ResetNeeded(msg)
        open_units = self._open_units()
        self._keep[open_units] = self._read(action)[open_units]
        self._num_steps += 1
        self._steps_left -= 1
        if self._steps_left:
            return self._observation(), 0.0, False, False, self._identity()
        reward, info = self._finish()
        return self._observation(), reward, True, False, info

    def _finish(self) -> tuple[float, dict[str, Any]]:
        """Evaluate the bits of the whole network; return the reward and its ``info``."""
        raw, graph = self._keep, self._pair.task.graph
        mask, repaired = graph.repair(raw, self._pair.budget, self.np_random)
        self._keep = mask.keep.copy()
        outcome = self._evaluate(self._pair, mask, self.block)
        result = self._episode(self._pair, mask, outcome, raw)
        info = {
            **self._identity(),
            "raw_cost": graph.cost(raw),
            "raw_cost_ratio": result.raw_cost_ratio,
            "cost_ratio": result.cost_ratio,
            "repaired": repaired,
            "overshoot": result.overshoot,
            "outcome": outcome,
            "mask_digest": outcome.digest,
            "mask_bits": result.bits,
            "result": result,
        }
        return result.metric(self.config.metric), info

    def measure(self, pair_name: str, bits: str, block: int) -> Episode:
        """Return the figures of a packed mask on a block's images, as if it had been played."""
        pair = next(pair for pair in self.pairs if pair.name == pair_name)
        graph = pair.task.graph
        mask = graph.mask(unpack_bits(bits, graph.num_units))
        outcome = self._evaluate(pair, mask, block)
        return self._episode(pair, mask, outcome, mask.keep)

    def _evaluate(self, pair: Pair, mask: ChannelMask, block: int) -> Outcome:
        evaluator, size = pair.task.evaluator, self.config.subset_size
        if size is None:
            return evaluator.evaluate(mask)
        subset = evaluator.draw_subset(size, subset_seed(self.seed_in_use, block))
        return evaluator.evaluate(mask, subset)

    def _episode(self, pair: Pair, mask: ChannelMask, outcome: Outcome, raw: BoolArray) -> Episode:
        graph = pair.task.graph
        return Episode(
            pair=pair.name,
            accuracy=outcome.accuracy,
            kl=outcome.kl,
            soft_accuracy=outcome.soft_accuracy,
            raw_cost_ratio=graph.cost_ratio(raw, pair.budget),
            cost_ratio=graph.cost_ratio(mask.keep, pair.budget),
            bits=pack_bits(mask.keep),
        )

    def _read(self, action: Action) -> BoolArray:
        """Return the keep bits ``[N]`` of an action ``[N_max]``."""
        bits = np.asarray(action)
        if bits.shape != (self.num_nodes,):
            msg = f"an action of shape {bits.shape} does not fit: it needs {self.num_nodes} bits"
            raise ConfigError(msg)
        keep: BoolArray = bits[: self._pair.task.graph.num_units] > 0.5
        return keep

    def _open_units(self) -> BoolArray:
        """Return the units ``[N]`` that the next step decides on (at the end: the last did)."""
        pair = self._pair
        if not self.config.per_group:
            return pair.at_stake.copy()
        step = min(self._num_steps, len(pair.steps) - 1)
        in_group: BoolArray = pair.task.graph.group_of == pair.steps[step]
        return pair.at_stake & in_group

    def _observation(self) -> Observation:
        pair, num_units = self._pair, self._pair.task.graph.num_units
        features = np.zeros((self.num_nodes, pair.features.shape[1]), dtype=np.float32)
        features[:num_units] = pair.features
        node_mask = np.zeros(self.num_nodes, dtype=np.float32)
        node_mask[:num_units] = 1.0
        action_mask = np.zeros(self.num_nodes, dtype=np.float32)
        action_mask[:num_units] = self._open_units()
        return {
            "graph_id": np.array([pair.graph_id], dtype=np.float32),
            "node_features": features.reshape(-1),
            "node_mask": node_mask,
            "action_mask": action_mask,
            "context": self._context(),
        }

    def _context(self) -> FloatArray:
        pair = self._pair
        limits = pair.budget.as_dict()
        values = (
            limits.get("keep_macs", 1.0),
            limits.get("keep_params", 1.0),
            pair.remaining_share(self._keep),
            self._num_steps / (self._num_steps + self._steps_left),
        )
        return np.clip(np.array(values, dtype=np.float32), -FEATURE_BOUND, FEATURE_BOUND)

    def _identity(self) -> dict[str, Any]:
        return {
            "graph_id": self._pair.graph_id,
            "pair": self._pair.name,
            "budget": self._pair.budget.as_dict(),
            "block": self.block,
            "episode_number": self.episode_number,
        }


def _make_pairs(
    tasks: tuple[PruningTask, ...], budgets: tuple[Budget, ...] | None
) -> tuple[Pair, ...]:
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) != len(names):
        msg = f"tasks named {names}: give at least one, and each another name"
        raise ConfigError(msg)
    pairs = tuple(
        make_pair(graph_id, task, budget)
        for graph_id, task in enumerate(tasks)
        for budget in (budgets or (task.budget,))
    )
    if len({pair.name for pair in pairs}) < len(pairs):
        msg = f"budgets {budgets} hold two that differ by less than ledgers tell apart: drop one"
        raise ConfigError(msg)
    widths = sorted({pair.features.shape[1] for pair in pairs})
    if len(widths) > 1:
        msg = f"node features of {widths} columns: all networks need the same features"
        raise ConfigError(msg)
    return pairs


def _observation_space(pairs: tuple[Pair, ...], num_nodes: int) -> spaces.Dict:
    num_features = pairs[0].features.shape[1]
    largest_id = max(pair.graph_id for pair in pairs)
    return spaces.Dict(
        {
            "graph_id": spaces.Box(0.0, max(largest_id, 1), (1,)),
            "node_features": spaces.Box(-FEATURE_BOUND, FEATURE_BOUND, (num_nodes * num_features,)),
            "node_mask": spaces.Box(0.0, 1.0, (num_nodes,)),
            "action_mask": spaces.Box(0.0, 1.0, (num_nodes,)),
            "context": spaces.Box(-FEATURE_BOUND, FEATURE_BOUND, (len(CONTEXT_NAMES),)),
        }
    )
