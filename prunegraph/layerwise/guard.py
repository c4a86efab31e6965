"""Whether a reconstruction moves a network's outputs away from the dense network's."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.errors import one_line
from prunegraph.graph.analyse import repeatable
from prunegraph.graph.trace.calls import tensors_in
from prunegraph.layerwise.recalibrate import measuring_batch_norm

MOST_VALUES = 2**24
"""Values of an output tensor that are compared: 64 MiB."""

ALIKE = 1e-6
"""Relative difference of outputs up to which they are the same but for rounding."""

CLEARLY = 2.0
"""Standard errors by which a reconstruction has to be worse than none to be given up."""

REJECTED = (
    "the reconstruction moves the outputs on held-out data further from the dense network's: the "
    "weights stay as they were; more calibration data may help"
)


class Guard:
    """Compares networks with the dense one by their outputs on held-out data; no label is read.

    Batch norms take the statistics of the held-out batches in all of them, since a pruned network's
    own are of the dense network until it is recalibrated.

    Args:
        dense: the dense network, in eval mode.
        run: runs the network that it is given on held-out data, the same each time.
        seed: fixes what a forward draws at random.

    Attributes:
        problem: why the last comparison was not possible or says nothing, or None.
    """

    def __init__(self, dense: nn.Module, run: Callable[[nn.Module], None], seed: int) -> None:
        self._run, self._seed = run, seed
        self.problem: str | None = None
        self._network = dense

    @cached_property
    def _dense(self) -> list[Tensor]:
        return self.outputs(self._network)

    def outputs(self, network: nn.Module) -> list[Tensor]:
        """Return what a network gives on the held-out data; the network stays as it is."""
        try:
            with measuring_batch_norm(network, keep=False):
                return self._seen(network)
        except Exception as error:  # a forward may raise anything
            self.problem = one_line(error)
            return []

    def rejects(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
        """Tell whether outputs are clearly further from the dense network's than they were before.

        Clearly: by ``CLEARLY`` standard errors of the mean of the rows' differences. A few rows on
        which a network is sure and wrong hold most of a divergence. Outputs of the dense network
        that are all alike, as of black images, tell nothing: no reconstruction is trusted then.
        """
        found = zip(self._dense, before, after, strict=False)
        alike = [trio for trio in found if len({tensor.shape for tensor in trio}) == 1]
        if not alike:
            return False
        moved = any(not torch.equal(old, new) for _, old, new in alike)
        if moved and all(_are_alike(dense) for dense, _, _ in alike):
            self.problem = "the held-out outputs of the dense network are all alike"
            return True
        was = torch.cat([_divergences(dense, old) for dense, old, _ in alike])
        now = torch.cat([_divergences(dense, new) for dense, _, new in alike])
        if not bool(now.isfinite().all()):
            return bool(was.isfinite().all())
        gain = now - was.nan_to_num(torch.inf)
        error = float(gain.std()) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
        return float(gain.mean()) > CLEARLY * error

    @torch.no_grad()
    def _seen(self, network: nn.Module) -> list[Tensor]:
        """Run a network; return its outputs."""
        found: list[Tensor] = []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            scores = getattr(output, "logits", output)
            found.extend(_rows(item) for item in tensors_in(scores) if item.is_floating_point())

        with network.register_forward_hook(hook), repeatable(network, self._seed):
            self._run(network)
        return found


def _rows(output: Tensor) -> Tensor:
    """Return ``[S, C]`` scores at some positions; C = 1 for outputs that are no scores."""
    scores = output.dim() in (2, 3)
    rows = output.detach().reshape(-1, output.shape[-1] if scores else 1)
    most = max(MOST_VALUES // max(rows.shape[1], 1), 1)
    return rows[:: max(-(-len(rows) // most), 1)].float().clone()


def _are_alike(rows: Tensor) -> bool:
    """Tell whether ``[S, C]`` outputs at several positions are the same."""
    distance = (rows - rows[:1]).abs().max() if len(rows) > 1 else rows.new_tensor(torch.inf)
    return bool(distance <= ALIKE * rows.abs().max())


def _divergences(dense: Tensor, other: Tensor) -> Tensor:
    """Return ``[S]`` the KL divergence of each row of scores; of others a squared error, relative.

    The latter is relative to the mean energy of the dense outputs.
    """
    if dense.shape[1] > 1:
        target, given = dense.log_softmax(1), other.log_softmax(1)
        return F.kl_div(given, target, reduction="none", log_target=True).sum(1)
    energy = (dense - dense.mean()).square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (other - dense).square().sum(1) / energy
