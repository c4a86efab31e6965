"""Whether a copy of a network is a network of its own, which a trial can change."""

import contextlib
import itertools
from collections import deque
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from prunegraph.core.errors import ModelError, first_line
from prunegraph.graph.copying import can_share, copy_network
from prunegraph.graph.late_weights import can_be_late, change_of, late
from prunegraph.graph.proof.subjects import ERRORS, Forward
from prunegraph.graph.trace.calls import WatchedCalls, tensors_in


def containers(model: nn.Module) -> list[Any]:
    """Return the containers that are attributes of modules."""
    values = [value for module in model.modules() for value in vars(module).values()]
    return [value for value in values if isinstance(value, dict | list | set | deque)]


def entries(part: dict[Any, Any] | Collection[Any]) -> list[Any]:
    """Return what a container holds, by identity: tensors have no single truth."""
    pairs = part.items() if isinstance(part, dict) else enumerate(part)
    return [(key, id(value)) for key, value in pairs]


def _not_its_own(model: nn.Module, what: str) -> str:
    """Return what is wrong where a copy of a network needs something of the original."""
    return (
        f"a copy of {type(model).__name__} computes with {what} of the network that it was copied "
        "from: a function that is bound to that one (a forward wrapped by hand, a hook or a lambda "
        "over self) takes part; make it a method of its module"
    )


def check_copies(model: nn.Module, run: Forward) -> bool:
    """Check that a copy of a network computes alone, writes into nothing of it, can be compared.

    ``copy.deepcopy`` shares functions: a forward that was wrapped by hand, or a lambda over
    ``self``, would go on to compute with the dense weights in every pruned copy.

    Returns:
        Whether a copy's weights can be made when they are read.

    Raises:
        ModelError: it does not.
    """
    if can_share(model):
        with contextlib.suppress(*ERRORS):  # a ModelError, too: what follows says it better
            memo = {id(p): late(p, change_of(p)) for p in model.parameters() if can_be_late(p)}
            _check_copy(model, copy_network(model, memo, share=True), run)
            return True
    _check_copy(model, copy_network(model, share=True), run)
    return False


def _check_copy(model: nn.Module, copied: nn.Module, run: Forward) -> None:
    """Check one copy, see ``check_copies``."""
    held = [entries(part) for part in containers(model)]
    names = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    own = {id(item): name for name, item in names.items()}
    found: list[str] = []

    def note(_: Any, given: list[Any], __: list[Any]) -> None:
        found.extend(own[id(leaf)] for leaf in given if id(leaf) in own)

    try:
        with WatchedCalls(note):
            outputs = run(copied, None)
    except ERRORS as error:
        raise ModelError(
            _not_its_own(model, f"what it lacks itself ({first_line(error)})")
        ) from error
    if found:
        raise ModelError(_not_its_own(model, found[0]))
    if held != [entries(part) for part in containers(model)]:
        raise ModelError(_not_its_own(model, "its containers"))
    if any(
        bool((item != item).any()) for item in tensors_in(outputs) if item.layout is torch.strided
    ):
        msg = f"the forward of {type(model).__name__} returns NaN: check weights and example inputs"
        raise ModelError(msg)
    if not any(item.is_floating_point() or item.is_complex() for item in tensors_in(outputs)):
        msg = (
            f"the forward of {type(model).__name__} returns no real or complex tensors, by which a "
            "pruned network could be compared with the masked one: let it return its logits, say"
        )
        raise ModelError(msg)
