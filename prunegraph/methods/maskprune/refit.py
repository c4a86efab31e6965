"""What gated weights read in the dense network: which units are dear, and least squares for them.

The optimal brain surgeon (Hassibi and Stork 1993) on columns of a weight, as the criterion ``obs``
has it, of weights that learn.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunegraph.core.masks import Float64Array, IntArray
from prunegraph.layerwise.blocks import BlockWalk, Matrix
from prunegraph.layerwise.statistics import MOST_INPUTS
from prunegraph.layerwise.weights import prunable_weights
from prunegraph.methods.criteria.obs import Reader, greedy_errors
from prunegraph.methods.maskprune.gates import Gates


class Refit:
    """Products of what each gated weight reads, as they are in the dense network.

    Args:
        model: the dense network, in eval mode, without gates.
        names: the weights; those that read more than ``MOST_INPUTS`` values are not refitted.
        batches: calibration data.
        forward: runs the network on a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        batches: Sequence[Any],
        forward: Callable[[nn.Module, Any], Any],
    ) -> None:
        known = prunable_weights(model)
        self._layouts = {
            name: known[name]
            for name in names
            if name in known and known[name].num_inputs <= MOST_INPUTS
        }
        self._readers: dict[str, Reader] = {}
        BlockWalk(model, self._layouts, batches, forward).run(self._note)

    def _note(self, matrix: Matrix) -> None:
        if matrix.seen:
            self._readers[matrix.name] = Reader.of(matrix.weight, matrix.hessians[0])

    def _columns(self, name: str, gates: Gates) -> IntArray:
        """Return ``[B]`` the gate of each column of a weight; K = none."""
        places = gates.places[name]
        return np.repeat(places, self._layouts[name].num_inputs // len(places))

    def errors(self, gates: Gates) -> Float64Array:
        """Return ``[K]`` what the outputs of the dense network lose when a unit goes.

        Units go one after the other and the others make up for it (``greedy_errors``). A sum over
        the weights that read the unit.
        """
        found = np.zeros(len(gates.values) + 1)
        for name, own in self._readers.items():
            reader = Reader(weight=own.weight.clone(), inverse=own.inverse.clone())
            places, column = np.unique(self._columns(name, gates), return_inverse=True)
            found[places] += greedy_errors([reader], column)
        return found[:-1]

    @torch.no_grad()
    def close(self, gates: Gates, keep: Tensor) -> None:
        """Close gates, and write the others into the weights, which make up for what closes.

        What closes counts as it was before it shrank. It can be done once.

        Args:
            gates: the gates; afterwards they are 1 or 0.
            keep: ``[K]`` 1 = open, 0 = closed.
        """
        values = torch.where(keep > 0.0, gates.values, 1.0)
        for name, weight in gates.weights.items():
            product = gates.product(name, values)
            if name in self._readers:
                layout = self._layouts[name]
                gone = np.flatnonzero(np.append(keep.cpu() == 0, False)[self._columns(name, gates)])
                matrix = layout.matrix(product).double()
                reader = replace(self._readers[name], weight=matrix)
                reader.remove(torch.from_numpy(gone).to(matrix.device))
                product = layout.tensor(reader.weight)
            weight.copy_(product)
        gates.values.copy_(keep)
