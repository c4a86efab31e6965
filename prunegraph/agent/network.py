"""The policy's network: graph encoder, channel head, group head and critic.

It takes channel + op graphs as PyG ``Data`` of any size and knows neither an environment's padding
nor stable-baselines3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.utils import scatter

from prunegraph.agent.encoder import ChannelGraphEncoder
from prunegraph.agent.threshold import join, with_features
from prunegraph.core.errors import ConfigError
from prunegraph.core.masks import FloatArray
from prunegraph.graph.features import FEATURE_NAMES, OP_FEATURE_NAMES
from prunegraph.graph.pyg import RELATION_NAMES
from prunegraph.rewards import COMPETITION_CONTEXT_NAMES, CONTEXT_NAMES


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """What a policy network is made for, and its size.

    Attributes:
        feature_names: the F channel features, in order.
        op_feature_names: the op features, in order.
        relation_names: the R kinds of edges, in the order of ``edge_attr``'s columns.
        context_names: the K columns of the context, in order.
        critic_only: context columns that the actor does not see: what it prefers should not depend
            on the bar that its reward is compared with.
        prior: channel feature that the scores start from, or None to start from nothing.
        hidden: width H.
        layers: rounds of messages.
        heads: attention heads.
        use_edges: False = no messages (an ablation).
        shuffle_edges: messages arrive at the wrong nodes (an ablation).
    """

    feature_names: tuple[str, ...] = FEATURE_NAMES
    op_feature_names: tuple[str, ...] = OP_FEATURE_NAMES
    relation_names: tuple[str, ...] = RELATION_NAMES
    context_names: tuple[str, ...] = CONTEXT_NAMES
    critic_only: tuple[str, ...] = COMPETITION_CONTEXT_NAMES
    prior: str | None = "start"
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    use_edges: bool = True
    shuffle_edges: bool = False

    def columns(self, names: Sequence[str]) -> list[int]:
        """Return where channel features are, those that it reads."""
        return [self.feature_names.index(name) for name in names if name in self.feature_names]

    def __post_init__(self) -> None:
        if self.prior is not None and self.prior not in self.feature_names:
            msg = f"prior {self.prior!r} is not a channel feature: {', '.join(self.feature_names)}"
            raise ConfigError(msg)
        unknown = [name for name in self.critic_only if name not in self.context_names]
        if unknown:
            msg = f"critic_only holds {unknown}, the context has {', '.join(self.context_names)}"
            raise ConfigError(msg)
        for name, most in (("hidden", 4096), ("layers", 64), ("heads", 4096)):
            if not 1 <= getattr(self, name) <= most:
                msg = f"{name}={getattr(self, name)} must lie in 1 to {most}"
                raise ConfigError(msg)
        if self.hidden % self.heads:
            msg = f"heads={self.heads} must divide hidden={self.hidden}"
            raise ConfigError(msg)

    @property
    def actor_columns(self) -> list[int]:
        """Positions of the context columns that the actor sees."""
        return [i for i, name in enumerate(self.context_names) if name not in self.critic_only]


class PruningNetwork(nn.Module):
    """Scores channels (higher = keep) and values states.

    Channel and group heads end in zeros, so an untrained network's scores are the prior itself.
    Budget and bar join after the encoder: graphs that are equal are encoded once for all budgets.

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
        actor_context = len(config.actor_columns)
        self.channel_head = _head(2 * hidden + actor_context, hidden)
        self.group_head = _head(hidden + actor_context, hidden)
        self.critic = _head(2 * hidden + len(config.context_names), hidden)

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
        actor_context = context[:, self.config.actor_columns]  # [B, K']
        num_groups = int(data.group_of.max()) + 1
        groups = scatter(embeddings, data.group_of, dim_size=num_groups, reduce="mean")  # [G, H]
        graph_of_group = scatter(
            data.channel_graph, data.group_of, dim_size=num_groups, reduce="max"
        )  # [G]
        channel_input = torch.cat(
            [embeddings, groups[data.group_of], actor_context[data.channel_graph]], dim=1
        )
        group_input = torch.cat([groups, actor_context[graph_of_group]], dim=1)
        offset = self.group_head(group_input)[data.group_of]  # [N, 1]
        scores: Tensor = (self.channel_head(channel_input) + offset).squeeze(1)  # [N]
        return scores + self.prior(data.x)

    def prior(self, features: Tensor) -> Tensor:
        """Return the scores ``[N]`` of an untrained network on ``[N, F]`` features."""
        if self.config.prior is None:
            return torch.zeros(len(features), device=features.device)
        return features[:, self.config.feature_names.index(self.config.prior)]

    def values(self, data: Data, embeddings: Tensor, graph_of: Tensor, context: Tensor) -> Tensor:
        """Return state values ``[B]``; no gradient reaches the encoder, which serves the actor.

        Args:
            data: graphs as ``budget_threshold.join`` returns them.
            embeddings: ``[N, H]``.
            graph_of: ``[B]`` position of each state's graph.
            context: ``[B, K]`` one row a state.
        """
        detached = embeddings.detach()
        pooled = torch.cat(
            [scatter(detached, data.channel_graph, reduce=how) for how in ("mean", "max")], dim=1
        )  # [graphs, 2 H]
        values: Tensor = self.critic(torch.cat([pooled[graph_of], context], dim=1))  # [B, 1]
        return values.squeeze(1)

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
