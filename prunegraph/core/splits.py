"""Typed data splits: train, search and test stay three types.

A function which may look at one of them cannot be handed another: the environment's
evaluator accepts a ``SearchSplit`` only.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


class ImageSource(Protocol):
    """Labelled images that can be loaded by position.

    Attributes:
        labels: ``[n]`` int64 class indices.
        num_classes: number of classes.
        image_shape: (channels, height, width) of every loaded image.
    """

    labels: Tensor
    num_classes: int
    image_shape: tuple[int, int, int]

    def load(self, index: Tensor, augment: torch.Generator | None = None) -> Tensor:
        """Return normalised float32 images ``[b, channels, height, width]``.

        Args:
            index: ``[b]`` int64 positions in this source.
            augment: if given, training augmentation is drawn from it; None = no augmentation.
        """
        ...

    def fingerprint(self) -> str:
        """Return a hash of what the source holds (16 hex digits)."""
        ...


@dataclass(frozen=True, eq=False)
class Split:
    """A set of positions in an image source. Use one of the three subclasses.

    Attributes:
        source: the images.
        index: ``[n]`` int64 positions in the source.
    """

    source: ImageSource
    index: Tensor

    def __len__(self) -> int:
        return int(self.index.numel())

    @property
    def labels(self) -> Tensor:
        """``[n]`` int64 class indices."""
        return self.source.labels[self.index]

    def take(self, positions: Tensor) -> Self:
        """Return the sub-split at ``positions`` (``[k]`` int64, counted within this split)."""
        return type(self)(self.source, self.index[positions])

    def sample(self, num_images: int, seed: int) -> Self:
        """Return a random sub-split without replacement, fixed by ``seed``; all if fewer."""
        if num_images >= len(self):
            return self
        generator = torch.Generator().manual_seed(seed)
        return self.take(torch.randperm(len(self), generator=generator)[:num_images])

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: torch.Generator | None = None,
        augment: torch.Generator | None = None,
        skip: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(images [b, c, h, w] float32, labels [b] int64)`` until the split is used up.

        Args:
            batch_size: images a batch; the last one may be smaller.
            shuffle: if given, the order is drawn from it; None = stored order.
            augment: if given, training augmentation is drawn from it.
            skip: batches at the beginning that are left out and not loaded.
        """
        order = self.index
        if shuffle is not None:
            order = order[torch.randperm(len(order), generator=shuffle)]
        for chunk in order.split(batch_size)[skip:]:
            yield self.source.load(chunk, augment), self.source.labels[chunk]

    def equal_batches(self, num_batches: int) -> Iterator[Tensor]:
        """Yield the images in ``num_batches`` batches of equal size (to one), in stored order."""
        for chunk in self.index.tensor_split(num_batches):
            yield self.source.load(chunk)

    def fingerprint(self) -> str:
        """Return a hash of the images' source and the positions (16 hex digits)."""
        digest = hashlib.sha256(self.source.fingerprint().encode())
        digest.update(self.index.numpy().tobytes())
        return digest.hexdigest()[:16]


class TrainSplit(Split):
    """Images that train and fine-tune networks, calibrate batch norm, give gradients."""


class SearchSplit(Split):
    """Images unseen in training that the search and every choice may look at."""


class TestSplit(Split):
    """Images that are measured once, at the end; no choice ever follows a look at them."""

    __test__ = False  # not a test class, whatever pytest's collector thinks of the name


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """A data set with its three splits.

    Attributes:
        name: its name on the command line.
        train: images to train on.
        search: images to search on.
        test: images to report on.
        class_names: the classes in index order.
        mean: per-channel mean that was subtracted.
        std: per-channel standard deviation that was divided by.
    """

    name: str
    train: TrainSplit
    search: SearchSplit
    test: TestSplit
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.train.source.image_shape
