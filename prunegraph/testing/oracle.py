"""The oracle of structured pruning: a silenced network and a smaller one compute the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torchvision  # noqa: F401  # makes torch.ops.torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from prunegraph.core.budget import Cost
from prunegraph.core.masks import ChannelMask
from prunegraph.graph import (
    ExampleInputs,
    StructureGraph,
    call_forward,
    cast_inputs,
    copy_network,
    evaluation_mode,
    fresh,
    repeatable,
    unwrap,
)
from prunegraph.graph.apply import apply_mask, zero_mask
from prunegraph.graph.trace.calls import tensors_in

TOLERANCE = 1e-5
"""Largest accepted difference relative to the largest output."""

LEAST_RESPONSE = 1e-10
"""Share of the largest output below which what inputs change is as good as nothing."""

FLOPS_PER_MAC = 2


def _grouped_flops(rows: tuple[int, ...], weight: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Count rows ``[T, in]`` times weights ``[groups, in, out]``; torch's counter does not."""
    return FLOPS_PER_MAC * rows[0] * prod(weight[1:])


def _vector_flops(left: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Count a matrix times a vector, or one vector times another."""
    return FLOPS_PER_MAC * prod(left)


def _attention_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any
) -> int:
    """Count attention, ``[b, heads, n, width]``, of a backend that a forward has asked for."""
    scores = prod(query[:-1]) * key[-2]
    return FLOPS_PER_MAC * scores * (query[-1] + value[-1])


def _recurrent_flops(
    inputs: tuple[int, ...], weight: tuple[int, ...], hidden: tuple[int, ...], *_: Any, **__: Any
) -> int:
    """Count one layer and direction of a fused recurrent layer, ``[steps, b, in]``."""
    return FLOPS_PER_MAC * prod(inputs[:-1]) * (prod(weight) + prod(hidden))


def _deformed_flops(
    _source: tuple[int, ...], weight: tuple[int, ...], *_: Any, out_shape: tuple[int, ...]
) -> int:
    """Count a convolution that reads at offset places."""
    return FLOPS_PER_MAC * prod(weight[1:]) * prod(out_shape)


UNCOUNTED = {
    getattr(torch.ops.aten, name): count
    for name, count in {
        "_grouped_mm": _grouped_flops,  # since torch 2.8
        "mv": _vector_flops,
        "dot": _vector_flops,
        "vdot": _vector_flops,
        "mkldnn_rnn_layer": _recurrent_flops,
        "_scaled_dot_product_flash_attention_for_cpu": _attention_flops,
    }.items()
    if hasattr(torch.ops.aten, name)
} | {torch.ops.torchvision.deform_conv2d: _deformed_flops}
"""What torch's counter leaves out."""


class NothingComparedError(AssertionError):
    """The outputs do not depend on the inputs, so that their equality would prove nothing."""


def assert_masked_equals_pruned(
    model: nn.Module,
    graph: StructureGraph,
    mask: ChannelMask,
    example: ExampleInputs,
    *,
    dtype: torch.dtype = torch.float64,
    tolerance: float = TOLERANCE,
) -> float:
    """Assert that surgery and the graph's costs are right for one mask.

    The silenced network (``zero_mask``) and the pruned one (``apply_mask``) must give equal
    outputs; the pruned one's multiply-adds, counted by ``torch.utils.flop_counter``, and its
    parameters must be exactly those that the graph says.

    Args:
        model: the dense network; it is left as it is.
        graph: its structure.
        mask: which units stay.
        example: inputs of the shape that was analysed.
        dtype: precision of the comparison; in float64 rounding cannot hide a wrong channel.
        tolerance: largest accepted difference relative to what the inputs change in the outputs,
            so that a large constant (a bias) cannot hide a wrong channel.

    Returns:
        The largest relative difference.

    Raises:
        AssertionError: an output, the multiply-adds or the parameters differ.
        NothingComparedError: the outputs do not depend on the inputs.
    """
    dense = copy_network(unwrap(model))
    dense._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)  # complex ones stay
    inputs = cast_inputs(example, dtype)
    pruned, masked = apply_mask(dense, graph, mask), zero_mask(dense, graph, mask)
    expected = _outputs(masked, inputs)
    difference = largest_difference(
        expected, _outputs(pruned, inputs), scale=_response(masked, inputs, expected)
    )
    if not difference <= tolerance:
        msg = (
            f"masked and pruned outputs differ by {difference:.1e} of their range, more "
            f"than {tolerance:.0e}, for mask {mask.digest()}"
        )
        raise AssertionError(msg)
    said, counted = graph.cost(mask), count_cost(pruned, inputs)
    if said != counted:
        msg = f"the graph says {said} for mask {mask.digest()}, the pruned network has {counted}"
        raise AssertionError(msg)
    return difference


def count_cost(model: nn.Module, inputs: ExampleInputs) -> Cost:
    """Count a network's multiply-adds with ``torch.utils.flop_counter``, and its parameters.

    Attention is counted as the matrix products that it is: the fast path of ``MultiheadAttention``
    is off and scaled dot products use the plain backend.
    """
    counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
    with _without_gradients(model), evaluation_mode(model), sdpa_kernel(SDPBackend.MATH), counter:
        call_forward(model, fresh(inputs))
    return Cost(
        macs=counter.get_total_flops() // FLOPS_PER_MAC,
        params=sum(parameter.numel() for parameter in model.parameters()),
    )


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Let no parameter ask for gradients.

    The counter fails where a module is called with a view of one that does.
    """
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def largest_difference(
    expected: list[Tensor], found: list[Tensor], *, scale: float | None = None
) -> float:
    """Return the largest difference relative to ``scale``; None = the largest expected value.

    Raises:
        AssertionError: the tensors differ in number or shape.
        NothingComparedError: the scale is zero.
    """
    shapes = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in found]
    if shapes[0] != shapes[1]:
        msg = f"the outputs have shapes {shapes[1]}, expected {shapes[0]}"
        raise AssertionError(msg)
    if scale is None:
        scale = max((float(t.abs().max()) for t in expected), default=0.0)
    if not scale > 0.0:
        msg = (
            "the outputs are the same whatever the inputs, so nothing is compared: give random "
            "inputs, and initialise a last layer of zeros"
        )
        raise NothingComparedError(msg)
    worst = [float((one - other).abs().max()) for one, other in zip(expected, found, strict=True)]
    return float(torch.tensor(worst).max()) / scale  # a NaN is the maximum


def _response(model: nn.Module, inputs: ExampleInputs, outputs: list[Tensor]) -> float:
    """Return how far the outputs move when floating-point inputs are set to zero, at most.

    Never more than the largest output; that alone if no input is of floating point. Zero if it is
    so little that rounding would decide.
    """
    largest = max((float(t.abs().max()) for t in outputs), default=0.0)
    if not any(tensor.is_floating_point() for tensor in tensors_in(inputs)):
        return largest
    blank = _outputs(model, tree_map(_blank, inputs))
    moves = (float((a - b).abs().max()) for a, b in zip(outputs, blank, strict=True))
    response = min(largest, max(moves, default=0.0))
    return response if response > LEAST_RESPONSE * largest else 0.0


def _blank(value: Any) -> Any:
    is_signal = isinstance(value, Tensor) and value.is_floating_point()
    return torch.zeros_like(value) if is_signal else value


def _outputs(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    """Return the floating-point tensors that a forward in eval mode gives."""
    with evaluation_mode(model), repeatable(model), sdpa_kernel(SDPBackend.MATH):
        output = call_forward(model, fresh(inputs))
    return [t for t in tensors_in(output) if t.is_floating_point() and t.numel()]
