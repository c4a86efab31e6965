"""What surrogate rollouts would bring: the surrogates of all networks of a training."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prunegraph.agent.gaussian_process import GaussianProcess
from prunegraph.agent.local_search import plan
from prunegraph.agent.threshold import BudgetThreshold, expected_cost_ratio
from prunegraph.core.masks import BoolArray, Float64Array, unpack_bits
from prunegraph.rewards import Episode
from prunegraph.rewards.config import Metric


class Surrogate:
    """Predicts the metric of masks of several networks.

    Args:
        thresholds: graph id -> network.
        prior: node features ``[N, F]`` to the scores ``[N]`` of an untrained policy, whose
            exponential is the importance that the models start from.

    Attributes:
        models: graph id -> model; one is made with the first episode of its network.
    """

    def __init__(
        self, thresholds: Mapping[int, BudgetThreshold], prior: Callable[[Tensor], Tensor]
    ) -> None:
        self._thresholds = thresholds
        self._prior = prior
        self.models: dict[int, GaussianProcess] = {}

    def remember(
        self,
        episodes: Sequence[Episode],
        graph_ids: Sequence[int],
        features: Tensor,
        *,
        metric: Metric,
        update: int,
    ) -> None:
        """Show the models an update's episodes.

        Args:
            episodes: B episodes.
            graph_ids: ``[B]`` their networks.
            features: ``[B, N_max, F]`` node features.
            metric: what is predicted.
            update: number of the update, whose episodes share their images.
        """
        for episode, graph_id, matrix in zip(episodes, graph_ids, features, strict=True):
            graph = self._thresholds[graph_id].graph
            if graph_id not in self.models:
                importance = self._prior(matrix[: graph.num_units].cpu()).double().exp()
                self.models[graph_id] = GaussianProcess(graph, importance.numpy())
            bits = unpack_bits(episode.bits, graph.num_units)
            self.models[graph_id].add(bits, episode.metric(metric), update)
        for graph_id in set(graph_ids):
            self.models[graph_id].fit()

    @torch.no_grad()
    def rewards(
        self,
        ids: Tensor,
        bits: Tensor,
        limits: Float64Array,
        pairs: Tensor,
        *,
        caution: float = 0.0,
    ) -> Tensor:
        """Return the rewards of surrogate rollouts ``[B]``, as if each mask cost the same.

        Args:
            ids: ``[B]`` graph ids.
            bits: ``[B, N_max]`` masks.
            limits: ``[B, 4]`` the most MACs, params, bytes and ms that may remain.
            pairs: ``[B]`` which (network, budget) each belongs to.
            caution: deviations of its own error by which a predicted metric is lowered.
        """
        rewards = torch.zeros(len(ids), dtype=torch.float64)
        for pair in pairs.unique():
            rows = (pairs == pair).cpu()
            graph_id, limit = int(ids[rows.to(ids.device)][0]), limits[rows.numpy()][0]
            mean, deviation, costs = self._predict(graph_id, bits.cpu()[rows], limit)
            metrics = mean - caution * deviation
            slope = cost_slope(metrics, costs)
            rewards[rows] = metrics - slope * (costs - costs.mean())
        return rewards.to(bits)

    def _predict(
        self, graph_id: int, bits: Tensor, limits: Float64Array
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return metrics, their deviations and costs over what may remain ``[K]`` of K masks.

        Args:
            graph_id: the network.
            bits: ``[K, N_max]`` masks.
            limits: ``[4]`` the most MACs, params, bytes and ms that may remain.
        """
        graph = self._thresholds[graph_id].graph
        keep = bits[:, : graph.num_units].double()
        mean, deviation = self.models[graph_id].predict(keep)
        costs = expected_cost_ratio(graph, keep.numpy(), limits[None])
        return mean, deviation, torch.from_numpy(costs)

    def plan(
        self, graph_id: int, bits: Tensor, limits: Float64Array, *, most: int, caution: float
    ) -> Tensor:
        """Return a mask ``[N]`` near ``bits`` that is predicted to be better.

        Args:
            graph_id: the network.
            bits: ``[N]`` a mask; it comes back as it is as long as nothing has been predicted.
            limits: ``[4]`` the most MACs, params, bytes and ms that may remain.
            most: swaps of a channel for another one at the most.
            caution: deviations of its own error by which a predicted metric is lowered.
        """
        model = self.models.get(graph_id)
        if model is None:
            return bits

        def predict(masks: Tensor) -> Tensor:
            mean, deviation = model.predict(masks)
            return mean - caution * deviation

        graph, keep = self._thresholds[graph_id].graph, bits.cpu().numpy() > 0.5
        return torch.from_numpy(plan(predict, graph, keep, limits, most=most)).to(bits)

    @torch.no_grad()
    def promising(self, graph_id: int, limits: Float64Array, number: int) -> list[BoolArray]:
        """Return the run masks ``[N]`` that should be best, the errors of measuring them taken out.

        Args:
            graph_id: the network.
            limits: ``[4]`` the most MACs, params, bytes and ms that may remain.
            number: at most so many, the best first.
        """
        if graph_id not in self.models:
            return []
        distinct = {bits.tobytes(): bits for bits in self.models[graph_id].bits}
        bits = np.stack(list(distinct.values()))
        metrics, _, costs = self._predict(graph_id, torch.from_numpy(bits), limits)
        metrics[costs > 1.0] = -math.inf
        order = metrics.argsort(descending=True, stable=True)[:number].tolist()
        return [bits[row] for row in order if metrics[row] > -math.inf]


def cost_slope(metrics: Tensor, costs: Tensor) -> float:
    """Return what metrics ``[B]`` gain for a budget's worth of cost ``[B]``, by least squares.

    Sampled bits miss the budget by chance. The environment repairs masks before it measures them;
    predicted ones are taken as they are, and must not look good because they keep more.
    """
    excess = costs - costs.mean()
    return float((excess @ metrics) / (excess @ excess + 1e-6 * len(excess)))
