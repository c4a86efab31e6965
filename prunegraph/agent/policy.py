"""The policy that stable-baselines3 trains: from padded observations to masked keep bits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor
from torch_geometric.data import Data

from prunegraph.agent.distribution import MaskedBernoulli
from prunegraph.agent.network import NetworkConfig, PruningNetwork
from prunegraph.agent.offsets import InstanceOffsets
from prunegraph.agent.threshold import OTHERS, BudgetThreshold, join, solve_threshold, with_features
from prunegraph.core.errors import ConfigError
from prunegraph.core.masks import Float64Array, IntArray
from prunegraph.rewards.config import Constraint

PLANNED_EVERY = 2
"""Of so many episodes one mask is improved by a plan; the others explore."""


@dataclass(frozen=True, eq=False)
class _Batch:
    """A batch of observations without its repetitions.

    Attributes:
        graphs: the distinct (graph, node features) with their ids.
        graph_of: ``[B]`` position in ``graphs`` of each row.
        variants: ``[V]`` first row of each distinct (graph, context).
        variant_of: ``[B]`` position in ``variants`` of each row.
    """

    graphs: list[tuple[int, Data]]
    graph_of: list[int]
    variants: list[int]
    variant_of: list[int]


class ChannelPruningPolicy(ActorCriticPolicy):
    """Keep bits of channel graphs; it has no critic, values are 0.

    ``logits = (score - threshold) / temperature`` with the network's score. With
    ``constraint="bias"`` the threshold is solved at each forward so that the expected cost meets
    the budget, and its gradient is that of the solution. With ``"lagrangian"`` it is the solution
    for an untrained network, and a multiplier on the overshoot in the reward does the rest.

    Args:
        observation_space: the flat dictionary of the environment.
        action_space: ``MultiBinary(N_max)``.
        lr_schedule: step size over the progress that remains.
        thresholds: graph id -> budget_threshold of every network that observations may name.
        network_config: names and sizes of the network.
        constraint: how the budget is met.
        initial_cost_ratio: expected cost over budget at the start of ``"lagrangian"``.
        row_by_row: act on each observation of a batch alone. Products of matrices of another size
            differ in the last digits; so the actions do not depend on how many environments share
            an update.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *,
        thresholds: Mapping[int, BudgetThreshold],
        network_config: NetworkConfig,
        constraint: Constraint = "bias",
        initial_cost_ratio: float = 1.0,
        row_by_row: bool = False,
        use_sde: bool = False,
    ) -> None:
        if use_sde:
            msg = "use_sde=True: state-dependent noise is for continuous actions, these are bits"
            raise ConfigError(msg)
        self.thresholds = dict(thresholds)
        self.network_config = network_config
        self.constraint = constraint
        self.initial_cost_ratio = initial_cost_ratio
        self.row_by_row = row_by_row
        self.temperature = 1.0
        self.initial_temperature = 1.0
        self.group_noise = 0.0
        self.noises: list[Tensor] = []
        self.embeddings: dict[tuple[int, bytes], Tensor] | None = None  # kept for an update
        self.num_acted = 0  # in this update
        self.plan: Callable[[int, Tensor, Float64Array], Tensor] | None = None
        self.generator: torch.Generator | None = None
        self.noise_generator: torch.Generator | None = None
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            features_extractor_class=FlattenExtractor,  # never called: the graph network reads
        )

    def _build(self, lr_schedule: Schedule) -> None:
        """Build network and optimiser in place of a perceptron over a flat vector."""
        self.network = PruningNetwork(self.network_config)
        self.offsets = InstanceOffsets({i: t.graph for i, t in self.thresholds.items()})
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=lr_schedule(1), eps=1e-8)

    def embed(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Return the channels' embeddings ``[N, H]`` of the distinct graphs of a batch."""
        data = join([graph for _, graph in self._deduplicate(obs).graphs]).to(self.device)
        return self.network.encode(data)

    def decide(
        self,
        obs: Mapping[str, Tensor],
        noise: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> MaskedBernoulli:
        """Return the distribution of the keep bits for a batch of observations.

        Args:
            obs: the batch.
            noise: ``[B, G_max]`` added to the scores of each row's groups before the threshold is
                solved, so that a row explores another allocation of the same budget. With
                ``[k B, G_max]`` the distribution has k rows for each observation, one after the
                other.
            embeddings: what ``embed`` returned for the same batch; None = encode it.
        """
        batch = self._deduplicate(obs)
        context = obs["context"].float()
        data = join([graph for _, graph in batch.graphs]).to(self.device)
        if embeddings is None:
            embeddings = self.network.encode(data)  # [N, H]
        scores = self._scores(batch, data, embeddings, context)  # [V, N_max]
        mask = (obs["action_mask"] > 0.5) & (obs["node_mask"] > 0.5)
        if noise is not None:
            copies = len(noise) // len(context)
            batch = _Batch(
                batch.graphs,
                [graph for graph in batch.graph_of for _ in range(copies)],
                list(range(len(noise))),
                [variant for variant in batch.variant_of for _ in range(copies)],
            )
            scores = scores[batch.variant_of] + self._spread(batch, noise, scores.shape[1])
            batch = replace(batch, variant_of=batch.variants)  # each row its own variant
            context, mask = (x.repeat_interleave(copies, dim=0) for x in (context, mask))
        threshold = self._thresholds(batch, scores, context)  # [V]
        if self.constraint == "bias":
            threshold = self._follow_scores(batch, scores, threshold, context)
        logits = (scores - threshold[:, None]) / self.temperature
        return MaskedBernoulli(logits[batch.variant_of], mask)

    def _deduplicate(self, obs: Mapping[str, Tensor]) -> _Batch:
        num_features = len(self.network_config.feature_names)
        ids = obs["graph_id"].reshape(-1).long().tolist()
        rows = obs["node_features"].cpu().numpy()
        contexts = obs["context"].cpu().numpy()
        graphs: dict[tuple[int, bytes], int] = {}
        variants: dict[tuple[int, bytes], int] = {}
        batch = _Batch([], [], [], [])
        for row, graph_id in enumerate(ids):
            graph = graphs.setdefault((graph_id, rows[row].tobytes()), len(graphs))
            if graph == len(batch.graphs):
                budget_threshold = self._threshold_of(graph_id)
                features = obs["node_features"][row].view(-1, num_features)[
                    : budget_threshold.num_channels
                ]
                batch.graphs.append((graph_id, with_features(budget_threshold.data, features)))
            variant = variants.setdefault((graph, contexts[row].tobytes()), len(variants))
            if variant == len(batch.variants):
                batch.variants.append(row)
            batch.graph_of.append(graph)
            batch.variant_of.append(variant)
        return batch

    def _threshold_of(self, graph_id: int) -> BudgetThreshold:
        if graph_id not in self.thresholds:
            msg = (
                f"no threshold for graph id {graph_id}: the policy knows {sorted(self.thresholds)}"
            )
            raise ConfigError(msg)
        return self.thresholds[graph_id]

    def _scores(self, batch: _Batch, data: Data, embeddings: Tensor, context: Tensor) -> Tensor:
        """Return scores ``[V, N_max]``, zero in the padding."""
        graph_of = [batch.graph_of[row] for row in batch.variants]
        if graph_of != list(range(len(batch.graphs))):  # a graph under several budgets
            data, embeddings = _select(batch, data, embeddings, graph_of)
        flat = self.network.scores(data, embeddings, context[batch.variants])  # [N]
        flat = flat + torch.cat([self.offsets(batch.graphs[graph][0]) for graph in graph_of])
        sizes = [batch.graphs[graph][1].num_channels for graph in graph_of]
        position = torch.cat([torch.arange(size, device=self.device) for size in sizes])
        assert self.action_space.shape is not None
        padded = flat.new_zeros(len(graph_of), self.action_space.shape[0])
        return padded.index_put((data.channel_graph, position), flat)

    def _spread(self, batch: _Batch, noise: Tensor, width: int) -> Tensor:
        """Return the noise of each row's groups on their channels ``[B, N_max]``."""
        spread = noise.new_zeros(len(noise), width)
        ids = [batch.graphs[graph][0] for graph in batch.graph_of]
        for graph_id, members in _rows_by_graph(ids):
            group_of = self._threshold_of(graph_id).data.group_of.to(noise.device)
            spread[members, : len(group_of)] = noise[members][:, group_of]
        return spread

    def _follow_scores(
        self, batch: _Batch, scores: Tensor, threshold: Tensor, context: Tensor
    ) -> Tensor:
        """Return the same thresholds with the gradient of their solution.

        Implicit differentiation of "the expected cost stays": the threshold moves by the mean of
        the scores' moves, weighted by ``slope * p * (1 - p)``, with the slope of the expected cost
        along the keep probability. As a constant it would leave a gradient along "all scores up",
        which changes no decision but drowns every other direction in the optimiser: in trials the
        heads saturated and the policy stayed what it was.
        """
        probabilities = torch.sigmoid((scores.detach() - threshold[:, None]) / self.temperature)
        costs = torch.zeros_like(scores)
        ids = [batch.graphs[batch.graph_of[row]][0] for row in batch.variants]
        limits, keep = self.limits(ids, context[batch.variants]), probabilities.cpu().double()
        for graph_id, members in _rows_by_graph(ids):
            budget_threshold = self._threshold_of(graph_id)
            expected = keep[members, : budget_threshold.num_channels].numpy()
            slopes = torch.from_numpy(budget_threshold.cost_slopes(expected, limits[members]))
            costs[members, : budget_threshold.num_channels] = slopes.to(scores)
        weights = costs * probabilities * (1.0 - probabilities) + 1e-12 * (costs > 0)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-30)
        return threshold + (weights * (scores - scores.detach())).sum(dim=1)

    @torch.no_grad()
    def _thresholds(self, batch: _Batch, scores: Tensor, context: Tensor) -> Tensor:
        """Return thresholds ``[V]``; variants of one budget_threshold are solved together."""
        ids = [batch.graphs[batch.graph_of[row]][0] for row in batch.variants]
        limits = self.limits(ids, context[batch.variants])
        result = np.zeros(len(batch.variants))
        for graph_id, members in _rows_by_graph(ids):
            graph = self._threshold_of(graph_id).graph
            if self.constraint == "lagrangian":
                features = [
                    batch.graphs[batch.graph_of[batch.variants[member]]][1].x for member in members
                ]
                start = torch.stack([self.network.prior(feature) for feature in features])
                temperature, ratio = self.initial_temperature, self.initial_cost_ratio
            else:
                start = scores[members, : graph.num_units]
                temperature, ratio = self.temperature, 1.0
            result[members] = solve_threshold(
                graph, start.cpu().double().numpy(), ratio * limits[members], temperature
            )
        return torch.from_numpy(result).to(scores)

    def limits(self, ids: Sequence[int], context: Tensor) -> Float64Array:
        """Return the most MACs, params, bytes and ms ``[B, 4]`` that may remain of networks.

        Args:
            ids: graph ids.
            context: ``[B, K]``.
        """
        names = self.network_config.context_names
        limits = np.full((len(ids), 4), np.inf)
        limits[:, OTHERS:] = [self.thresholds[graph_id].other_limits for graph_id in ids]
        rows = context.cpu().double().numpy()
        dense = [self.thresholds[graph_id].graph.dense_cost for graph_id in ids]
        wholes = [cost.macs for cost in dense], [cost.params for cost in dense]
        for column, name in enumerate(("keep_macs", "keep_params")):
            if name in names:
                limits[:, column] = rows[:, names.index(name)] * wholes[column]
        return limits

    def forward(  # type: ignore[override]  # observations are dictionaries
        self, obs: Mapping[str, Tensor], deterministic: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return actions ``[B, N_max]``, zeros ``[B, 1]`` and log-probabilities ``[B]``.

        The log-probabilities are those of what was drawn, before a plan improved it.
        """
        if not self.row_by_row and len(obs["graph_id"]) > 1:
            return self._act(obs, deterministic, self.embed(obs))
        embeddings = {} if self.embeddings is None else self.embeddings
        parts = []
        for row in range(len(obs["graph_id"])):
            one = {name: value[row : row + 1] for name, value in obs.items()}
            key = (int(one["graph_id"]), one["node_features"].cpu().numpy().tobytes())
            if key not in embeddings:
                embeddings[key] = self.embed(one)
            parts.append(self._act(one, deterministic, embeddings[key]))
        actions, values, log_probs = (torch.cat(part) for part in zip(*parts, strict=True))
        return actions, values, log_probs

    def _act(
        self, obs: Mapping[str, Tensor], deterministic: bool, embeddings: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = len(obs["graph_id"])
        noise = None if deterministic else self._draw_noise(rows)
        distribution = self.decide(obs, noise, embeddings)
        actions = self._actions(distribution, deterministic)
        log_prob = distribution.log_prob(actions)
        if noise is not None:
            self.noises.append(noise)
        if self.plan is not None and not deterministic:
            self._improve(obs, actions, self.plan)
        return actions, log_prob.new_zeros(rows, 1), log_prob

    def _improve(
        self,
        obs: Mapping[str, Tensor],
        actions: Tensor,
        plan: Callable[[int, Tensor, Float64Array], Tensor],
    ) -> None:
        """Replace the actions ``[B, N_max]`` of an update's every ``PLANNED_EVERY``-th episode."""
        ids = obs["graph_id"].reshape(-1).long().tolist()
        limits = self.limits(ids, obs["context"])
        for row, graph_id in enumerate(ids):
            self.num_acted += 1
            if self.num_acted % PLANNED_EVERY == 0:
                size = self.thresholds[graph_id].num_channels
                actions[row, :size] = plan(graph_id, actions[row, :size], limits[row])

    def _draw_noise(self, num_rows: int) -> Tensor | None:
        """Return noise ``[B, G_max]`` of this update's deviation; None if 0.

        Row by row, so that it does not depend on how many environments share an update.
        """
        if not self.group_noise:
            return None
        num_groups = max(
            len(budget_threshold.graph.groups) for budget_threshold in self.thresholds.values()
        )
        rows = [torch.randn(num_groups, generator=self.noise_generator) for _ in range(num_rows)]
        return self.group_noise * torch.stack(rows).to(self.device)

    def antithetic_noise(self, num_rows: int, generator: torch.Generator) -> Tensor:
        """Return noise ``[B, G_max]`` of this update's deviation, in pairs of opposite signs."""
        num_groups = max(
            len(budget_threshold.graph.groups) for budget_threshold in self.thresholds.values()
        )
        half = torch.randn((num_rows + 1) // 2, num_groups, generator=generator)
        pairs = torch.stack([half, -half], dim=1).flatten(0, 1)[:num_rows]
        return self.group_noise * pairs.to(self.device)

    def predict_values(self, obs: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        """Return zeros ``[B, 1]``: there is no critic."""
        return torch.zeros(len(obs["graph_id"]), 1, device=self.device)

    def _predict(self, observation: Mapping[str, Tensor], deterministic: bool = False) -> Tensor:  # type: ignore[override]
        return self._actions(self.decide(observation), deterministic)

    def _actions(self, distribution: MaskedBernoulli, deterministic: bool) -> Tensor:
        return distribution.mode() if deterministic else distribution.sample(self.generator)


def _select(
    batch: _Batch, data: Data, embeddings: Tensor, graph_of: list[int]
) -> tuple[Data, Tensor]:
    """Return joined graphs and embeddings with graph ``graph_of[v]`` at position ``v``."""
    rows = [torch.nonzero(data.channel_graph == graph).squeeze(1) for graph in graph_of]
    index = torch.cat(rows)
    selected = join([batch.graphs[graph][1] for graph in graph_of]).to(embeddings.device)
    return selected, embeddings[index]


def _rows_by_graph(ids: Sequence[int]) -> list[tuple[int, IntArray]]:
    """Return each distinct id with the positions that it has in ``ids``."""
    return [(graph_id, np.flatnonzero(np.equal(ids, graph_id))) for graph_id in sorted(set(ids))]
