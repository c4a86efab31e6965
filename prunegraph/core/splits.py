"""Typed data splits: train, search and test stay three types.

A function which may look at one of them cannot be handed another: the environment's
evaluator accepts a ``SearchSplit`` only.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor

Batch = Any
"""A pytree of tensors with a sample in each row: ``(images, labels)``, ``{"input_ids": ...}``."""


class Source(Protocol):
    """Samples that can be loaded by position.

    One whose attribute ``groups`` (``[n]`` int64) says what group each sample is of, such as its
    language, is loaded in batches of one group each.
    """

    def load(self, index: Tensor, augment: torch.Generator | None = None) -> Batch:
        """Return a batch of the samples at ``index``.

        Args:
            index: ``[b]`` int64 positions in this source.
            augment: if given, training augmentation is drawn from it; None = no augmentation.
        """
        ...

    def fingerprint(self) -> str:
        """Return a hash of what the source holds (16 hex digits)."""
        ...


class HashedSource(ABC):
    """What sources share that read what they hold for their fingerprint: they do so once."""

    @abstractmethod
    def hashed(self) -> Any:
        """Return what ``hashlib`` makes of all that the fingerprint stands for."""

    @cached_property
    def _digest(self) -> str:
        digest: str = self.hashed().hexdigest()
        return digest[:16]

    def fingerprint(self) -> str:
        """Return a hash of what the source holds (16 hex digits)."""
        return self._digest


class ImageSource(Source, Protocol):
    """Labelled images that can be loaded by position.

    ``load`` returns normalised float32 images ``[b, channels, height, width]`` and labels ``[b]``.

    Attributes:
        labels: ``[n]`` int64 class indices.
        num_classes: number of classes.
        image_shape: (channels, height, width) of every loaded image.
    """

    labels: Tensor
    num_classes: int
    image_shape: tuple[int, int, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class ReadyBatches:
    """Batches as a user's loader gave them, of any form; a position is that of a batch.

    Attributes:
        held: the batches, at least one.
        sizes: samples of each; 1 if it cannot be told.
        digest: a hash of what they hold (16 hex digits).
    """

    held: Sequence[Batch] = field(repr=False)
    sizes: Sequence[int]
    digest: str

    def load(self, index: Tensor, augment: torch.Generator | None = None) -> Batch:
        """Return the one batch at ``index``; there is no augmentation to draw."""
        del augment
        return self.held[int(index)]

    def fingerprint(self) -> str:
        """Return the hash of the batches."""
        return self.digest


@dataclass(frozen=True, eq=False)
class Split:
    """A set of positions in a source. Use one of the three subclasses.

    Attributes:
        source: the samples.
        index: ``[n]`` int64 positions in the source.
    """

    source: Source
    index: Tensor

    def __len__(self) -> int:
        return int(self.index.numel())

    @property
    def images(self) -> ImageSource:
        """The source, if the samples are images."""
        return cast(ImageSource, self.source)

    @property
    def labels(self) -> Tensor:
        """``[n]`` int64 class indices of images."""
        return self.images.labels[self.index]

    def take(self, positions: Tensor) -> Self:
        """Return the sub-split at ``positions`` (``[k]`` int64, counted within this split)."""
        return type(self)(self.source, self.index[positions])

    def sample(self, num_samples: int, seed: int) -> Self:
        """Return a random sub-split without replacement, fixed by ``seed``; all if fewer."""
        if isinstance(self.source, ReadyBatches):  # the first ones, at least one
            sizes = [self.source.sizes[position] for position in self.index.tolist()]
            count = int((torch.tensor(sizes).cumsum(0) <= num_samples).sum())
            return self.take(torch.arange(max(count, 1)))
        if num_samples >= len(self):
            return self
        generator = torch.Generator().manual_seed(seed)
        return self.take(torch.randperm(len(self), generator=generator)[:num_samples])

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: torch.Generator | None = None,
        augment: torch.Generator | None = None,
        skip: int = 0,
    ) -> Iterator[Batch]:
        """Yield batches until the split is used up: ``(images [b, c, h, w], labels [b])``, say.

        Args:
            batch_size: samples a batch; the last one may be smaller. Ready batches stay as they
                are.
            shuffle: if given, the order is drawn from it; None = stored order.
            augment: if given, training augmentation is drawn from it.
            skip: batches at the beginning that are left out and not loaded.
        """
        order = self.index
        if shuffle is not None:
            order = order[torch.randperm(len(order), generator=shuffle)]
        size = 1 if isinstance(self.source, ReadyBatches) else batch_size
        for chunk in self._chunks(order, size, shuffle)[skip:]:
            yield self.source.load(chunk, augment)

    def _chunks(
        self, order: Tensor, size: int, shuffle: torch.Generator | None = None
    ) -> Sequence[Tensor]:
        """Return the positions of each batch, which is of one group if the source has groups."""
        groups: Tensor | None = getattr(self.source, "groups", None)
        if groups is None:
            whole: Sequence[Tensor] = order.split(size)
            return whole
        own = groups[order]
        chunks: list[Tensor] = [
            chunk for group in own.unique() for chunk in order[own == group].split(size)
        ]
        if shuffle is None:
            return chunks
        return [chunks[at] for at in torch.randperm(len(chunks), generator=shuffle).tolist()]

    def equal_batches(self, num_batches: int) -> Iterator[Batch]:
        """Yield so many batches of equal size (to one) in stored order; ready ones as they are."""
        ready = isinstance(self.source, ReadyBatches)
        chunks: Sequence[Tensor]
        chunks = self.index.tensor_split(len(self) if ready else num_batches)
        if hasattr(self.source, "groups"):
            chunks = self._chunks(self.index, -(-len(self) // num_batches))
        for chunk in chunks:
            yield self.source.load(chunk)

    def fingerprint(self) -> str:
        """Return a hash of the source and the positions (16 hex digits)."""
        digest = hashlib.sha256(self.source.fingerprint().encode())
        digest.update(self.index.numpy().tobytes())
        return digest.hexdigest()[:16]


class TrainSplit(Split):
    """Samples that train and fine-tune networks, calibrate batch norm, give gradients."""


class SearchSplit(Split):
    """Samples unseen in training that the search and every choice may look at."""


class TestSplit(Split):
    """Samples that are measured once, at the end; no choice ever follows a look at them."""

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
        return self.train.images.image_shape
