"""Small images held in memory, normalised and augmented as whole batches."""

import hashlib
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunegraph.core.splits import Batch, HashedSource

PIXEL_MAX = 255.0


@dataclass(eq=False)
class MemorySource(HashedSource):
    """An ``ImageSource`` of uint8 images in memory.

    Augmentation is a random shift by up to ``padding`` pixels (zero padding and crop) and, if
    ``flip``, a left-right flip of half of the images.

    Attributes:
        images: ``[n, c, h, w]`` uint8.
        labels: ``[n]`` int64 class indices.
        num_classes: number of classes.
        mean: per-channel mean of pixels in [0, 1], subtracted.
        std: per-channel standard deviation, divided by.
        padding: largest shift of the augmentation in pixels.
        flip: whether the augmentation flips.
    """

    images: Tensor
    labels: Tensor
    _: KW_ONLY
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool

    def __post_init__(self) -> None:
        _, channels, height, width = self.images.shape
        self.image_shape = channels, height, width

    def load(self, index: Tensor, augment: torch.Generator | None = None) -> Batch:
        """Return float32 images ``[b, c, h, w]`` and labels ``[b]``; see ``ImageSource``."""
        images = self.images[index]
        if augment is not None:
            images = shift_and_flip(images, self.padding, flip=self.flip, generator=augment)
        return normalise(images, self.mean, self.std), self.labels[index]

    def hashed(self) -> Any:
        """Return the hash of pixels, labels and normalisation."""
        header = f"{tuple(self.images.shape)} {self.num_classes} {self.mean} {self.std}"
        digest = hashlib.sha256(header.encode())
        digest.update(self.images.numpy().data)
        digest.update(self.labels.numpy().data)
        return digest


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return ``(images / 255 - mean) / std`` as float32; images ``[b, c, h, w]`` uint8."""
    shift = torch.tensor(mean).view(1, -1, 1, 1)
    scale = torch.tensor(std).view(1, -1, 1, 1)
    return images.float().div_(PIXEL_MAX).sub_(shift).div_(scale)


def shift_and_flip(
    images: Tensor, padding: int, *, flip: bool, generator: torch.Generator
) -> Tensor:
    """Shift each image by its own random offset, and flip each with probability a half.

    Args:
        images: ``[b, c, h, w]``.
        padding: largest shift; what comes in from outside is zero (black).
        flip: whether to flip at all.
        generator: where offsets and flips are drawn from.

    Returns:
        New images ``[b, c, h, w]``.
    """
    count, channels, height, width = images.shape
    offsets = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    rows = offsets[0] + torch.arange(height)  # [b, h]
    columns = offsets[1] + torch.arange(width)  # [b, w]
    if flip:
        flipped = torch.rand((count, 1), generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4)
    return padded[
        torch.arange(count)[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
