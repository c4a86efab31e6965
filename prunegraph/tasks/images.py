"""Images of a user's, as tensors or as a loader, made into a split."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunegraph.core.errors import DataError
from prunegraph.core.splits import Split
from prunegraph.core.task import ExampleInputs
from prunegraph.data.stored import StoredImages
from prunegraph.graph import evaluation_mode
from prunegraph.tasks.base import Kind, checked_split
from prunegraph.tasks.batches import check_loader, is_finite
from prunegraph.tasks.classification import BATCH_SIZE, place_images
from prunegraph.tasks.outputs import class_logits

ImageBatch = Tensor | tuple[Tensor, Tensor] | list[Tensor] | Mapping[str, Tensor]

Images = tuple[Tensor, Tensor] | Iterable[ImageBatch]
"""``(images, labels)``, or a loader of such batches, of images alone, or of those of transformers:
``{"pixel_values": images, "labels": labels}``."""

MOST_VALUES = 2**22
"""Of the images that the network labels at once: 27 of 3 x 224 x 224."""


def image_split(
    kind: type[Kind],
    data: Split | Images,
    what: str,
    model: nn.Module,
    example_inputs: ExampleInputs | None,
    most: int,
) -> Kind:
    """Return images as a split of one kind; a split stays as it is.

    Args:
        kind: which of the three.
        data: a split, tensors or a loader.
        what: name of the argument, for errors.
        model: the classifier, which labels images that come without labels.
        example_inputs: what its forward takes, or None.
        most: images that are taken from a loader.

    Raises:
        DataError: images and labels do not fit together, or there are none.
        ModelError: the network returns no logits.
    """
    if isinstance(data, Split):
        return checked_split(kind, data, what)
    check_loader(data, what)
    batches: Iterable[Any] = data
    if isinstance(data, tuple):  # all of them
        batches, most = [data], len(data[0]) if isinstance(data[0], Tensor) else most
    channels = example_inputs.shape[1] if isinstance(example_inputs, Tensor) else None
    source = gather(model, batches, what, most, channels)
    return kind(source, torch.arange(len(source.labels)))


@torch.no_grad()
def gather(
    model: nn.Module, batches: Iterable[Any], what: str, most: int, channels: int | None
) -> StoredImages:
    """Return the first images of a loader, labelled by the network itself where it has none."""
    source = StoredImages()
    for batch in batches:
        images, labels = _checked(batch, what, channels, source)
        images = images[: most - len(source.labels)]
        if not is_finite(images):
            _check_answered(model, images, what, len(source.labels))
        labels = _answers(model, images) if labels is None else labels[: len(images)].cpu().long()
        source.add(images.cpu(), labels)
        if len(source.labels) >= most:
            break
    if not len(source.labels):
        msg = f"{what} holds no images: give a loader of images"
        raise DataError(msg)
    num_classes = _logits(model, source.load(torch.tensor([0]))[0]).shape[1]
    least, highest = (int(label) for label in source.labels.aminmax())
    if not 0 <= least <= highest < num_classes:
        msg = (
            f"{what} holds labels from {least} to {highest}, and the network tells classes 0 to "
            f"{num_classes - 1} apart: number them as it does"
        )
        raise DataError(msg)
    return source


def _check_answered(model: nn.Module, images: Tensor, what: str, first: int) -> None:
    """Raise DataError for an image with NaN or infinite values of which a network makes such."""
    for number, image in enumerate(images, first):
        if not (is_finite(image) or is_finite(_logits(model, image[None]))):
            msg = f"image {number} of {what} holds NaN or infinite values: repair or remove it"
            raise DataError(msg)


def _checked(
    batch: Any, what: str, channels: int | None, source: StoredImages
) -> tuple[Tensor, Tensor | None]:
    """Return images and labels of a batch, if it has any that fit those before."""
    if isinstance(batch, Mapping) and "pixel_values" in batch:
        batch = [batch[name] for name in ("pixel_values", "labels") if name in batch]
    if not isinstance(batch, Tensor | tuple | list):
        msg = (
            f"{what} holds batches of {type(batch).__name__}, not images or (images, labels): "
            "wrap the loader"
        )
        raise DataError(msg)
    found = (batch,) if isinstance(batch, Tensor) else tuple(batch)
    for problem in _problems(found, channels, source):
        raise DataError(f"{what} holds {problem}")  # noqa: EM102 - the sentence is the problem's
    return found[0], found[1] if len(found) > 1 else None


def _problems(found: tuple[Any, ...], channels: int | None, source: StoredImages) -> Iterator[str]:
    """Yield what is wrong with a batch."""
    if not found or not all(isinstance(part, Tensor) for part in found[:2]):
        kinds = ", ".join(type(part).__name__ for part in found)
        yield f"batches of ({kinds}), not images or (images, labels): wrap the loader"
    images, labels = found[0], found[1] if len(found) > 1 else None
    if labels is not None and (labels.is_floating_point() or labels.dim() != 1):
        yield (
            f"labels of {labels.dtype} and shape {list(labels.shape)}, not class numbers [b]: "
            "leave the labels out"
        )
    if images.dim() != 4 or images.shape[1] != (channels or images.shape[1]):
        yield (
            f"batches of shape {list(images.shape)}, not images [b, {channels or 'c'}, h, w]: give "
            "them as the network takes them"
        )
    if len(source.labels) and images.shape[1:] != source.image_shape:
        yield (
            f"images of {list(source.image_shape)} and {list(images.shape[1:])}: resize or crop "
            "them to one size"
        )
    if labels is not None and len(labels) != len(images):
        yield f"{len(labels)} labels for {len(images)} images"


def _answers(model: nn.Module, images: Tensor) -> Tensor:
    most = MOST_VALUES // max(images[0].numel(), 1)
    parts = images.split(max(min(BATCH_SIZE, most), 1))
    return torch.cat([_logits(model, part).argmax(1).cpu() for part in parts])


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with evaluation_mode(model):
        outputs = model(place_images(images, model))
    advice = ": wrap it, or make it a prunegraph.tasks.custom, which takes any loss"
    return class_logits(outputs, advice=advice)
