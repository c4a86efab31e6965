"""Topologies that the policy knows by graph id, and the threshold that makes a budget be met.

The topology of a network never changes during a search, so it stays out of the observation, which
stable-baselines3 copies at every step. The policy holds one ``Topology`` for each graph id; a saved
policy holds none: it is given those of the networks at hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch_geometric.data import Data

from prunegraph.graph.encode import to_pyg
from prunegraph.graph.structure import StructureGraph
from prunegraph.types import Float64Array

BISECTION_STEPS = 48
"""Halvings of the threshold's interval: a millionth of a millionth of the scores' range remains."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Topology:
    """What the policy knows of a network besides its node features.

    Attributes:
        data: the channel + op graph, without channel features ``x``.
        graph: the structure, for costs and the classes that may be removed.
    """

    data: Data
    graph: StructureGraph

    @classmethod
    def of(cls, graph: StructureGraph) -> "Topology":
        """Return the topology of an analysed network."""
        return cls(data=to_pyg(graph), graph=graph)

    @property
    def num_channels(self) -> int:
        """N, the number of channel nodes."""
        return self.graph.num_classes

    def cost_slopes(self, probabilities: Float64Array, limits: Float64Array) -> Float64Array:
        """Return the ``[N]`` derivatives of the expected cost by the keep probabilities.

        Of MACs or params, whose limit is nearest; 0 where frozen.

        Args:
            probabilities: ``[N]`` keep probabilities.
            limits: ``[2]`` the most MACs and params that may remain (infinite = no limit).
        """
        ratios = expected_cost_ratios(self.graph, probabilities[None], limits[None])[0]
        slopes = self.graph.cost_model.slopes(probabilities)[int(ratios.argmax())]
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
    """Return the expected MACs and params over what may remain.

    The multilinear extension of the cost: widths are replaced by sums of keep probabilities.

    Args:
        graph: the structure.
        probabilities: ``[B, N]`` keep probabilities.
        limits: ``[B, 2]`` the most MACs and params that may remain (infinite = no limit), or
            ``[1, 2]`` for all alike.

    Returns:
        ``[B, 2]`` ratios.
    """
    model = graph.cost_model
    sizes = np.asarray(model.axis_counts @ probabilities.T)  # [A, B]
    sizes = np.vstack([sizes, np.ones((1, len(probabilities)))])
    products = model.coefficient[:, None] * sizes[model.term_axes].prod(axis=1)  # [T, B]
    totals = np.stack([products[model.kind == kind].sum(axis=0) for kind in (0, 1)], axis=1)
    ratios: Float64Array = totals / limits
    return ratios


def solve_threshold(
    graph: StructureGraph, scores: Float64Array, limits: Float64Array, temperature: float
) -> Float64Array:
    """Return the threshold at which the expected cost meets the budget.

    Args:
        graph: the structure.
        scores: ``[B, N]`` scores; a class is kept with probability
            ``sigmoid((score - threshold) / temperature)``, frozen classes always.
        limits: ``[B, 2]`` the most MACs and params that may remain.
        temperature: above 0.

    Returns:
        ``[B]`` thresholds. A budget that even no free class at all would break gives the upper end
        of the interval, one that holds the whole network the lower end.
    """
    free = graph.free
    if not free.any():
        return np.zeros(len(scores))
    margin = 20.0 * temperature
    low = scores[:, free].min(axis=1) - margin
    high = scores[:, free].max(axis=1) + margin
    probabilities = np.ones_like(scores)
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        logits = (scores[:, free] - middle[:, None]) / temperature
        probabilities[:, free] = 1.0 / (1.0 + np.exp(-logits))
        over = expected_cost_ratio(graph, probabilities, limits) > 1.0
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    threshold: Float64Array = (low + high) / 2
    return threshold


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
