"""Images of the user's own: anything that is indexed, as ``torch.utils.data.Dataset`` is."""

import bisect
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from prunegraph.core.errors import DataError
from prunegraph.core.seeding import seeded
from prunegraph.core.splits import Batch, Dataset, HashedSource
from prunegraph.data.splits import assemble

READINGS = 8
"""How often an image is read again to see whether it is always the same: a flip is one of two."""


class Items(Protocol):
    """Items ``(image [c, h, w] float32, class number)`` by position.

    With an attribute ``targets``, the class numbers as torchvision's data sets have them, the
    images need not be read for these.
    """

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def __getitem__(self, position: int, /) -> Any:
        """Return one."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Images:
    """What a function ``package.module:function`` returns that ``--dataset`` names.

    All images have one shape and are normalised as the network takes them.

    Attributes:
        train: to train on; as they are, without augmentation.
        test: to report on.
        search: to search on; None = a share of each class is cut from ``train``.
        augment: changes an image ``[c, h, w]`` for training, and draws from torch's random numbers,
            as the transforms of torchvision do; None = images are trained on as they are.
        class_names: in the order of their numbers; None = the numbers.
        mean: what was subtracted from pixels in [0, 1], a value a channel, for those who use the
            pruned network; None = 0.
        std: what they were divided by; None = 1.
    """

    train: Items
    test: Items
    search: Items | None = None
    augment: Callable[[Tensor], Tensor] | None = None
    class_names: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


class ItemSource(HashedSource):
    """An ``ImageSource`` of several ``Items`` one after the other.

    Args:
        parts: the items by the name of their split, at least one in each.
        augment: see ``Images``.
        num_classes: how many classes there are; None = as many as the largest number needs.

    Raises:
        DataError: an item is no image with its class.
    """

    def __init__(
        self,
        parts: Mapping[str, Items],
        augment: Callable[[Tensor], Tensor] | None,
        num_classes: int | None,
    ) -> None:
        self.names, self.parts = tuple(parts), tuple(parts.values())
        self.augment = augment
        self.ends = list(itertools.accumulate(len(part) for part in self.parts))
        channels, height, width = self._image(0).shape
        self.image_shape = channels, height, width
        self.labels = torch.cat([_labels(part) for part in self.parts])
        self._check_samples()
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        self.num_classes = highest + 1 if num_classes is None else num_classes
        if lowest < 0 or highest >= self.num_classes:
            said = "" if num_classes is None else f", as {num_classes} class_names say"
            msg = (
                f"class numbers go from {lowest} to {highest}, not from 0 to "
                f"{self.num_classes - 1}{said}"
            )
            raise DataError(msg)

    def load(self, index: Tensor, augment: torch.Generator | None = None) -> Batch:
        """Return float32 images ``[b, c, h, w]`` and labels ``[b]``; see ``ImageSource``."""
        positions = index.tolist()
        images = [self._image(position) for position in positions]
        if augment is not None and self.augment is not None:
            drawn = int(torch.randint(2**62, (1,), generator=augment))
            with seeded(drawn):
                images = [self.augment(image.clone()) for image in images]
        for position, image in zip(positions, images, strict=True):
            self._check_shape(position, image)
        return torch.stack(images).float(), self.labels[index]

    def hashed(self) -> Any:
        """Return the hash of the labels and of three images of each part.

        All images are not read: that may take hours.
        """
        digest = hashlib.sha256(f"{self.image_shape} {self.num_classes} {self.ends}".encode())
        digest.update(self.labels.numpy().tobytes())
        for position in self._samples():
            digest.update(self._image(position).float().numpy().tobytes())
        return digest

    def _samples(self) -> list[int]:
        """Return the first, the middle and the last position of each part."""
        ends = itertools.pairwise([0, *self.ends])
        return [
            position
            for start, end in ends
            for position in sorted({start, (start + end) // 2, end - 1})
        ]

    def _check_samples(self) -> None:
        for position in self._samples():
            item = self._item(position)
            image = _image(item)
            self._check_shape(position, image)
            if not bool(image.isfinite().all()):
                msg = f"{self._place(position)} holds NaN or infinite values"
                raise DataError(msg)
            if not all(torch.equal(image, self._image(position)) for _ in range(READINGS)):
                msg = (
                    "an image differs from one reading to the next: give images without "
                    "augmentation, and that as augment="
                )
                raise DataError(msg)
            if _label(item) != int(self.labels[position]):
                msg = f"targets says {int(self.labels[position])} where an item has {_label(item)}"
                raise DataError(msg)

    def _check_shape(self, position: int, image: Tensor) -> None:
        if image.shape != self.image_shape:
            msg = (
                f"{self._place(position)} has shape {list(image.shape)}, the first image "
                f"{list(self.image_shape)}"
            )
            raise DataError(msg)

    def _place(self, position: int) -> str:
        """Say in words which image it is."""
        number, inside = self._find(position)
        return f"image {inside} of {self.names[number].replace('val', 'search')}"

    def _item(self, position: int) -> Any:
        number, inside = self._find(position)
        return self.parts[number][inside]

    def _find(self, position: int) -> tuple[int, int]:
        """Return the number of the part that holds an image, and its position in it."""
        number = bisect.bisect_right(self.ends, position)
        return number, position - self.ends[number] + len(self.parts[number])

    def _image(self, position: int) -> Tensor:
        return _image(self._item(position))


def from_images(
    name: str,
    images: Images,
    *,
    search_share: float = 0.1,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Dataset:
    """Return a data set of the user's own images.

    Args:
        name: its name in reports.
        images: the images.
        search_share: share of each train class cut for searching where ``images`` has none for it.
        seed: fixes that cut.
        mean: what a network was trained with; only checked, since the images are normalised.
        std: the same.

    Raises:
        DataError: images that cannot be used, or are normalised otherwise.
    """
    parts = {"train": images.train, "val": images.search, "test": images.test}
    given = {split: items for split, items in parts.items() if items is not None}
    empty = [split for split, items in given.items() if not len(items)]
    if empty:
        msg = f"{name}: {empty[0].replace('val', 'search')} holds no images"
        raise DataError(msg)
    names = images.class_names
    try:
        source = ItemSource(given, images.augment, None if names is None else len(names))
    except DataError as error:
        msg = f"{name}: {error}"
        raise DataError(msg) from error
    channels = source.image_shape[0]
    own = (
        (0.0,) * channels if images.mean is None else tuple(map(float, images.mean)),
        (1.0,) * channels if images.std is None else tuple(map(float, images.std)),
    )
    if {len(values) for values in own} != {channels}:
        msg = f"{name}: mean and std {own} have not a value for each of {channels} channels"
        raise DataError(msg)
    theirs = (own[0] if mean is None else tuple(mean), own[1] if std is None else tuple(std))
    if theirs != own:
        msg = f"{name} has mean and std {own}, the weights were trained with {theirs}"
        raise DataError(msg)
    starts = [0, *source.ends]
    return assemble(
        name,
        source,
        {
            split: torch.arange(starts[number], starts[number + 1])
            for number, split in enumerate(given)
        },
        class_names=tuple(names or map(str, range(source.num_classes))),
        normalisation=own,
        search_share=search_share,
        seed=seed,
    )


def _image(item: Any) -> Tensor:
    image = item[0] if isinstance(item, tuple | list) and len(item) == 2 else None
    if not (isinstance(image, Tensor) and image.dim() == 3 and image.is_floating_point()):
        what = f"a {type(item).__name__}" if image is None else f"{_kind(image)} with its class"
        msg = f"an item is {what}, not (image [c, h, w] of floats, class number)"
        raise DataError(msg)
    return image


def _kind(image: Any) -> str:
    if isinstance(image, Tensor):
        return f"a tensor {list(image.shape)} of {image.dtype}"
    return f"a {type(image).__name__}"


def _labels(part: Items) -> Tensor:
    """Return the class numbers ``[n]`` of some items."""
    known = getattr(part, "targets", None)
    if known is None:
        known = [_label(part[position]) for position in range(len(part))]
    labels = _numbers(known)
    if labels is None or labels.shape != (len(part),):
        shape = "" if labels is None else f" {list(labels.shape)}"
        msg = f"targets{shape} are no class numbers [{len(part)}]"
        raise DataError(msg)
    return labels


def _label(item: Any) -> int:
    _image(item)
    label = _numbers(item[1])
    if label is None or label.dim():
        msg = f"a class is {item[1]!r:.60}, not a number from 0 up"
        raise DataError(msg)
    return int(label)


def _numbers(values: Any) -> Tensor | None:
    """Return whole numbers as a tensor; None if they are none."""
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    return None if found.is_floating_point() or found.is_complex() else found.long()
