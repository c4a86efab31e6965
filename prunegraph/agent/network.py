"""The policy's network: graph encoder, channel head and group head.

It takes channel + op graphs as PyG ``Data`` of any size and knows neither an environment's padding
nor stable-baselines3.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.utils import scatter

from prunegraph.agent.encoder import ChannelGraphEncoder
from prunegraph.agent.threshold import join, with_features
from prunegraph.core.checks import check_range
from prunegraph.core.errors import ConfigError
from prunegraph.core.masks import FloatArray
from prunegraph.graph.features import CONTEXT_NAMES, FEATURE_NAMES, OP_FEATURE_NAMES
from prunegraph.graph.pyg import RELATION_NAMES

PRIOR = "start"
"""The channel feature that scores begin with, if it is read."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """What a policy network is made for, and its size.

    Attributes:
        feature_names: the F channel features, in order; without ``PRIOR`` scores begin with zero.
        op_feature_names: the op features, in order.
        relation_names: the R kinds of edges, in the order of ``edge_attr``'s columns.
        context_names: the K columns of the context, in order.
        hidden: width H.
        layers: rounds of messages.
        heads: attention heads.
        use_edges: False = no messages (an ablation of the benchmarks).
        shuffle_edges: messages go between channels by chance (likewise).
    """

    feature_names: tuple[str, ...] = FEATURE_NAMES
    op_feature_names: tuple[str, ...] = OP_FEATURE_NAMES
    relation_names: tuple[str, ...] = RELATION_NAMES
    context_names: tuple[str, ...] = CONTEXT_NAMES
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    use_edges: bool = True
    shuffle_edges: bool = False

    def __post_init__(self) -> None:
        for name, most in (("hidden", 4096), ("layers", 64), ("heads", 4096)):
            check_range(name, getattr(self, name), 1, most)
        if self.hidden % self.heads:
            msg = f"heads={self.heads} must divide hidden={self.hidden}"
            raise ConfigError(msg)


class PruningNetwork(nn.Module):
    """Scores channels (higher = keep).

    Channel and group heads end in zeros, so an untrained network's scores are the prior itself.
    The budget joins after the encoder: graphs that are equal are encoded once for all budgets.

    Args:
        config: names and sizes.

    Shapes:
        - N channel nodes and G groups of all graphs joined, B graphs, K context columns
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.encoder = ChannelGraphEncoder(
            num_features=len(config.feature_names),
            num_op_features=len(config.op_feature_names),
            num_relations=len(config.relation_names),
            hidden=hidden,
            layers=config.layers,
            heads=config.heads,
            use_edges=config.use_edges,
            shuffle_edges=config.shuffle_edges,
        )
        num_context = len(config.context_names)
        self.channel_head = _head(2 * hidden + num_context, hidden)
        self.group_head = _head(hidden + num_context, hidden)

    def encode(self, data: Data) -> Tensor:
        """Return channel embeddings ``[N, H]`` of one graph, or of several joined."""
        embeddings: Tensor = self.encoder(data)
        return embeddings

    def scores(self, data: Data, embeddings: Tensor, context: Tensor) -> Tensor:
        """Return keep scores ``[N]``.

        Args:
            data: graphs as ``budget_threshold.join`` returns them.
            embeddings: ``[N, H]``.
            context: ``[B, K]`` one row a graph.
        """
        num_groups = int(data.group_of.max()) + 1
        groups = scatter(embeddings, data.group_of, dim_size=num_groups, reduce="mean")  # [G, H]
        graph_of_group = scatter(
            data.channel_graph, data.group_of, dim_size=num_groups, reduce="max"
        )  # [G]
        channel_input = torch.cat(
            [embeddings, groups[data.group_of], context[data.channel_graph]], dim=1
        )
        group_input = torch.cat([groups, context[graph_of_group]], dim=1)
        offset = self.group_head(group_input)[data.group_of]  # [N, 1]
        scores: Tensor = (self.channel_head(channel_input) + offset).squeeze(1)  # [N]
        return scores + self.prior(data.x)

    def prior(self, features: Tensor) -> Tensor:
        """Return the scores ``[N]`` of an untrained network on ``[N, F]`` features."""
        if PRIOR not in self.config.feature_names:
            return torch.zeros_like(features[:, 0])
        return features[:, self.config.feature_names.index(PRIOR)]

    @torch.no_grad()
    def logits(self, data: Data, node_features: FloatArray, context: FloatArray) -> FloatArray:
        """Return keep scores ``[N]`` of one network, of any size; for inference.

        The final mask is ``graph.project(logits, budget)``. Threshold and temperature are left out:
        they do not change the order.

        Args:
            data: channel + op graph from ``to_pyg``.
            node_features: ``[N, F]``.
            context: ``[K]``.
        """
        device = next(self.parameters()).device
        features = torch.as_tensor(np.asarray(node_features, dtype=np.float32))
        graph = join([with_features(data, features)]).to(device)
        row = torch.as_tensor(np.asarray(context, dtype=np.float32)).reshape(1, -1).to(device)
        scores = self.scores(graph, self.encode(graph), row)
        result: FloatArray = scores.cpu().numpy()
        return result


def _head(num_inputs: int, hidden: int) -> nn.Sequential:
    """Return a perceptron with one output that starts at zero."""
    last = nn.Linear(hidden, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(num_inputs, hidden), nn.GELU(), last)
