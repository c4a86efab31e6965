"""What a network gives: its logits, and what it gave while its loss was computed."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from prunegraph.core.errors import ModelError
from prunegraph.core.splits import Batch


def loss_and_outputs(
    loss: Callable[[nn.Module, Batch], Tensor], model: nn.Module, batch: Batch
) -> tuple[Tensor, Any]:
    """Return the loss of a network on a batch, and what its last forward for it gave."""
    given: list[Any] = [None]

    def note(module: nn.Module, args: Any, outputs: Any) -> None:
        given[0] = outputs

    with model.register_forward_hook(note):
        return loss(model, batch), given[0]


def logits_in(outputs: Any) -> Any:
    """Return what a network returns, or the logits that an object of transformers holds.

    A tuple stays one: that of a network with auxiliary outputs has logits in training alone.
    """
    return outputs if isinstance(outputs, tuple) else getattr(outputs, "logits", outputs)


def class_logits(outputs: Any, rows: str = "images", advice: str = "") -> Tensor:
    """Return the logits ``[rows, classes]`` in what a classifier returns.

    Args:
        outputs: the logits, or what networks of transformers return, which holds them.
        rows: what the first axis is, for errors.
        advice: what an error says to do.

    Raises:
        ModelError: there are none.
    """
    found = logits_in(outputs)
    if isinstance(found, Tensor) and found.ndim == 2:
        return found
    what = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    msg = f"the network returns {what}, not logits [{rows}, classes]{advice}"
    raise ModelError(msg)
