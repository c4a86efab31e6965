"""The structure graph as a PyG graph: channel nodes and op nodes, edges between the two only.

Channel -> op -> channel paths replace the complete bipartite graph between the channels of
successive layers, so edges grow as the *sum* of the widths and not as their products.
"""

import numpy as np
import torch
from torch_geometric.data import Data

from prunegraph.core.masks import IntArray
from prunegraph.graph.features import op_features
from prunegraph.graph.graph import StructureGraph

RELATION_NAMES: tuple[str, ...] = ("reads", "writes", "read_by", "written_by")
"""The kinds of edges, in the order of ``edge_attr``'s columns.

- ``reads``: input channel -> op;
- ``writes``: op -> output channel;
- ``read_by``: op -> input channel, the reverse of ``reads``;
- ``written_by``: output channel -> op, the reverse of ``writes``.
"""


def to_pyg(graph: StructureGraph) -> Data:
    """Return the channel + op graph of a network, without channel features.

    Args:
        graph: the structure.

    Returns:
        PyG ``Data`` with nodes 0 .. N-1 = prunable units and N .. N+M-1 = ops.

    Shapes:
        - ``edge_index [2, E]`` int64: each op has one edge with every distinct unit that it reads
          and every one that it writes, and the reverse of each
        - ``edge_attr [E, 4]`` float32: one-hot over ``RELATION_NAMES``
        - ``op_x [M, F_op]`` float32: see ``features.OP_FEATURE_NAMES``
        - ``group_of [N]`` int64, ``free [N]`` bool
        - ``num_channels`` = N, ``num_ops`` = M
    """
    num_channels, num_ops = graph.num_units, len(graph.ops)
    reads = _edges([np.unique(op.read_units) for op in graph.ops], num_channels)
    writes = _edges([np.unique(op.out_units) for op in graph.ops], num_channels)
    edges = [reads, writes[::-1], reads[::-1], writes]  # in the order of RELATION_NAMES
    relation = np.repeat(np.arange(len(edges)), [part.shape[1] for part in edges])
    return Data(
        edge_index=torch.from_numpy(np.concatenate(edges, axis=1)),
        edge_attr=torch.eye(len(RELATION_NAMES))[torch.from_numpy(relation)],
        op_x=torch.from_numpy(op_features(graph)),
        group_of=torch.from_numpy(graph.group_of),
        free=torch.from_numpy(graph.free),
        num_channels=num_channels,
        num_ops=num_ops,
        num_nodes=num_channels + num_ops,
    )


def _edges(units_of_op: list[IntArray], num_channels: int) -> IntArray:
    """Return ``[2, E]`` channel node, op node."""
    op_nodes = num_channels + np.arange(len(units_of_op))
    sizes = [units.size for units in units_of_op]
    channels = np.concatenate([*units_of_op, np.zeros(0, dtype=np.int64)])
    return np.stack([channels, np.repeat(op_nodes, sizes)]).astype(np.int64)
