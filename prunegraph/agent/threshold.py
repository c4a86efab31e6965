"""Thresholds that make a budget be met, by graph id.

The threshold of a network never changes during a search, so it stays out of the
observation, which stable-baselines3 copies at every step. The policy holds one ``BudgetThreshold``
for each graph id; a saved policy holds none: it is given those of the networks at hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize.elementwise import find_root
from torch_geometric.data import Data

from prunegraph.core.masks import Float64Array
from prunegraph.graph.graph import StructureGraph
from prunegraph.graph.pyg import to_pyg

OTHERS = 2
"""Where the limits of memory and latency stand; before them are those of MACs and params."""

TOLERANCES = {"xatol": 1e-12, "xrtol": 0.0, "fatol": 0.0, "frtol": 0.0}
"""How far a threshold may lie from its solution: a millionth of a millionth of a score."""


@dataclass(frozen=True, eq=False, kw_only=True)
class BudgetThreshold:
    """What the policy knows of a network besides its node features.

    Attributes:
        data: the channel + op graph, without channel features ``x``.
        graph: the structure, for costs and the units that may be removed.
        max_memory: the most bytes of activations that may be alive at once; None = no limit. It is
            the same in all episodes, so observations do not tell it.
        max_latency: the most milliseconds that a forward may take, likewise.
    """

    data: Data
    graph: StructureGraph
    max_memory: int | None = None
    max_latency: float | None = None

    @classmethod
    def of(
        cls,
        graph: StructureGraph,
        max_memory: int | None = None,
        max_latency: float | None = None,
    ) -> "BudgetThreshold":
        """Return the budget_threshold of an analysed network."""
        data = to_pyg(graph)
        return cls(data=data, graph=graph, max_memory=max_memory, max_latency=max_latency)

    @property
    def other_limits(self) -> tuple[float, float]:
        """The limits of memory and latency, infinite where there is none."""
        return self.max_memory or np.inf, self.max_latency or np.inf

    @property
    def num_channels(self) -> int:
        """N, the number of channel nodes."""
        return self.graph.num_units

    def cost_slopes(self, probabilities: Float64Array, limits: Float64Array) -> Float64Array:
        """Return the ``[B, N]`` derivatives of the expected cost by the keep probabilities.

        Of the cost whose limit is nearest; 0 where frozen.

        Args:
            probabilities: ``[B, N]`` keep probabilities; those of frozen units are taken as 1.
            limits: ``[B, 4]`` what may remain, as of ``expected_cost_ratios``.
        """
        probabilities = np.where(self.graph.free, probabilities, 1.0)
        nearest = expected_cost_ratios(self.graph, probabilities, limits).argmax(axis=1)
        of_costs = self.graph.cost_model.slopes(probabilities)
        slopes = of_costs[np.arange(len(nearest)), np.minimum(nearest, 1)]
        for column, model in enumerate(self.graph.others, start=OTHERS):
            rows = nearest == column
            if rows.any():
                assert model is not None
                slopes[rows] = model.slopes(probabilities[rows])
        return np.where(self.graph.free, slopes, 0.0)


def with_features(data: Data, features: torch.Tensor) -> Data:
    """Return a graph with channel features ``[N, F]`` as ``x``; everything else is shared."""
    return Data(**{**data.to_dict(), "x": features})


def expected_cost_ratio(
    graph: StructureGraph, probabilities: Float64Array, limits: Float64Array
) -> Float64Array:
    """Return the expected cost over what may remain ``[B]``, of the tightest limit.

    Arguments as of ``expected_cost_ratios``; 1 = the budget is met exactly.
    """
    ratios: Float64Array = expected_cost_ratios(graph, probabilities, limits).max(axis=1)
    return ratios


def expected_cost_ratios(
    graph: StructureGraph, probabilities: Float64Array, limits: Float64Array
) -> Float64Array:
    """Return the expected MACs, params, peak memory and latency over what may remain.

    Args:
        graph: the structure.
        probabilities: ``[B, N]`` keep probabilities.
        limits: ``[B, 4]`` the most MACs, params, bytes and milliseconds that may remain (infinite =
            no limit), or ``[1, 4]`` for all alike.

    Returns:
        ``[B, 4]`` ratios.
    """
    costs = np.zeros((len(probabilities), 4))
    costs[:, :OTHERS] = graph.cost_model.expected(probabilities)
    for column, model in enumerate(graph.others, start=OTHERS):
        if np.isfinite(limits[:, column]).any():
            assert model is not None
            costs[:, column] = model.expected(probabilities)
    ratios: Float64Array = costs / limits
    return ratios


def solve_threshold(
    graph: StructureGraph, scores: Float64Array, limits: Float64Array, temperature: float
) -> Float64Array:
    """Return the threshold at which the expected cost meets the budget.

    Args:
        graph: the structure.
        scores: ``[B, N]`` scores; a unit is kept with probability
            ``sigmoid((score - threshold) / temperature)``, frozen units always.
        limits: ``[B, 4]`` what may remain, as of ``expected_cost_ratios``.
        temperature: above 0.

    Returns:
        ``[B]`` thresholds. A budget that even no free unit at all would break gives the upper end
        of the interval, one that holds the whole network the lower end.
    """
    free = graph.free
    if not free.any():
        return np.zeros(len(scores))
    margin = 20.0 * temperature
    low = scores[:, free].min(axis=1) - margin
    high = scores[:, free].max(axis=1) + margin

    def excess(thresholds: Float64Array, rows: Float64Array) -> Float64Array:
        index = rows.astype(int)
        logits = (scores[index][:, free] - thresholds[:, None]) / temperature
        probabilities = np.ones((len(index), scores.shape[1]))
        probabilities[:, free] = 1.0 / (1.0 + np.exp(-logits))
        return expected_cost_ratio(graph, probabilities, limits[index]) - 1.0

    rows = np.arange(len(scores), dtype=np.float64)
    found = find_root(excess, (low, high), args=(rows,), tolerances=TOLERANCES)
    threshold: Float64Array = np.where(excess(high, rows) > 0.0, high, found.x)
    return np.where(excess(low, rows) <= 0.0, low, threshold)


def join(graphs: Sequence[Data]) -> Data:
    """Join graphs into one without edges between them, all channel nodes before all op nodes.

    Unlike PyG's ``Batch`` the result has the layout of a single graph, so that the encoder needs
    to know one layout only.

    Args:
        graphs: channel + op graphs with ``x``.

    Returns:
        One graph, with ``channel_graph`` ``[N]``: the position in ``graphs`` of each channel.
    """
    channels = np.array([graph.num_channels for graph in graphs])
    ops = np.array([graph.num_ops for graph in graphs])
    groups = np.array([_num_groups(graph) for graph in graphs])
    channel_start = np.cumsum(channels) - channels
    op_start = channels.sum() + np.cumsum(ops) - ops
    group_start = np.cumsum(groups) - groups
    edges = [
        torch.where(
            graph.edge_index < graph.num_channels,
            graph.edge_index + int(first_channel),
            graph.edge_index + int(first_op) - graph.num_channels,
        )
        for graph, first_channel, first_op in zip(graphs, channel_start, op_start, strict=True)
    ]
    group_of = [
        graph.group_of + int(first) for graph, first in zip(graphs, group_start, strict=True)
    ]
    return Data(
        x=torch.cat([graph.x for graph in graphs]),
        op_x=torch.cat([graph.op_x for graph in graphs]),
        edge_index=torch.cat(edges, dim=1),
        edge_attr=torch.cat([graph.edge_attr for graph in graphs]),
        group_of=torch.cat(group_of),
        channel_graph=torch.from_numpy(np.repeat(np.arange(len(graphs)), channels)),
        num_channels=int(channels.sum()),
        num_ops=int(ops.sum()),
    )


def _num_groups(graph: Data) -> int:
    return int(graph.group_of.max()) + 1 if len(graph.group_of) else 0
