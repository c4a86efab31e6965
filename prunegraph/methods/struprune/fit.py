"""One module: which of its units stay, and the weights that make up for the others."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from prunegraph.core.masks import IntArray
from prunegraph.layerwise.admm import Neurons, Rows, biased, fit_neurons
from prunegraph.layerwise.solve import Hessian
from prunegraph.layerwise.weights import PrunableWeight, prunable_weights
from prunegraph.methods.criteria.obs import Reader, greedy_errors
from prunegraph.methods.struprune.modules import Module, find_activation

PROBED = 256
"""Rows on which an activation is tried."""


class Layers:
    """The linear layers of a network; weights as matrices, a bias as a last column.

    Args:
        network: the network.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._layouts = prunable_weights(network)

    def layer(self, name: str) -> nn.Module:
        """Return the layer of a weight."""
        return self.network.get_submodule(self._layouts[name].module)

    def _parameters(self, name: str) -> tuple[PrunableWeight, Tensor, Tensor | None]:
        bias = getattr(self.layer(name), "bias", None)
        return self._layouts[name], self.network.get_parameter(name).detach(), bias

    def read(self, name: str) -> Tensor:
        """Return ``[out, B]`` float32, or ``[out, B + 1]`` with a bias: a copy."""
        layout, weight, bias = self._parameters(name)
        parts = [layout.matrix(weight).float()]
        parts += [] if bias is None else [bias.detach().float()[:, None]]
        return torch.cat(parts, dim=1)

    def write(self, name: str, matrix: Tensor) -> None:
        """Take a weight as ``read`` returns it."""
        layout, weight, bias = self._parameters(name)
        weight.copy_(layout.tensor(matrix[:, : layout.num_inputs].to(weight)))
        if bias is not None:
            bias.copy_(matrix[:, layout.num_inputs])


def flat(values: Tensor) -> Tensor:
    """Return ``[B, ..., D]`` as rows ``[S, D]`` float32."""
    return values.flatten(0, -2).float()


def choose(module: Module, rows: Rows, weight: Tensor, count: int) -> IntArray:
    """Return the units that stay: the last ones that the optimal brain surgeon would remove.

    Args:
        module: the module.
        rows: what its reader is given.
        weight: ``[out, B]`` of the reader, or with a bias.
        count: units that stay.
    """
    unique, column = np.unique(module.units, return_inverse=True)
    if count >= len(unique):
        return unique
    inputs = rows.inputs * rows.scale
    hessian = Hessian(inputs.T @ inputs / len(inputs), name=module.reader)
    errors = greedy_errors([Reader.of(weight[:, : inputs.shape[1]], hessian)], column)
    return np.sort(unique[np.argsort(-errors, kind="stable")[:count]])


@dataclass(frozen=True, eq=False, kw_only=True)
class Fitted:
    """What became of a module.

    Attributes:
        kept: units that stay.
        hidden: ``[S, B]`` what the reader is given now.
        errors: on held-out rows: by least squares, and after each round.
    """

    kept: IntArray
    hidden: Tensor
    errors: list[float]


def fit_module(
    module: Module,
    layers: Layers,
    given: Rows,
    inputs: Tensor | None,
    share: float,
    count: int,
    rounds: int,
) -> Fitted:
    """Cut and fit a module in place; inputs of its reader that go get weights of 0.

    Args:
        module: the module.
        layers: of the network.
        given: what its reader is given and should give.
        inputs: ``[S, D]`` what its writers read; None if it is not known.
        share: of the rows, that is fitted on.
        count: units that stay.
        rounds: of ADMM, at most.
    """
    weight, width = layers.read(module.reader), given.inputs.shape[1]
    own, others = given.parted(share)
    kept = choose(module, own, weight, count)
    stays = torch.from_numpy(np.isin(module.units, kept))
    columns = torch.cat([stays, torch.ones(weight.shape[1] - width, dtype=torch.bool)])
    found = None
    if rounds and inputs is not None:
        found = _neurons(module, layers, inputs, given.inputs, stays, weight[:, columns])
    hidden = given.inputs[:, stays]
    if found is None:
        last = own.refitted(weight[:, columns], hidden[: len(own.inputs)])
        errors = [others.error(last, hidden[-len(others.inputs) :])]
    else:
        names, neurons, inputs = found
        rows = replace(given, inputs=inputs)
        neurons, errors = fit_neurons(neurons, *rows.parted(share), rounds)
        last, hidden = neurons.down, neurons.hidden(inputs)
        for name, part in zip(names, (neurons.gate, neurons.up), strict=False):
            if part is not None:
                layers.write(name, layers.read(name).index_put((stays,), part))
    fitted, read = torch.zeros_like(weight), torch.zeros_like(given.inputs)
    fitted[:, columns], read[:, stays] = last, hidden
    layers.write(module.reader, fitted)
    return Fitted(kept=kept, hidden=read, errors=errors)


def _neurons(
    module: Module, layers: Layers, inputs: Tensor, hidden: Tensor, stays: Tensor, last: Tensor
) -> tuple[list[str], Neurons, Tensor] | None:
    """Return writers, those of their neurons that stay, and inputs ``[S, D]`` as they take them.

    None if it is not known what the module computes.
    """
    weights = [layers.read(name) for name in module.writers]
    inputs = biased(inputs, weights[0])
    if any(weight.shape[1] != inputs.shape[1] for weight in weights):
        return None
    written = [inputs[:PROBED] @ weight.T for weight in weights]
    found = find_activation(layers.network, module, written, hidden[:PROBED])
    if found is None:
        return None
    activation, order = found
    first, *others = (weights[place][stays] for place in order)
    up = others[0] if others else None
    neurons = Neurons(gate=first, up=up, down=last, activation=activation)
    return [module.writers[place] for place in order], neurons, inputs
