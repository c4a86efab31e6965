"""A network that is silenced in place, mask after mask: nothing is built anew."""

import torch
from torch import Tensor, nn

from prunegraph.core.masks import ChannelMask
from prunegraph.graph import StructureGraph, copy_network
from prunegraph.graph.masked_norm import MaskedNorm
from prunegraph.graph.module_sizes import replace_module

NORMS = (nn.LayerNorm, nn.RMSNorm)
"""Norms over channels, which go by the kept ones."""


class Silenced:
    """A copy of a dense network whose removed units are zero, as ``zero_mask`` makes it.

    Args:
        model: the dense network, as it runs; it stays as it is.
        graph: its structure, of which ``can_silence`` says that it will do.

    Attributes:
        model: the copy.
        parameters: of it, by the dense network's names.
    """

    def __init__(self, model: nn.Module, graph: StructureGraph) -> None:
        network = copy_network(model)
        own = dict(network.named_parameters(remove_duplicate=False))
        dense = dict(model.named_parameters(remove_duplicate=False))
        units = {
            name: {axis: torch.from_numpy(each) for axis, each in axes.items()}
            for name, axes in graph.param_units.items()
            if name in own
        }
        self._parts = [(own[name].data, dense[name].data, axes) for name, axes in units.items()]
        self._norms: list[tuple[MaskedNorm, dict[int, Tensor]]] = []
        for path, module in list(network.named_modules()):
            if isinstance(module, NORMS) and f"{path}.weight" in units:
                norm = MaskedNorm(module, {})
                network = replace_module(network, path, norm)
                self._norms.append((norm, units[f"{path}.weight"]))
        self.model, self.parameters = network, own

    @torch.no_grad()
    def silence(self, mask: ChannelMask) -> nn.Module:
        """Return the network with what a mask removes silenced; it is the same one each time."""
        kept = torch.tensor(mask.keep)
        factors = kept.float()
        for tensor, dense, axes in self._parts:
            scaled = dense
            for axis, units in axes.items():
                shape = [-1 if other == axis else 1 for other in range(dense.ndim)]
                scaled = scaled * factors[units].view(shape).to(dense)
            tensor.copy_(scaled)
        for norm, axes in self._norms:
            for axis, units in axes.items():
                index: Tensor = norm.get_buffer(f"index{axis}")
                position = kept[units].nonzero().to(index.device)
                shape = [-1 if size != 1 or index.ndim == 1 else 1 for size in index.shape]
                setattr(norm, f"index{axis}", position.view(shape))
        return self.model


def can_silence(model: nn.Module, graph: StructureGraph) -> bool:
    """Tell whether zeros in weights and norms over kept channels are all that a mask changes."""
    odd = graph.means or graph.divisors or graph.gathers or any(op.computed for op in graph.ops)
    stored = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    kinds = (nn.GroupNorm, nn.MultiheadAttention)
    return not (
        odd
        or graph.param_units.keys() - stored - buffers
        or any(isinstance(module, kinds) for module in model.modules())
    )
