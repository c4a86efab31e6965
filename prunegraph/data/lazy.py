"""Large images that stay on disk and are decoded when they are asked for."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from prunegraph.core.splits import Batch, HashedSource
from prunegraph.data.decode import Crop, decode_all
from prunegraph.data.memory import normalise
from prunegraph.data.records import Record

CROP_ATTEMPTS = 10
DRAWS_PER_IMAGE = 4 * CROP_ATTEMPTS + 1
AREA_RANGE = (0.08, 1.0)
LOG_ASPECT_RANGE = (math.log(3 / 4), math.log(4 / 3))
CENTRE_SHARE = 0.875  # 224 of 256
SMALL_SIDE = 64


@dataclass(eq=False)
class LazySource(HashedSource):
    """An ``ImageSource`` that decodes files on demand, as ImageNet networks expect them.

    Evaluation resizes the shorter side to ``size / 0.875`` and cuts the centre; augmentation is
    the random resized crop (area 0.08 to 1, aspect 3/4 to 4/3) and a flip of half of the images.

    Attributes:
        records: where the images lie.
        labels: ``[n]`` int64 class indices.
        num_classes: number of classes.
        size: height and width of the loaded images.
        mean: per-channel mean of pixels in [0, 1], subtracted.
        std: per-channel standard deviation, divided by.
        flip: whether augmentation flips.
    """

    records: Sequence[Record]
    labels: Tensor
    _: KW_ONLY
    num_classes: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True

    def __post_init__(self) -> None:
        self.image_shape = (3, self.size, self.size)

    def load(self, index: Tensor, augment: torch.Generator | None = None) -> Batch:
        """Return float32 images ``[b, 3, size, size]`` and labels ``[b]``; see ``ImageSource``."""
        records = [self.records[position] for position in index.tolist()]
        crops: list[Crop] = [partial(centre_crop, shape=(self.size, self.size))] * len(records)
        if augment is not None:
            # All numbers are drawn here, so that the threads' order changes nothing.
            draws = torch.rand((len(records), DRAWS_PER_IMAGE), generator=augment).tolist()
            crops = [
                partial(random_crop, size=self.size, draws=row, flip=self.flip) for row in draws
            ]
        images = decode_all(records, crops, (self.size, self.size))
        return normalise(images, self.mean, self.std), self.labels[index]

    def hashed(self) -> Any:
        """Return the hash of names, file sizes, labels, size and normalisation.

        The pixels are not read: that would take hours for ImageNet.
        """
        header = f"{self.image_shape} {self.num_classes} {self.mean} {self.std}"
        digest = hashlib.sha256(header.encode())
        for record in self.records:
            size = record.size if record.size >= 0 else Path(record.path).stat().st_size
            line = f"{record.split}/{record.name}:{size}\n"
            digest.update(line.encode(errors="surrogateescape"))
        digest.update(self.labels.numpy().data)
        return digest


def centre_crop(image: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """Resize the image to just cover ``shape``, with a margin if it is large, and cut the centre.

    Args:
        image: the decoded image.
        shape: (height, width) of the result; an image that has it is returned as it is.
    """
    height, width = shape
    if (image.height, image.width) == shape:
        return image
    share = CENTRE_SHARE if min(shape) > SMALL_SIDE else 1.0
    scale = share * min(image.height / height, image.width / width)
    box_height, box_width = height * scale, width * scale
    left = (image.width - box_width) / 2
    top = (image.height - box_height) / 2
    return _resize(image, (left, top, left + box_width, top + box_height), (width, height))


def random_crop(
    image: Image.Image, size: int, draws: Sequence[float], *, flip: bool = True
) -> Image.Image:
    """Cut a random box and resize it to ``size`` x ``size``; flip half of the images.

    Args:
        image: the decoded image.
        size: height and width of the result.
        draws: ``DRAWS_PER_IMAGE`` uniform numbers in [0, 1).
        flip: whether to flip at all.
    """
    box = _random_box(image.height, image.width, draws)
    result = _resize(image, box, (size, size))
    flipped = flip and draws[-1] < 0.5
    return result.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else result


def _random_box(
    height: int, width: int, draws: Sequence[float]
) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of the random resized crop (Szegedy et al. 2015)."""
    for start in range(0, 4 * CROP_ATTEMPTS, 4):
        area = height * width * _between(AREA_RANGE, draws[start])
        aspect = math.exp(_between(LOG_ASPECT_RANGE, draws[start + 1]))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(draws[start + 2] * (width - box_width + 1))
            top = int(draws[start + 3] * (height - box_height + 1))
            return left, top, left + box_width, top + box_height
    side = min(height, width)  # a long, thin image: its central square
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _between(bounds: tuple[float, float], draw: float) -> float:
    """Map a number in [0, 1) linearly into ``bounds``."""
    return bounds[0] + draw * (bounds[1] - bounds[0])


def _resize(
    image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]
) -> Image.Image:
    """Resize a box of the image to ``size`` = (width, height), antialiased bilinear."""
    left, top, right, bottom = box
    inside = (max(left, 0.0), max(top, 0.0), min(right, image.width), min(bottom, image.height))
    return image.resize(size, Image.Resampling.BILINEAR, box=inside)
