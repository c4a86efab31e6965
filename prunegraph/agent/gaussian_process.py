"""What an episode would bring: a model of the outcome, learned from all episodes so far.

A pruned network costs a second, a predicted one a millisecond. Sixteen measured masks an update say
little about hundreds of bits, but the masks of *all* updates together say much: a Gaussian process
over them predicts the metric of masks that were never run, and how far to trust that. The policy is
trained on surrogate rollouts between two updates (model-based reinforcement learning: Sutton 1991,
Dyna; Janner et al. 2019, arXiv 1906.08253). Rasmussen and Williams 2006, chapters 2 and 5.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prunegraph.core.masks import BoolArray, Float64Array
from prunegraph.graph.graph import StructureGraph

SHARE_FLOOR = 0.02
"""Added to shares before their logarithm: an empty group is far away, not infinitely far."""

JITTER = 1e-4
"""Variance on the diagonal, in units of the metric's variance, for the decomposition's sake."""

FIT_STEPS = 30
"""Steps of Adam on the hyperparameters at the first fit; later ones go on with fewer."""

REFIT_STEPS = 5

FIT_RATE = 0.1

PRIOR_MEANS = {
    "widths": 0.0,
    "linear": -1.0,
    "update": -1.5,
    "bits": -1.0,
    "noise": -1.5,
}
"""Expected log amplitude of each part of the kernel, in deviations of the metric."""


class GaussianProcess:
    """Gaussian process from the keep bits of one network to the metric that they reach.

    The kernel of two masks is a Matern 5/2 over the groups' logarithmic widths and kept importance
    (one length scale for each), plus a linear one over the same, plus a linear one over the bits
    themselves (one scale a group): what a single channel adds whatever the widths are. Episodes of
    an update share an image subset, and so an error; each also has its own. Amplitudes and length
    scales maximise the posterior: marginal likelihood and log-normal priors.

    Args:
        graph: the network.
        importance: ``[N]`` positive; the share of a group's sum that is kept is an input beside the
            share of its channels.
    """

    def __init__(self, graph: StructureGraph, importance: Float64Array) -> None:
        self._graph = graph
        self._importance = importance
        groups = graph.free_groups
        member = graph.group_of[:, None] == groups[None, :]  # [N, G]
        self._position = torch.from_numpy(np.searchsorted(groups, graph.group_of) % len(groups))
        self._bit_scale = torch.from_numpy(
            graph.free / np.sqrt(len(groups) * member.sum(axis=0)[self._position])
        )  # [N]: a group's bits together weigh alike at first
        count = torch.from_numpy(member.astype(np.float64))
        weight = torch.from_numpy(member * importance[:, None])
        kept = weight / weight.sum(dim=0).clamp_min(1e-12)
        self._shares = torch.cat([count / count.sum(dim=0), kept], dim=1)  # [N, 2 G]
        self.bits: list[BoolArray] = []
        self.metrics: list[float] = []
        self.updates: list[int] = []
        lengths = [0.0] * (self._shares.shape[1] + len(groups))
        self.log_scales = torch.tensor([*lengths, *PRIOR_MEANS.values()], dtype=torch.float64)
        self._fitted = False

    def __len__(self) -> int:
        """Return the number of episodes."""
        return len(self.metrics)

    def add(self, bits: BoolArray, metric: float, update: int) -> None:
        """Remember an episode.

        Args:
            bits: ``[N]`` the evaluated mask.
            metric: what it reached.
            update: number of the update, whose episodes share their images.
        """
        self.bits.append(bits)
        self.metrics.append(metric)
        self.updates.append(update)

    def fit(self) -> None:
        """Fit the hyperparameters and the posterior to all episodes."""
        targets, shared = self._load()
        scales = self.log_scales.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([scales], lr=FIT_RATE)
        for _ in range(REFIT_STEPS if self._fitted else FIT_STEPS):
            factor, weights = self._solve(scales, targets, shared)
            loss = 0.5 * targets @ weights + factor.diagonal().log().sum() - self._log_prior(scales)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.log_scales = scales.detach()
        with torch.no_grad():
            self._factor, self._weights = self._solve(self.log_scales, targets, shared)
        self._fitted = True

    def _load(self) -> tuple[Tensor, Tensor]:
        """Put all episodes into the kernel's units.

        Returns:
            Their standardised metrics ``[n]``, and 1 where two share an update ``[n, n]``.
        """
        bits = torch.from_numpy(np.stack(self.bits).astype(np.float64))
        metrics = torch.tensor(self.metrics, dtype=torch.float64)
        updates = torch.tensor(self.updates)
        inputs = self._inputs(bits)
        self._input_mean = inputs.mean(dim=0)
        self._input_scale = inputs.std(dim=0, correction=0) + 1e-3
        self._bits_mean = bits.mean(dim=0)
        self._metric_mean = metrics.mean()
        self._metric_scale = metrics.std(correction=0) + 1e-9
        self._points = self._normalise(bits)
        targets = (metrics - self._metric_mean) / self._metric_scale
        return targets, (updates[:, None] == updates[None, :]).double()

    def predict(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation ``[M]`` of the metric of masks ``[M, N]``.

        The deviation is that of what the mask is worth, without the errors of measuring it.
        """
        points = self._normalise(bits.double())
        covariance = self._kernel(self.log_scales, points, self._points)  # [M, n]
        mean = covariance @ self._weights
        explained = torch.linalg.solve_triangular(self._factor, covariance.T, upper=False)
        variance = self._variance(points) - explained.square().sum(dim=0)
        deviation = variance.clamp_min(1e-9).sqrt()
        return (
            mean * self._metric_scale + self._metric_mean,
            deviation * self._metric_scale,
        )

    def _inputs(self, bits: Tensor) -> Tensor:
        """Return the logarithms of kept widths and importances of ``[M, N]``."""
        return (bits @ self._shares + SHARE_FLOOR).log()

    def _normalise(self, bits: Tensor) -> "_Points":
        """Return masks ``[M, N]`` in the kernel's units: typical episodes have norm 1 or less."""
        inputs = (self._inputs(bits) - self._input_mean) / self._input_scale
        return _Points(
            inputs / (2.0 * math.sqrt(inputs.shape[1])),
            (bits - self._bits_mean) * self._bit_scale,
        )

    def _amplitudes(self, scales: Tensor) -> dict[str, Tensor]:
        """Return the variance of each part of the kernel, in units of the metric's variance."""
        values = (2.0 * scales[-len(PRIOR_MEANS) :]).exp()
        return dict(zip(PRIOR_MEANS, values, strict=True))

    def _kernel(self, scales: Tensor, first: "_Points", second: "_Points") -> Tensor:
        """Return the covariance ``[M, n]`` of what two sets of masks are worth."""
        amplitude = self._amplitudes(scales)
        one, two = self._scaled(scales, first), self._scaled(scales, second)
        kernel: Tensor = (
            amplitude["widths"] * _matern(one.inputs, two.inputs)
            + amplitude["linear"] * first.inputs @ second.inputs.T
            + amplitude["bits"] * one.bits @ two.bits.T
        )
        return kernel

    def _variance(self, points: "_Points") -> Tensor:
        """Return the diagonal ``[M]`` of ``_kernel(points, points)``."""
        amplitude = self._amplitudes(self.log_scales)
        scaled = self._scaled(self.log_scales, points)
        return (
            amplitude["widths"]
            + amplitude["linear"] * points.inputs.square().sum(dim=1)
            + amplitude["bits"] * scaled.bits.square().sum(dim=1)
        )

    def _scaled(self, scales: Tensor, points: "_Points") -> "_Points":
        """Return points over the length scales of their inputs and of their groups' bits."""
        lengths = scales[: -len(PRIOR_MEANS)].exp()
        num_inputs = points.inputs.shape[1]
        of_bits = lengths[num_inputs:][self._position]  # [N]
        return _Points(points.inputs / lengths[:num_inputs], points.bits / of_bits)

    def _solve(self, scales: Tensor, targets: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Cholesky factor of the episodes' covariance, and its inverse times targets."""
        amplitude = self._amplitudes(scales)
        covariance = self._kernel(scales, self._points, self._points)
        covariance = covariance + amplitude["update"] * shared
        covariance = covariance + (amplitude["noise"] + JITTER) * torch.eye(len(targets))
        factor = torch.linalg.cholesky(covariance)
        return factor, torch.cholesky_solve(targets[:, None], factor)[:, 0]

    def _log_prior(self, scales: Tensor) -> Tensor:
        """Return the log density of the hyperparameters, up to a constant."""
        means = torch.tensor(list(PRIOR_MEANS.values()), dtype=torch.float64)
        lengths, amplitudes = scales[: -len(means)], scales[-len(means) :]
        return -lengths.square().sum() - 0.25 * (amplitudes - means).square().sum()


def _matern(first: Tensor, second: Tensor) -> Tensor:
    """Return the Matern 5/2 kernel ``[M, n]`` of points ``[M, D]`` and ``[n, D]``."""
    distance = math.sqrt(5.0) * torch.cdist(first, second)
    return (1.0 + distance + distance.square() / 3.0) * (-distance).exp()


class _Points(NamedTuple):
    """Masks as the kernel sees them: ``[M, I]`` inputs and ``[M, N]`` centred bits."""

    inputs: Tensor
    bits: Tensor
