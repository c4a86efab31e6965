"""Graph attention over channels and operations."""

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import GATv2Conv


class Convolution(GATv2Conv):
    """GATv2 without the code that PyG generates for TorchScript.

    A process leaves two files of such code in the temporary folder, for ever. What is computed, and
    the time it takes, is the same.
    """

    def _set_jittable_templates(self, raise_on_error: bool = False) -> None:
        del raise_on_error


class RelationalAttentionLayer(nn.Module):
    """One round of messages: a GATv2 convolution a relation, summed, then a feed-forward block.

    GATv2 (Brody et al. 2022, "How Attentive are Graph Attention Networks?", equation 7) uses edge
    features in the attention weights but not in the messages. Here the relation decides what a
    message *means* (an input channel of an operation, or an output channel), so each relation has
    its own convolution.

    Args:
        hidden: width H.
        num_relations: R.
        heads: attention heads; must divide ``hidden``.

    Shapes:
        - nodes ``[N + M, H]``, edges ``R`` times ``[2, E_r]`` -> ``[N + M, H]``
    """

    def __init__(self, hidden: int, num_relations: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.convolutions = nn.ModuleList(
            Convolution(hidden, hidden // heads, heads=heads, add_self_loops=False)
            for _ in range(num_relations)
        )
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(hidden),
            nn.Linear(hidden, 2 * hidden),
            nn.GELU(),
            nn.Linear(2 * hidden, hidden),
        )

    def forward(self, nodes: Tensor, edges: list[Tensor]) -> Tensor:
        """Return the nodes after one round."""
        normed = self.norm(nodes)
        for convolution, edge_index in zip(self.convolutions, edges, strict=True):
            if edge_index.shape[1]:
                nodes = nodes + convolution(normed, edge_index)  # [N + M, H]
        result: Tensor = nodes + self.feed_forward(nodes)
        return result


class ChannelGraphEncoder(nn.Module):
    """Embeds the channels of a channel + op graph; takes a PyG ``Data`` alone, of any size.

    Args:
        num_features: F, channel features.
        num_op_features: op features.
        num_relations: R, width of ``edge_attr`` (one-hot).
        hidden: H.
        layers: rounds of messages; two carry what a channel's operation and the channels at its
            other end hold.
        heads: attention heads.
        use_edges: False = no messages at all (an ablation).
        shuffle_edges: the channels of a graph swap their edges by chance, the same way each time.

    Shapes:
        - data with ``x [N, F]``, ``op_x [M, F_op]``, ``edge_index [2, E]``, ``edge_attr [E, R]``
          -> ``[N, H]``
    """

    def __init__(
        self,
        *,
        num_features: int,
        num_op_features: int,
        num_relations: int,
        hidden: int,
        layers: int,
        heads: int,
        use_edges: bool = True,
        shuffle_edges: bool = False,
    ) -> None:
        super().__init__()
        self.use_edges, self.shuffle_edges = use_edges, shuffle_edges
        self.channel_input = nn.Linear(num_features, hidden)
        self.op_input = nn.Linear(num_op_features, hidden)
        self.layers = nn.ModuleList(
            RelationalAttentionLayer(hidden, num_relations, heads) for _ in range(layers)
        )
        self.output_norm = nn.LayerNorm(hidden)

    def forward(self, data: Data) -> Tensor:
        """Return channel embeddings ``[N, H]``."""
        nodes = torch.cat([self.channel_input(data.x), self.op_input(data.op_x)])  # [N + M, H]
        edges = self._edges_by_relation(data)
        for layer in self.layers:
            nodes = layer(nodes, edges)
        embeddings: Tensor = self.output_norm(nodes[: data.num_channels])
        return embeddings

    def _edges_by_relation(self, data: Data) -> list[Tensor]:
        if not self.use_edges:
            return [data.edge_index[:, :0]] * data.edge_attr.shape[1]
        edges = _shuffled(data) if self.shuffle_edges else data.edge_index
        return [edges[:, column > 0] for column in data.edge_attr.T]


def _shuffled(data: Data) -> Tensor:
    """Return the edges ``[2, E]`` with the channels of each graph permuted by chance."""
    parts, first = [], 0
    for count in data.channel_graph.bincount().tolist():
        order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
        parts.append(first + order)
        first += count
    ops = torch.arange(data.num_channels, data.num_channels + data.num_ops)
    moved: Tensor = torch.cat([*parts, ops]).to(data.edge_index.device)[data.edge_index]
    return moved
