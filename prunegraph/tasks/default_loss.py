"""The loss of a search for a network of one's own, where its owner gives none."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.errors import DataError, ModelError, first_line
from prunegraph.tasks.classification import place_images

OWN_LOSS = "give your own as loss="
"""What to do where the default one does not fit."""

Loss = Callable[[nn.Module, Any], Tensor]
"""Of a network on a batch, summed over its samples."""


def cross_entropy(network: nn.Module, batch: Any) -> Tensor:
    """Return the cross-entropy of a batch ``(images [b, ...], class numbers [b, ...])``, summed.

    Raises:
        DataError: the batch is no such pair, or its labels do not fit the network's logits.
        ModelError: the network returns no tensor, or does not take the images.
    """
    pair = tuple(batch) if isinstance(batch, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        kind = type(batch).__name__
        msg = f"calibration_data holds batches of {kind}, not (images, class numbers): {OWN_LOSS}"
        raise DataError(msg)
    images, labels = pair
    try:
        logits: object = network(place_images(images, network))
    except RuntimeError as error:
        msg = (
            f"the network fails on calibration images of {list(images.shape)}: {first_line(error)}"
        )
        raise DataError(msg) from error
    if not isinstance(logits, Tensor):
        msg = f"{type(network).__name__} returns {type(logits).__name__}, not logits: {OWN_LOSS}"
        raise ModelError(msg)
    # those of a regression would pass for shares of classes
    if labels.is_floating_point() and logits.ndim < 2:
        msg = f"calibration_data holds labels of {labels.dtype}, no class numbers: {OWN_LOSS}"
        raise DataError(msg)
    try:
        return F.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")
    except (RuntimeError, ValueError, IndexError) as error:
        msg = (
            f"calibration_data holds labels {list(labels.shape)} of {labels.dtype}, which do not "
            f"fit logits of {list(logits.shape)} ({first_line(error)}): {OWN_LOSS}"
        )
        raise DataError(msg) from error
