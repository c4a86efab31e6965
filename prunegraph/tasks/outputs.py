"""What a network gives while its loss is computed: one forward serves both."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from prunegraph.core.splits import Batch


def loss_and_outputs(
    loss: Callable[[nn.Module, Batch], Tensor], model: nn.Module, batch: Batch
) -> tuple[Tensor, Any]:
    """Return the loss of a network on a batch, and what its last forward for it gave."""
    given: list[Any] = [None]

    def note(module: nn.Module, args: Any, outputs: Any) -> None:
        given[0] = outputs

    handle = model.register_forward_hook(note)
    try:
        return loss(model, batch), given[0]
    finally:
        handle.remove()
