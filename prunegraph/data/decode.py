"""Decode image files to uint8 tensors, in a few threads, with errors that name the file."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from prunegraph.core.errors import DataError
from prunegraph.data.records import Record

MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a gigabyte as RGB
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
"""What is decoded, whatever the name says: Pillow starts Ghostscript for others."""

MAX_THREADS = 8
CHUNK = 256  # images between two chances to stop on Ctrl-C
Crop = Callable[[Image.Image], Image.Image]


def decode_all(records: Sequence[Record], crops: Sequence[Crop], shape: tuple[int, int]) -> Tensor:
    """Decode images, crop each by its own function, and stack them.

    Args:
        records: b images.
        crops: b functions from a decoded RGB image to one of ``shape``.
        shape: (height, width) of the results.

    Returns:
        ``[b, 3, height, width]`` uint8.

    Raises:
        DataError: an image is broken or gigantic; names it.
    """
    images = torch.empty((len(records), 3, *shape), dtype=torch.uint8)
    threads = min(MAX_THREADS, os.cpu_count() or 1, max(len(records), 1))
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(records), CHUNK):
            chunk = slice(start, start + CHUNK)
            for offset, image in enumerate(pool.map(decode, records[chunk], crops[chunk])):
                images[start + offset] = image
    return images


def decode(record: Record, crop: Crop) -> Tensor:
    """Decode one image to ``[3, height, width]`` uint8; see ``decode_all``."""
    with _opened(record) as image:
        pixels = np.array(crop(_to_rgb(image)))  # [height, width, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1)


def stored_shape(record: Record) -> tuple[int, int]:
    """Return (height, width) from the image's header.

    Raises:
        DataError: the file is no image; names it.
    """
    with _opened(record) as image:
        return image.height, image.width


@contextmanager
def _opened(record: Record) -> Iterator[Image.Image]:
    """Open an image without decoding it, unless it is gigantic (a decompression bomb).

    Raises:
        DataError: it is, or what is done with it fails, as on a broken file.
    """
    try:
        with Image.open(io.BytesIO(record.read()), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height} pixels"
                msg = f"{record} has {size}; shrink or remove the file"
                raise DataError(msg)
            yield image
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise about anything
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        msg = f"cannot read image {record} ({reason}); replace or remove the file"
        raise DataError(msg) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB: transparency is dropped, 16-bit grey is scaled to 8 bits."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode in ("F", "I"):
        msg = "its grey values have 32 bits, whose range is not known: convert it to 8 or 16"
        raise ValueError(msg)
    elif image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    return image.convert("RGB")
