"""A toy pruning environment whose best mask is known and which no single node feature reveals.

Each channel has a random sign ``u``. In half of the groups a second sign ``v`` is shown beside it,
and a channel is worth keeping if ``u * v = 1``. In the others ``v = 0`` and it is worth keeping if
``u * w = 1``, where ``w`` is shown at the channels of the group at the other end of the operation
that consumes the channel. So each feature alone is independent of the best mask, a policy that
looks at nodes only can get about half of it right, and one that looks along the edges all of it.
The signs are drawn anew again and again, so nothing can be memorised. The prior, ``start``, is 0:
it tells nothing here.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from prunegraph.core.budget import Budget
from prunegraph.core.masks import BoolArray, ChannelMask, FloatArray, IntArray, pack_bits
from prunegraph.core.outcome import Outcome
from prunegraph.graph.costs.macs import MACS, PARAMS, CostModel, CostTerm
from prunegraph.graph.features import CONTEXT_NAMES, FEATURE_BOUND
from prunegraph.graph.graph import Group, OpNode, StructureGraph
from prunegraph.rewards import Episode

TOY_FEATURE_NAMES = ("u", "v", "w", "noise", "start")

Observation = dict[str, FloatArray]


def toy_graph(widths: Sequence[int], spatial: Sequence[int]) -> StructureGraph:
    """Return the structure of a chain of convolutions.

    Args:
        widths: channels of each prunable group, even, in order of execution.
        spatial: output positions of each convolution, one more than groups.
    """
    sizes = [1, *widths, 2]  # the frozen input and output groups stand at the ends
    starts = np.cumsum([0, *sizes])
    units = [np.arange(starts[k], starts[k + 1]) for k in range(len(sizes))]
    last = len(sizes) - 1
    ops = tuple(_convolution(k, units[k], units[k + 1], spatial[k]) for k in range(last))
    groups = tuple(
        Group(
            name=f"conv{k}",
            units=ids,
            members=_members(k, last),
            frozen=_why_frozen(k, last),
        )
        for k, ids in enumerate(units)
    )
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    terms = [
        CostTerm(kind=kind, coefficient=coefficient, axes=(op.out_units, op.in_units), name=name)
        for op in ops
        for kind, coefficient, name in (
            (MACS, op.macs_coefficient, ""),
            (PARAMS, 1.0, f"{op.name}.weight"),
        )
    ]
    return StructureGraph(
        num_units=int(starts[-1]),
        groups=groups,
        group_of=group_of,
        frozen=np.isin(group_of, (0, last)),
        ops=ops,
        frozen_ops=(),
        param_units={f"{op.name}.weight": {0: op.out_units, 1: op.in_units} for op in ops},
        gathers={},
        cost_model=CostModel(int(starts[-1]), terms),
        summed=np.zeros(int(starts[-1]), dtype=bool),
    )


def _members(position: int, last: int) -> tuple[str, ...]:
    produced = (f"conv{position}.weight:0",) if position else ()
    consumed = (f"conv{position + 1}.weight:1",) if position < last else ()
    return produced + consumed


def _why_frozen(position: int, last: int) -> str | None:
    return {0: "input of the network", last: "output of the network"}.get(position)


def _convolution(position: int, inputs: IntArray, outputs: IntArray, spatial: int) -> OpNode:
    return OpNode(
        name=f"conv{position + 1}",
        kind="conv",
        in_units=inputs,
        out_units=outputs,
        macs_coefficient=float(spatial),
        kernel_size=1,
        stride=1,
        groups=1,
        depthwise=False,
        spatial=spatial,
        param=f"conv{position + 1}.weight",
        depth=position,
    )


def toy_graphs() -> tuple[StructureGraph, ...]:
    """Return three chains of different widths and depths."""
    return (
        toy_graph((4, 4, 4, 4), (4, 4, 2, 2, 1)),
        toy_graph((6, 4, 4, 2), (2, 2, 2, 1, 1)),
        toy_graph((4, 4, 2, 4, 6, 4), (4, 4, 2, 2, 2, 1, 1)),
    )


class ToyPruningEnv(gymnasium.Env[Observation, np.ndarray[Any, Any]]):
    """One-step episodes: see a network, return keep bits, get the share of right ones.

    The raw bits are repaired to the budget, which is the cost of the best mask. Networks, signs and
    repairs follow from (seed, number of the episode), as in ``env.ChannelPruningEnv``.

    Args:
        graphs: the networks; each episode draws one.
        repeat: episodes with the same network and signs before the next are drawn.
        block: episodes of an update; see ``agent.SelfCompetitionVecEnv``.
        seed: seed before the first ``reset(seed=...)``.
        first_episode: number of the first episode.
        episode_stride: distance between the numbers of two episodes.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own declaration

    def __init__(
        self,
        graphs: Sequence[StructureGraph] | None = None,
        *,
        repeat: int = 1,
        block: int = 16,
        seed: int = 0,
        first_episode: int = 0,
        episode_stride: int = 1,
    ) -> None:
        self.graphs = tuple(graphs) if graphs is not None else toy_graphs()
        self.repeat, self.block_size = repeat, block
        self.seed_in_use = seed
        self.first_episode, self.episode_stride = first_episode, episode_stride
        self.budgets = tuple(best_budget(graph) for graph in self.graphs)
        self.size = max(graph.num_units for graph in self.graphs)
        self.networks_evaluated = 0
        self.episode_number = self._next_episode = first_episode
        self.graph_id = 0
        self.best: BoolArray = np.ones(0, dtype=bool)
        space = spaces.Dict(
            {
                "graph_id": spaces.Box(0.0, max(len(self.graphs) - 1, 1), (1,)),
                "node_features": spaces.Box(
                    -FEATURE_BOUND, FEATURE_BOUND, (self.size * len(TOY_FEATURE_NAMES),)
                ),
                "node_mask": spaces.Box(0.0, 1.0, (self.size,)),
                "action_mask": spaces.Box(0.0, 1.0, (self.size,)),
                "context": spaces.Box(-FEATURE_BOUND, FEATURE_BOUND, (len(CONTEXT_NAMES),)),
            }
        )
        self.observation_space = space  # type: ignore[assignment]  # gymnasium types it as Any
        self.action_space = spaces.MultiBinary(self.size)

    @property
    def graph(self) -> StructureGraph:
        """The network of this episode."""
        return self.graphs[self.graph_id]

    @property
    def budget(self) -> Budget:
        """What may remain of it."""
        return self.budgets[self.graph_id]

    def seek(self, episode: int) -> None:
        """Go on with the episode of this number at the next ``reset``."""
        self._next_episode = episode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin the next episode."""
        super().reset(seed=seed)
        if seed is not None:
            self.seed_in_use, self._next_episode = seed, self.first_episode
        self.episode_number = self._next_episode
        self._next_episode += self.episode_stride
        draw = np.random.default_rng([self.seed_in_use, self.episode_number // self.repeat, 0])
        self.np_random = np.random.default_rng([self.seed_in_use, self.episode_number, 1])
        self.graph_id = int(draw.integers(len(self.graphs)))
        features, self.best = draw_signs(self.graph, draw)
        return self._observation(features), self._identity()

    def _identity(self) -> dict[str, Any]:
        return {
            "pair": f"toy{self.graph_id}",
            "budget": self.budget.as_dict(),
            "block": self.episode_number // self.block_size,
            "best": self.best.copy(),
        }

    def _observation(self, features: FloatArray) -> Observation:
        graph = self.graph
        padded = np.zeros((self.size, features.shape[1]), dtype=np.float32)
        padded[: graph.num_units] = features
        node_mask = np.zeros(self.size, dtype=np.float32)
        node_mask[: graph.num_units] = 1.0
        action_mask = np.zeros(self.size, dtype=np.float32)
        action_mask[: graph.num_units] = graph.free
        context = np.zeros(len(CONTEXT_NAMES), dtype=np.float32)
        context[:3] = (self.budget.as_dict()["keep_macs"], 1.0, 1.0)
        return {
            "graph_id": np.array([self.graph_id], dtype=np.float32),
            "node_features": padded.reshape(-1),
            "node_mask": node_mask,
            "action_mask": action_mask,
            "context": context,
        }

    def step(
        self, action: np.ndarray[Any, Any]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Score keep bits; the episode ends."""
        graph = self.graph
        raw = (action[: graph.num_units] > 0) | graph.frozen
        mask, repaired = graph.repair(raw, self.budget, self.np_random)
        self.networks_evaluated += 1
        limit = graph.limits(self.budget)[0]
        accuracy = toy_accuracy(graph, self.best, mask.keep)
        result = Episode(
            pair=f"toy{self.graph_id}",
            accuracy=accuracy,
            raw_cost_ratio=graph.cost(raw).macs / limit,
            cost_ratio=graph.cost(mask).macs / limit,
            bits=pack_bits(mask.keep),
        )
        info = {**self._identity(), "repaired": repaired, "result": result}
        nothing = np.zeros((graph.num_units, len(TOY_FEATURE_NAMES)), dtype=np.float32)
        return self._observation(nothing), accuracy, True, False, info


def best_budget(graph: StructureGraph) -> Budget:
    """Return the cost of the best mask of a toy graph: half of each group."""
    half = np.ones(graph.num_units, dtype=bool)
    for group in graph.groups:
        if group.frozen is None:
            half[group.units[::2]] = False
    allowed = graph.cost(half).macs + 0.5  # not lost when the share is rounded
    return Budget(keep_macs=allowed / graph.dense_cost.macs)


def draw_signs(graph: StructureGraph, rng: np.random.Generator) -> tuple[FloatArray, BoolArray]:
    """Return fresh node features ``[N, 5]`` and the best mask ``[N]`` of a toy graph."""
    features = np.zeros((graph.num_units, len(TOY_FEATURE_NAMES)), dtype=np.float32)
    best = np.ones(graph.num_units, dtype=bool)
    free = [k for k, group in enumerate(graph.groups) if group.frozen is None]
    relational = rng.permutation(free[:-1])[: len(free) // 2]  # the last has no free consumer
    group_sign = np.zeros(len(graph.groups))
    group_sign[relational + 1] = rng.choice([-1.0, 1.0], size=len(relational))
    for position in free:
        units = graph.groups[position].units
        balanced = np.resize([-1.0, 1.0], len(units))
        own, right = rng.permutation(balanced), rng.permutation(balanced)
        if position in relational:
            right = own * group_sign[position + 1]
        else:
            features[units, 1] = own * right
        best[units] = right > 0
        features[units, 0] = own
        features[units, 2] = group_sign[position]
    features[:, 3] = np.clip(rng.normal(size=graph.num_units), -FEATURE_BOUND, FEATURE_BOUND)
    return features, best


class KnownMaskEvaluator:
    """Stands in for ``pruning.Evaluator`` where the best mask of a network is known.

    Args:
        graph: the structure.
        best: ``[N]`` the best mask.
        noise: largest change of the accuracy by the choice of images.

    Attributes:
        num_networks: masks scored so far.
    """

    def __init__(self, graph: StructureGraph, best: BoolArray, *, noise: float = 0.02) -> None:
        self.graph, self.best, self.noise = graph, best, noise
        self.num_networks = 0

    def evaluate(self, mask: ChannelMask, subset: Tensor | None = None) -> Outcome:
        """Return how many bits of a mask are right, a little more or less by the images."""
        self.num_networks += 1
        images = 0.0 if subset is None else float(np.sin(subset.sum().item()))
        accuracy = toy_accuracy(self.graph, self.best, mask.keep) + self.noise * images
        return Outcome(
            accuracy=accuracy,
            loss=1.0 - accuracy,
            kl=None,
            num_images=1000 if subset is None else len(subset),
            cost=self.graph.cost(mask),
            digest=mask.digest(),
            seconds=0.0,
        )

    def draw_subset(self, size: int, seed: int) -> Tensor:
        """Return positions among 1,000 images, fixed by ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(1000, generator=generator)[:size]


def toy_accuracy(graph: StructureGraph, best: BoolArray, keep: BoolArray) -> float:
    """Return 1 for the best mask, 1/2 for random bits, 0 for the opposite of the best mask."""
    free = graph.free
    good, bad = best & free, ~best & free
    right = keep[good].mean() if good.any() else 0.0
    wrong = keep[bad].mean() if bad.any() else 0.0
    return float(0.5 * (1.0 + right - wrong))
