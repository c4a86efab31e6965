"""2:4 masks on GPUs that skip their zeros."""

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured

from prunegraph.core.errors import MaskError, ModelError, first_line
from prunegraph.core.pattern import Pattern
from prunegraph.core.weight_mask import Network, WeightMask
from prunegraph.graph import copy_network

LEAST_CAPABILITY = (8, 0)
"""Of an NVIDIA GPU: Ampere, the first with sparse tensor cores."""


@torch.no_grad()
def to_semi_structured(model: Network, mask: WeightMask) -> Network:
    """Return a copy of a network whose 2:4 linear layers run on sparse tensor cores.

    Their weights become ``torch.sparse`` tensors, for inference only.

    Args:
        model: the pruned network in float16 or bfloat16, on an NVIDIA GPU from Ampere on.
        mask: of the pattern 2:4. Weights of linear layers alone are converted.

    Raises:
        MaskError: the mask is not 2:4, or the network is not zero where it removes.
        ModelError: the device or precision has no such kernels, or a layer's sizes do not fit them.
    """
    if mask.pattern != Pattern.parse("2:4"):
        msg = f"the mask has the pattern {mask.pattern}, sparse tensor cores need 2:4: prune anew"
        raise MaskError(msg)
    mask.check_zeros(model)
    weight = next(iter(mask.parameters_of(model).values()))
    device = weight.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        msg = f"the network is on {device}: sparse tensor cores need an NVIDIA A100 or newer"
        raise ModelError(msg)
    if weight.dtype not in (torch.float16, torch.bfloat16):
        msg = f"the network is {weight.dtype}: sparse tensor cores need model.half() or .bfloat16()"
        raise ModelError(msg)
    sparse = copy_network(model).eval().requires_grad_(False)
    for name in mask.keep:
        module = sparse.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear):
            try:
                module.weight = nn.Parameter(
                    to_sparse_semi_structured(module.weight), requires_grad=False
                )
            except (RuntimeError, ValueError) as error:
                msg = f"{name} does not fit sparse tensor cores ({first_line(error)})"
                raise ModelError(msg) from error
    return sparse
