"""Networks on the meta device, whose weights have no values: these are drawn when they are read.

So the structure of a network that no memory holds is found, and proved, with the memory of one
weight. What can leave does not depend on the values of weights; a proof draws some anew anyway.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunegraph.core.errors import ModelError
from prunegraph.core.task import ExampleInputs
from prunegraph.graph.copying import copy_network
from prunegraph.graph.late_weights import SMALL, change_of, drawn, late


def has_no_values(model: nn.Module) -> bool:
    """Return whether some weight or buffer is on the meta device."""
    return any(item.is_meta for item in (*model.parameters(), *model.buffers()))


def drawn_network(model: nn.Module) -> nn.Module:
    """Return a copy on the CPU, the weights of which are drawn.

    Raises:
        ModelError: a buffer without values holds numbers or flags, which cannot be drawn.
    """
    memo: dict[int, object] = {}
    for name, buffer in model.named_buffers():
        if not buffer.is_meta:
            continue
        if buffer.is_floating_point() or buffer.is_complex():
            memo[id(buffer)] = drawn(buffer, len(memo))
        elif buffer.numel() > 1:
            msg = (
                f"{name} is on the meta device and may name positions: give this buffer its values "
                "(weights need none), or make the network by accelerate.init_empty_weights(), "
                "which keeps buffers"
            )
            raise ModelError(msg)
        else:  # a counter
            memo[id(buffer)] = torch.zeros_like(buffer, device="cpu")
    for parameter in model.parameters():
        if parameter.is_meta and parameter.numel() > SMALL:
            memo[id(parameter)] = late(parameter, replace(change_of(parameter), seed=len(memo)))
        elif parameter.is_meta:
            own = drawn(parameter.detach(), len(memo))
            memo[id(parameter)] = nn.Parameter(own, requires_grad=parameter.requires_grad)
    return copy_network(model, memo, share=True)


def drawn_inputs(model: nn.Module, example_inputs: ExampleInputs) -> ExampleInputs:
    """Return inputs on the CPU: noise, and token numbers, where they are on the meta device."""
    tables = [item.num_embeddings for item in model.modules() if isinstance(item, nn.Embedding)]
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if tensor.is_floating_point() or tensor.is_complex():
            return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        most = 2 if tensor.dtype is torch.bool else min(tables, default=1)
        least = int(tensor.dtype is torch.bool)  # a mask lets all pass
        return torch.randint(least, most, tensor.shape, generator=generator).to(tensor.dtype)

    given: ExampleInputs = tree_map_only(Tensor, draw, example_inputs)
    return given
