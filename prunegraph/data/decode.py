"""Decode image files to uint8 tensors, in a few threads, with errors that name the file."""

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

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
    try:
        with _open(record) as image:
            pixels = np.array(crop(_to_rgb(image)))  # [height, width, 3]
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise about anything on a broken file
        raise DataError(_broken(record, error)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def stored_shape(record: Record) -> tuple[int, int]:
    """Return (height, width) from the image's header.

    Raises:
        DataError: the file is no image; names it.
    """
    try:
        with _open(record) as image:
            return image.height, image.width
    except DataError:
        raise
    except Exception as error:  # as in decode
        raise DataError(_broken(record, error)) from error


def _open(record: Record) -> Image.Image:
    """Open an image without decoding it, unless it is gigantic (a decompression bomb)."""
    image = Image.open(io.BytesIO(record.read()), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        msg = f"{record} has {image.width} x {image.height} pixels; shrink or remove the file"
        raise DataError(msg)
    return image


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


def _broken(record: Record, error: Exception) -> str:
    """Return the message for a file that does not decode."""
    reason = str(error)
    if isinstance(error, UnidentifiedImageError):
        reason = "not an image"
    return f"cannot read image {record} ({reason}); replace or remove the file"
