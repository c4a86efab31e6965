"""What imagined episodes would bring: the outcome models of all networks of a training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunegraph.agent.outcome_model import OutcomeModel
from prunegraph.agent.topology import Topology, expected_cost_ratio
from prunegraph.rewards import Episode, unpack_bits
from prunegraph.rewards.config import Metric
from prunegraph.types import Float64Array


class Imagination:
    """Foretells the metric of masks of several networks.

    Args:
        topologies: graph id -> network.
        prior: node features ``[N, F]`` to the scores ``[N]`` of an untrained policy, whose
            exponential is the importance that the models start from.

    Attributes:
        models: graph id -> model; one is made with the first episode of its network.
    """

    def __init__(
        self, topologies: Mapping[int, Topology], prior: Callable[[Tensor], Tensor]
    ) -> None:
        self._topologies = topologies
        self._prior = prior
        self.models: dict[int, OutcomeModel] = {}

    def remember(
        self,
        episodes: Sequence[Episode],
        graph_ids: Sequence[int],
        features: Tensor,
        *,
        metric: Metric,
        update: int,
    ) -> None:
        """Teach the models an update's episodes.

        Args:
            episodes: B episodes.
            graph_ids: ``[B]`` their networks.
            features: ``[B, N_max, F]`` node features.
            metric: what is foretold.
            update: number of the update, whose episodes share their images.
        """
        for episode, graph_id, matrix in zip(episodes, graph_ids, features, strict=True):
            graph = self._topologies[graph_id].graph
            if graph_id not in self.models:
                prior = self._prior(matrix[: graph.num_classes].cpu())
                self.models[graph_id] = OutcomeModel(graph, prior.double().exp().numpy())
            bits = unpack_bits(episode.bits, graph.num_classes)
            self.models[graph_id].add(bits, episode.metric(metric), update)
        for graph_id in set(graph_ids):
            self.models[graph_id].fit()

    @torch.no_grad()
    def foretell(
        self, ids: Tensor, bits: Tensor, limits: Float64Array, cells: Tensor, *, caution: float
    ) -> Tensor:
        """Return what masks would reach ``[B]``, as if each cost the same.

        Args:
            ids: ``[B]`` graph ids.
            bits: ``[B, N_max]`` masks.
            limits: ``[B, 2]`` the most MACs and params that may remain.
            cells: ``[B]`` which (network, budget) each belongs to.
            caution: deviations of its own error by which a prediction is lowered.
        """
        metrics = torch.zeros(len(ids), dtype=torch.float64)
        costs = torch.zeros_like(metrics)
        for graph_id in ids.unique().tolist():
            rows = (ids == graph_id).cpu()
            graph = self._topologies[graph_id].graph
            keep = bits.cpu()[rows, : graph.num_classes].double()
            mean, deviation = self.models[graph_id].predict(keep)
            metrics[rows] = mean - caution * deviation
            costs[rows] = torch.from_numpy(
                expected_cost_ratio(graph, keep.numpy(), limits[rows.numpy()])
            )
        return without_cost(metrics, costs, cells.cpu()).to(bits)

    def state_dict(self) -> dict[str, Any]:
        """Return the models as JSON values."""
        return {str(graph_id): model.state_dict() for graph_id, model in self.models.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        for graph_id, values in state.items():
            graph = self._topologies[int(graph_id)].graph
            model = OutcomeModel(graph, np.array(values["importance"]))
            model.load_state_dict(values)
            self.models[int(graph_id)] = model


def without_cost(metrics: Tensor, costs: Tensor, cells: Tensor) -> Tensor:
    """Return metrics ``[B]`` less what the masks' costs ``[B]`` explain in each cell ``[B]``.

    Sampled bits miss the budget by chance. The environment repairs masks before it measures them;
    imagined ones are taken as they are, and must not look good because they keep more.
    """
    residuals = metrics.clone()
    for cell in cells.unique():
        members = cells == cell
        excess = costs[members] - costs[members].mean()
        slope = (excess @ metrics[members]) / (excess @ excess + 1e-6 * len(excess))
        residuals[members] -= slope * excess
    return residuals
