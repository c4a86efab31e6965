"""Which inputs a proof runs on: small ones that hide nothing."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

from prunegraph.core.task import ExampleInputs
from prunegraph.graph.trace.calls import tensors_in

PROVED_TOKENS = 32
"""Tokens of a sequence that a proof runs on, at most."""

PROVED_SIDES = (64, 128)
"""Sides of images that a proof tries to run on, where both sides are half as long again."""


def filled(model: nn.Module, example_inputs: ExampleInputs) -> ExampleInputs | None:
    """Return the inputs with noise for what is the same throughout; None if nothing is.

    It would hide mistakes: where all tokens are alike, attention does not depend on its scores.
    Beside other inputs, what is not zero may be a mask or a size, and stays.
    """
    noise, found = torch.Generator().manual_seed(0), False
    alone = len(tensors_in(example_inputs)) == 1
    tables = [item.num_embeddings for item in model.modules() if isinstance(item, nn.Embedding)]

    def fill(tensor: Tensor) -> Tensor:
        nonlocal found
        plain = tensor.layout is torch.strided and tensor.dtype is not torch.bool
        value = tensor.reshape(-1)[0].item() if plain and tensor.numel() > 1 else 0
        whole = not tensor.is_floating_point()
        numbers = (min(tables, default=0) if whole and value == 0 else 1) * (alone or value == 0)
        if not (plain and numbers) or tensor.numel() < 2 or bool((tensor != value).any()):
            return tensor
        found = True
        drawn = numbers * torch.rand(tensor.shape, generator=noise)
        return (value - drawn.round() if whole and value else value + drawn).to(tensor)

    changed: ExampleInputs = tree_map_only(Tensor, fill, example_inputs)
    return changed if found else None


def shortened(model: nn.Module, example_inputs: ExampleInputs) -> ExampleInputs | None:
    """Return sequences of token numbers that are shorter; None if the inputs are none.

    Which widths agree does not depend on how many tokens there are, the time of the proof does.
    """
    tensors = tensors_in(example_inputs)
    shapes = {tuple(tensor.shape) for tensor in tensors}
    tables = any(isinstance(item, nn.Embedding) for item in model.modules())
    odd = any(tensor.ndim != 2 or tensor.is_floating_point() for tensor in tensors)
    if not tables or odd or len(shapes) != 1 or shapes.pop()[1] <= PROVED_TOKENS:
        return None
    shorter: ExampleInputs = tree_map_only(Tensor, lambda t: t[:, :PROVED_TOKENS], example_inputs)
    return shorter


def smaller_images(model: nn.Module, example_inputs: ExampleInputs) -> Iterator[ExampleInputs]:
    """Yield smaller images, or volumes, in the place of those of a convolutional network.

    Which channels can leave does not depend on the number of pixels, the time of the proof does.
    They are good where the forward takes the same steps on them.
    """
    tensors = tensors_in(example_inputs)
    layers = any(isinstance(module, _ConvNd) for module in model.modules())
    if not layers or len(tensors) != 1 or not tensors[0].is_floating_point():
        return
    sizes = tensors[0].shape[2:]
    for side in PROVED_SIDES:
        if len(sizes) > 1 and min(sizes) >= 1.5 * side:
            narrowed = tensors[0]
            for axis in range(2, narrowed.ndim):
                narrowed = narrowed.narrow(axis, 0, side)
            narrowed = narrowed.contiguous()
            yield tree_map_only(Tensor, lambda _, narrowed=narrowed: narrowed, example_inputs)
