"""Images of a loader for later: in memory, or in a temporary file if they are many."""

import hashlib
import tempfile
import weakref
from functools import cached_property
from typing import IO

import torch
from torch import Tensor

from prunegraph.core.errors import DataError
from prunegraph.core.splits import Batch

IN_MEMORY = 2**28
"""Images of more bytes go to a file."""


class StoredImages:
    """Images and labels as an ``ImageSource``.

    Attributes:
        labels: ``[n]`` int64.
        num_classes: the highest label and one.
        image_shape: ``(c, h, w)``; known with the first batch.
    """

    def __init__(self) -> None:
        self.labels = torch.empty(0, dtype=torch.int64)
        self.num_classes = 0
        self.image_shape = (0, 0, 0)
        self._parts: list[Tensor] = []
        self._dtype = torch.float32
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()

    @property
    def _image_bytes(self) -> int:
        return torch.Size(self.image_shape).numel() * self._dtype.itemsize

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Take a batch ``[b, c, h, w]`` with labels ``[b]``; all are of one shape.

        Raises:
            DataError: the temporary folder has no room.
        """
        if not len(self.labels):
            channels, height, width = images.shape[1:]
            self.image_shape, self._dtype = (channels, height, width), images.dtype
        self.labels = torch.cat([self.labels, labels])
        self.num_classes = int(self.labels.max()) + 1
        images = images.to(self._dtype).contiguous()
        self._digest.update(_bytes(images))
        self._parts.append(images)
        if self._file is not None or len(self.labels) * self._image_bytes > IN_MEMORY:
            self._write()

    def _write(self) -> None:
        """Move what is in memory to the file."""
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives with the images
                weakref.finalize(self, self._file.close)
            self._file.seek(0, 2)
            for part in self._parts:
                self._file.write(_bytes(part))
            self._file.flush()
        except OSError as error:
            msg = (
                f"calibration images do not fit into {tempfile.gettempdir()} ({error}): set TMPDIR"
            )
            raise DataError(msg) from error
        self._parts = []

    @cached_property
    def _images(self) -> Tensor:
        images, self._parts = torch.cat(self._parts), []
        return images

    def load(self, index: Tensor, augment: torch.Generator | None = None) -> Batch:
        """Return images and labels at ``index``; there is no augmentation to draw."""
        del augment
        if self._file is None:
            return self._images[index], self.labels[index]
        found = torch.empty(len(index), *self.image_shape, dtype=self._dtype)
        for place, image in zip(index.tolist(), found, strict=True):
            self._file.seek(place * self._image_bytes)
            stored = bytearray(self._file.read(self._image_bytes))
            image.copy_(torch.frombuffer(stored, dtype=self._dtype).view(self.image_shape))
        return found, self.labels[index]

    def fingerprint(self) -> str:
        """Return a hash of images and labels."""
        digest = self._digest.copy()
        digest.update(_bytes(self.labels))
        return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return tensor.flatten().view(torch.uint8).numpy().data
