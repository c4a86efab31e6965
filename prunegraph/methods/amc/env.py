"""AMC's environment: one group's width after the other, and a wall that keeps the budget."""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from prunegraph.core.budget import Budget
from prunegraph.core.masks import BoolArray, ChannelMask, FloatArray, IntArray
from prunegraph.graph.graph import Group, StructureGraph

LEAST_SHARE = 0.2
"""Least share of a group that the agent keeps, as in AMC; less where the budget asks for less."""

OBSERVATION_NAMES: tuple[str, ...] = (
    *("t", "n", "c", "h", "w", "stride", "k"),
    *("macs", "reduced", "rest", "last_action"),
)
"""The eleven features of AMC's section 3.2, each scaled to [0, 1] over the groups."""


class WidthEnv(gymnasium.Env[FloatArray, FloatArray]):
    """An episode sets the share that each group keeps, in order of execution; then it is scored.

    He et al. 2018 (ECCV, "AMC: AutoML for Model Compression and Acceleration on Mobile Devices"),
    section 3.2 and algorithm 1, with groups in the place of layers. The wall: a share is cut to
    what the budget leaves if all later groups keep their least. The mask is then filled up, so that
    every network is of exactly the budget: units that the agent removed come back in the order
    of rank within the group as long as they fit. Rewards are 0 until the last step.

    Args:
        graph: the structure.
        importance: ``[N]``, the highest of each group stay.
        budget: what may remain.
        project: from scores ``[N]`` to a mask within the budget.
        evaluate: returns the reward of a mask.

    Attributes:
        groups: those that may be pruned, one a step.
        widths: kept units of the groups decided so far.
    """

    def __init__(
        self,
        graph: StructureGraph,
        importance: FloatArray,
        budget: Budget,
        project: Callable[[FloatArray], ChannelMask],
        evaluate: Callable[[ChannelMask], float],
    ) -> None:
        self.graph = graph
        self.budget = budget
        self.groups = [group for group in graph.groups if group.frozen is None]
        self.widths: list[int] = []
        self._project = project
        self._evaluate = evaluate
        self._orders = [
            group.units[np.argsort(-importance[group.units], kind="stable")]
            for group in self.groups
        ]
        least = [
            max(group.min_keep, int(np.ceil(LEAST_SHARE * len(group.units))))
            for group in self.groups
        ]
        fits = self._fits(least)
        self._least = least if fits else [group.min_keep for group in self.groups]
        self._features = _static_features(graph, self.groups)
        self._macs = np.array([graph.class_costs()[0][group.units].sum() for group in self.groups])
        self._last_action = 1.0
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (len(OBSERVATION_NAMES),))
        self.action_space = gymnasium.spaces.Box(LEAST_SHARE if fits else 0.0, 1.0, (1,))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Begin with the dense network."""
        super().reset(seed=seed)
        self.widths, self._last_action = [], 1.0
        return self._observe(), {}

    def step(self, action: FloatArray) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        """Set the share that the next group keeps."""
        number = len(self.widths)
        size = len(self.groups[number].units)
        wanted = max(round(float(action[0]) * size), self._least[number])
        self.widths.append(min(wanted, self.wall()))
        self._last_action = self.widths[-1] / size
        done = len(self.widths) == len(self.groups)
        reward = self._evaluate(self.mask()) if done else 0.0
        return self._observe(), reward, done, False, {}

    def wall(self) -> int:
        """Return the most units that the next group may keep so that the budget can be met."""
        number = len(self.widths)
        rest = self._least[number + 1 :]
        choices = range(self._least[number], len(self.groups[number].units) + 1)
        too_many = bisect_left(
            choices, True, key=lambda width: not self._fits([*self.widths, width, *rest])
        )
        return max(choices[0], choices[0] + too_many - 1)

    def mask(self) -> ChannelMask:
        """Return the mask of a finished episode."""
        keep, rank = self._keep(self.widths), np.zeros(self.graph.num_units)
        for order in self._orders:
            rank[order] = 1.0 - (np.arange(len(order)) + 0.5) / len(order)
        return self._project((rank + keep).astype(np.float32))

    def _keep(self, widths: list[int]) -> BoolArray:
        keep = np.ones(self.graph.num_units, dtype=bool)
        for order, width in zip(self._orders, widths, strict=True):
            keep[order[width:]] = False
        return keep

    def _fits(self, widths: list[int]) -> bool:
        return self.graph.cost_ratio(self._keep(widths), self.budget) <= 1.0

    def _observe(self) -> FloatArray:
        """Return the state of the group to decide; of the last one when all are decided."""
        number = min(len(self.widths), len(self.groups) - 1)
        total = max(float(self._macs.sum()), 1.0)
        shares = np.array(self.widths) / [len(g.units) for g in self.groups[: len(self.widths)]]
        reduced = float(((1.0 - shares) * self._macs[: len(shares)]).sum()) / total
        rest = float(self._macs[number + 1 :].sum()) / total
        state = np.array([*self._features[number], reduced, rest, self._last_action])
        return state.clip(0.0, 1.0).astype(np.float32)


def _static_features(graph: StructureGraph, groups: list[Group]) -> FloatArray:
    """Return ``[groups, 8]`` what does not change, each column scaled to [0, 1].

    Layers are described by the first operation that writes the group. Structure graphs know the
    number of output positions alone: height and width are its square root.
    """
    macs = graph.class_costs()[0]
    rows = []
    for number, group in enumerate(groups):
        op = next((op for op in graph.ops if _writes(op.out_units, group)), None)
        shape = [0.0] * 5
        if op is not None:
            side = float(np.sqrt(op.spatial))
            shape = [float(op.in_units.size), side, side, float(op.stride), float(op.kernel_size)]
        rows.append([number, len(group.units), *shape, macs[group.units].sum()])
    table = np.array(rows, dtype=np.float64).reshape(len(groups), 8)
    low, high = table.min(axis=0), table.max(axis=0)
    scaled: FloatArray = ((table - low) / np.maximum(high - low, 1e-12)).astype(np.float32)
    return scaled


def _writes(units: IntArray, group: Group) -> bool:
    return bool(np.isin(group.units[0], units))
