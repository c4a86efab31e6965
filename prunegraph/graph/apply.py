"""Surgery as users call it: wrappers taken off, the new network tried out, the optimizer sliced."""

import copy
from typing import overload

import torch
from torch import Tensor, nn

from prunegraph.core.errors import SurgeryError, one_line
from prunegraph.core.masks import ChannelMask
from prunegraph.core.task import ExampleInputs
from prunegraph.graph.analyse import (
    call_forward,
    evaluation_mode,
    fresh,
    runner,
    state_kept,
    unwrap,
)
from prunegraph.graph.branches import without_blocks
from prunegraph.graph.graph import StructureGraph
from prunegraph.graph.proof.subjects import Subject
from prunegraph.graph.proof.trial import failing_frame, failure_of
from prunegraph.graph.surgery import apply_mask as slice_network
from prunegraph.graph.surgery import slice_plans, stored, take
from prunegraph.graph.surgery import zero_mask as zero_network


@overload
def apply_mask(
    model: nn.Module,
    graph: StructureGraph,
    mask: ChannelMask,
    *,
    example_inputs: ExampleInputs | None = None,
    optimizer: None = None,
) -> nn.Module: ...


@overload
def apply_mask(
    model: nn.Module,
    graph: StructureGraph,
    mask: ChannelMask,
    *,
    example_inputs: ExampleInputs | None = None,
    optimizer: torch.optim.Optimizer,
) -> tuple[nn.Module, torch.optim.Optimizer]: ...


def apply_mask(
    model: nn.Module,
    graph: StructureGraph,
    mask: ChannelMask,
    *,
    example_inputs: ExampleInputs | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module | tuple[nn.Module, torch.optim.Optimizer]:
    """Return a new network without the prunable units that the mask removes.

    Shared parameters stay shared; dtype, device, memory format, ``requires_grad``, hooks and each
    module's training flag are kept. Wrappers of DDP and ``torch.compile`` are taken off.

    Args:
        model: the dense network; it is left bit-equal.
        graph: the structure of ``model``.
        mask: which units stay.
        example_inputs: if given, the new network is run on them, in eval mode, and must compute
            what the zero-masked one does.
        optimizer: if given, a copy of it for the new network, with sliced state, is returned too.

    Returns:
        The pruned network, or ``(network, optimizer)`` if an optimizer was given.

    Raises:
        MaskError: the mask is not of this graph.
        SurgeryError: the graph is not of this network, the forward cannot follow or computes
            something else, or the optimizer's state cannot be sliced.
    """
    dense = unwrap(model)
    pruned = slice_network(dense, graph, mask)
    if example_inputs is not None:
        check_forward(pruned, example_inputs)
        problem = unequal(dense, graph, mask, example_inputs)
        if problem is not None:
            raise SurgeryError(problem)
    pruned = without_blocks(pruned, graph, mask.keep)
    if optimizer is None:
        return pruned
    plans = slice_plans(stored(dense, graph), graph, mask)
    return pruned, _sliced_optimizer(optimizer, dense, pruned, plans)


def zero_mask(model: nn.Module, graph: StructureGraph, mask: ChannelMask) -> nn.Module:
    """Return a copy of the same shape in which the removed prunable units are silent.

    Its outputs equal those of ``apply_mask``; see ``prunegraph.graph.surgery.zero_mask``.
    """
    return zero_network(unwrap(model), graph, mask)


def check_forward(model: nn.Module, example_inputs: ExampleInputs) -> None:
    """Run the network once in eval mode without gradients.

    Raises:
        SurgeryError: the forward raises; the message names the module, the line and the reason.
    """
    try:
        with evaluation_mode(model), state_kept(model):
            call_forward(model, fresh(example_inputs))
    except Exception as error:
        raise SurgeryError(_failure(model, error)) from error


def unequal(
    model: nn.Module, graph: StructureGraph, mask: ChannelMask, example_inputs: ExampleInputs
) -> str | None:
    """Return why the pruned network computes something else than the zero-masked one, if it does.

    The analysis has tried other masks, and perhaps other inputs.
    """
    model = unwrap(model)
    with evaluation_mode(model):
        failure = failure_of(Subject(model, runner(example_inputs)), graph, mask.keep)
    if failure is None:
        return None
    return (
        f"{type(model).__name__} cannot follow this mask: {failure.reason}; its forward may ask "
        "for a width, or do something else on these inputs than on those that were analysed"
    )


def _failure(model: nn.Module, error: Exception) -> str:
    """Say in which module and at which line of its forward the pruned network failed."""
    found = failing_frame(model, error)
    place = "an unknown place"
    if found is not None:
        path, frame = found
        owner = model.get_submodule(path)
        name = path or type(model).__name__
        place = f"module {name!r}, {type(owner).__name__}.{frame.name}: `{frame.line}`"
    reason = one_line(error, 200)
    return (
        f"the pruned network's forward cannot follow at {place} ({reason}); if it holds a literal "
        "size, compute it from x.shape, or analyse with trial=True, which freezes such channels"
    )


def _sliced_optimizer(
    optimizer: torch.optim.Optimizer,
    dense: nn.Module,
    pruned: nn.Module,
    plans: dict[int, dict[int, Tensor]],
) -> torch.optim.Optimizer:
    """Return a copy of the optimizer whose groups and state are those of the pruned network."""
    pairs = zip(dense.parameters(), pruned.parameters(), strict=True)
    memo: dict[int, Tensor] = {id(old): new for old, new in pairs}
    trained = {id(item) for group in optimizer.param_groups for item in group["params"]}
    if isinstance(optimizer, torch.optim.LBFGS) or not trained & memo.keys():
        what = "keeps its state in one piece" if trained & memo.keys() else "trains another network"
        msg = f"the {type(optimizer).__name__} {what}: start a new one for the pruned network"
        raise SurgeryError(msg)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            memo.setdefault(id(parameter), parameter)  # of no concern to this network
    for parameter, state in optimizer.state.items():
        plan = plans.get(id(parameter))
        for name, value in state.items():
            if plan is None or not isinstance(value, Tensor) or value.numel() == 1:
                continue
            if value.shape != parameter.shape:
                msg = (
                    f"{type(optimizer).__name__} keeps {name!r} in shape {tuple(value.shape)} for "
                    f"a parameter of shape {tuple(parameter.shape)}, which cannot be sliced: start "
                    "a new optimizer for the pruned network"
                )
                raise SurgeryError(msg)
            memo[id(value)] = take(value, plan)
    return copy.deepcopy(optimizer, dict(memo))
