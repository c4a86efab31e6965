"""What layers read at sampled positions, as rows that their weight is multiplied by."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
"""Layers that are known by their class."""

POSITIONS, ALIKE = 16, 32
"""Output positions that are sampled of a layer, the same in so many samples of a batch.

One draw for a large batch would leave out most of what lies at the borders, say. Each sequence has
positions of its own.
"""

ROWS_AN_INPUT = 16
"""Rows for each input of a layer that reads sequences: all positions, where these are no more.

A fit on fewer follows their noise. The first position of a language model may carry activations a
hundred times as large as those of all others (Sun et al. 2024, arXiv 2402.17762): a few positions a
sequence either miss it or give it a weight that it does not have.
"""

PROBES = 3
"""Random inputs by which a module is found to compute what a linear layer does."""


def input_axis(module: nn.Module) -> int | None:
    """Return the axis of a layer's weight along which its inputs lie; None for other layers.

    1 for linear layers and convolutions, 0 for transposed ones without groups; a depthwise one has
    no inputs to lose. A module of another unit, or with a forward of its own, is a linear layer if
    it computes what one does: with its weight as such a layer stores it, or transposed (``Conv1D``
    of transformers), which gives 0.
    """
    kind = next((kind for kind in LAYERS if isinstance(module, kind)), None)
    if kind is not None and type(module).forward is kind.forward:
        groups = getattr(module, "groups", 1)
        if kind in TRANSPOSED:
            return 0 if groups == 1 else None
        return None if groups > 1 and groups == getattr(module, "in_channels", 0) else 1
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or next(module.children(), None):
        return None
    if not weight.is_floating_point():
        return None
    inputs = torch.randn(PROBES, max(weight.shape), generator=torch.Generator().manual_seed(0))
    near = torch.finfo(weight.dtype).eps ** 0.5
    for axis, laid in ((1, weight), (0, weight.T)):
        probe = inputs[:, : laid.shape[1]].to(weight)
        try:
            outputs = module.forward(probe)  # without its hooks: one of them may have asked
            if torch.allclose(outputs, F.linear(probe, laid, bias), rtol=near, atol=near):
                return axis
        except Exception:  # a forward may raise anything
            continue
    return None


def outputs_first(weight: Tensor) -> Tensor:
    """Turn a weight ``[in, out, ...]`` into that of the same layer not transposed, or back."""
    return weight.transpose(0, 1).flip(tuple(range(2, weight.ndim)))


def rows_needed(module: nn.Module, values: Tensor, num_inputs: int) -> int:
    """Return how many rows the fit of a layer needs; 0 if it reads no sequences.

    Args:
        module: the layer.
        values: what it reads or returns in one call; of sequences ``[B, positions, D]``.
        num_inputs: of the layer in the dense network.
    """
    sequences = values.dim() == 3 and not isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))
    return ROWS_AN_INPUT * num_inputs if sequences else 0


def sampled_inputs(
    module: nn.Module, inputs: Tensor, generator: torch.Generator, least: int = 0
) -> Tensor:
    """Return what sampled outputs of a layer are made of.

    Args:
        module: a layer that has an ``input_axis``, or ``nn.MultiheadAttention``.
        inputs: what it reads in one call.
        generator: draws the outputs' positions.
        least: outputs of the whole call, where there are so many; ``POSITIONS`` of each sample.

    Returns:
        ``[S, D]`` float32; the product with the flattened weight ``[out, D]`` is the outputs
        without bias.
    """
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        batch = inputs if inputs.dim() == module.weight.dim() else inputs[None]
        positions = max(POSITIONS, least // max(len(batch), 1))
        rows = [_patches(module, part, generator, positions) for part in batch.split(ALIKE)]
    else:
        rows = _tokens(inputs, generator, least)
    return torch.cat([part.flatten(0, 1) for part in rows]).float()


def sampled_outputs(
    module: nn.Module, outputs: Tensor, generator: torch.Generator, least: int = 0
) -> Tensor:
    """Return ``[S, out]`` float32 the sampled ones of outputs of a layer; see ``sampled_inputs``.

    From an equal generator they are those that the rows of ``sampled_inputs`` give.
    """
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        batch = outputs if outputs.dim() == module.weight.dim() else outputs[None]
        rows = _alike(batch.flatten(2).movedim(1, 2), generator, least)
    else:
        rows = _tokens(outputs, generator, least)
    return torch.cat([part.flatten(0, 1) for part in rows]).float()


def _tokens(values: Tensor, generator: torch.Generator, least: int) -> list[Tensor]:
    """Return ``[b, L, D]`` the values ``[B, ..., D]`` at sampled positions."""
    if values.dim() == 3:
        return [_of_sequences(values, generator, least)]
    batch = values.reshape(1 if values.dim() == 1 else len(values), -1, values.shape[-1])
    return _alike(batch, generator, least)


def _of_sequences(batch: Tensor, generator: torch.Generator, least: int) -> Tensor:
    """Return ``[B, L, D]`` some values of each sequence ``[B, positions, D]``."""
    positions = max(POSITIONS, -(-least // max(len(batch), 1)))
    if positions >= batch.shape[1]:
        return batch
    keys = torch.rand(batch.shape[:2], generator=generator)
    index = keys.topk(positions, dim=1).indices.to(batch.device)
    return batch.gather(1, index[..., None].expand(-1, -1, batch.shape[2]))


def _alike(batch: Tensor, generator: torch.Generator, least: int) -> list[Tensor]:
    """Return ``[b, L, D]`` the values ``[B, positions, D]`` where ``ALIKE`` samples agree."""
    positions = max(POSITIONS, least // max(len(batch), 1))
    parts = batch.split(ALIKE)
    return [part[:, _draw(part.shape[1], generator)[:positions]] for part in parts]


def _patches(module: _ConvNd, inputs: Tensor, generator: torch.Generator, positions: int) -> Tensor:
    """Return ``[B, L, channels * taps]`` what a convolution reads at sampled positions."""
    strides = module.stride
    if isinstance(module, TRANSPOSED):
        inputs, strides = _spread(module, inputs), (1,) * len(strides)
    else:
        padding = module._reversed_padding_repeated_twice  # of every padding, "same" included
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = F.pad(inputs, padding, mode=mode) if any(padding) else inputs
    corners, taps = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for axis, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, strides, module.dilation, strict=True), start=2
    ):
        count = (inputs.shape[axis] - dilation * (kernel - 1) - 1) // stride + 1
        step = inputs.shape[axis + 1 :].numel()
        corners = (corners[:, None] + step * stride * torch.arange(count)).flatten()
        taps = (taps[:, None] + step * dilation * torch.arange(kernel)).flatten()
    corners = corners[_draw(len(corners), generator)[:positions]]
    index = (corners[:, None] + taps).to(inputs.device)  # [L, taps]
    return inputs.flatten(2)[:, :, index].movedim(2, 1).flatten(2)


def _spread(module: _ConvNd, inputs: Tensor) -> Tensor:
    """Return what a plain convolution reads to give what a transposed one does: zeros between."""
    sizes = zip(inputs.shape[2:], module.stride, strict=True)
    spread = inputs.new_zeros(*inputs.shape[:2], *((size - 1) * step + 1 for size, step in sizes))
    places = [slice(None, None, step) for step in module.stride]
    spread[(slice(None), slice(None), *places)] = inputs
    padding: list[int] = []
    for axis in reversed(range(len(module.stride))):
        own = module.dilation[axis] * (module.kernel_size[axis] - 1) - int(module.padding[axis])
        padding += [own, own + module.output_padding[axis]]
    return F.pad(spread, padding)


def _draw(count: int, generator: torch.Generator) -> Tensor:
    """Return positions in a random order."""
    return torch.randperm(count, generator=generator)
