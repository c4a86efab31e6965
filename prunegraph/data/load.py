"""Load a data set by its name on the command line."""

import math
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from prunegraph.core.errors import DataError, suggest
from prunegraph.core.splits import Dataset, ImageSource
from prunegraph.data.cifar import find_download, read_cifar
from prunegraph.data.decode import decode_all, stored_shape
from prunegraph.data.digits import (
    CLUTTER_MEAN,
    CLUTTER_STD,
    DIGITS_MEAN,
    DIGITS_STD,
    read_clutter,
    read_digits,
)
from prunegraph.data.lazy import SMALL_SIDE, LazySource, centre_crop
from prunegraph.data.memory import MemorySource
from prunegraph.data.records import LAYOUT, SPLITS, Record, scan
from prunegraph.data.splits import assemble

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMALISATION: dict[str, Normalisation] = {
    "digits": (DIGITS_MEAN, DIGITS_STD),
    "clutter": (CLUTTER_MEAN, CLUTTER_STD),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": IMAGENET,
    "folder": IMAGENET,
}
EMBEDDED = {"digits": read_digits, "clutter": read_clutter}
"""Data sets that come with a dependency, none of which is ever mirrored."""

RESIZED = ("imagenet", "folder")
"""Data sets whose images take any size."""

NUM_CLASSES = {"cifar10": 10, "cifar100": 100}
CIFAR_SHAPE = (32, 32)
DEFAULT_SIZE = 224
MEMORY_LIMIT = 2 * 1024**3  # bytes of pixels held in memory at most
SHIFT_SHARE = 8  # the augmentation shifts by an eighth of the side: 4 of 32, 1 of 8


def load_dataset(
    name: str,
    *,
    data_dir: Path | str | None = None,
    image_size: int | None = None,
    search_share: float = 0.1,
    seed: int = 0,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    flip: bool = True,
) -> Dataset:
    """Load a data set with its train, search and test split.

    Args:
        name: ``digits`` or ``clutter`` (embedded), ``cifar10``, ``cifar100``, ``imagenet`` or
            ``folder``.
        data_dir: a folder or plain ``.tar`` with ``{train,val,test}/<class>/<image>``, for CIFAR
            also a torchvision download. None = embedded or downloaded (CIFAR).
            With ``val`` and ``test``, ``val`` is the search split; with one of them, it is the
            test split, and the search split is cut from ``train``.
        image_size: side of the loaded images, for ``imagenet`` and ``folder``. None = as stored
            where every image has at most 64 x 64 pixels, else 224. Images of up to 64 x 64 are
            held in memory, larger ones are decoded when they are used.
        search_share: share of each train class cut for searching where there is no folder for it.
        seed: fixes that cut. Weights trained on one cut have seen the search images of another.
        mean: per-channel mean to subtract instead of the data set's own.
        std: per-channel standard deviation to divide by instead of the data set's own.
        flip: augmentation mirrors half of the images; never of embedded ones.

    Returns:
        The data set. ``split.fingerprint()`` names images, normalisation and split.

    Raises:
        DataError: anything about the name, the files or the options that cannot be used.
    """
    if name not in NORMALISATION:
        known = ", ".join(NORMALISATION)
        near = suggest(name, NORMALISATION)
        msg = f"unknown data set {name!r}{near}; known: {known}, or package.module:function"
        raise DataError(msg)
    data_dir = None if data_dir is None else Path(data_dir)
    normalisation = _normalisation(name, mean, std)
    _check_options(name, data_dir, image_size)
    if name in EMBEDDED:
        images, labels, positions = EMBEDDED[name]()
        class_names = tuple(str(digit) for digit in range(10))
        source: ImageSource = _in_memory(images, labels, normalisation, num_classes=10, flip=False)
    elif (root := find_download(name, data_dir)) or data_dir is None:
        images, labels, positions, class_names = read_cifar(name, root)
        source = _in_memory(images, labels, normalisation, len(class_names), flip=flip)
    else:
        records = scan(_find_root(name, data_dir))
        source, positions, class_names = _from_records(
            name, records, image_size, normalisation, flip=flip
        )
    return assemble(
        name,
        source,
        positions,
        class_names=class_names,
        normalisation=normalisation,
        search_share=search_share,
        seed=seed,
    )


def _normalisation(
    name: str, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Normalisation:
    """Return the caller's mean and std, or the data set's own, checked."""
    own = NORMALISATION[name]
    chosen = (tuple(mean) if mean else own[0], tuple(std) if std else own[1])
    finite = all(math.isfinite(value) for value in chosen[0] + chosen[1])
    if len(chosen[0]) != len(own[0]) or len(chosen[1]) != len(own[0]) or not finite:
        msg = (
            f"{name} has {len(own[0])} channel(s); mean {chosen[0]} and std {chosen[1]} do not fit"
        )
        raise DataError(msg)
    if min(chosen[1]) <= 0:
        msg = f"std {chosen[1]} must be above 0"
        raise DataError(msg)
    return chosen


def _check_options(name: str, data_dir: Path | None, image_size: int | None) -> None:
    """Refuse options that the data set would have to ignore."""
    if image_size is not None and name not in RESIZED:
        msg = f"{name} has a fixed image size; image_size={image_size} works with folder, imagenet"
        raise DataError(msg)
    if image_size is not None and image_size < 1:
        msg = f"image_size={image_size} must be at least 1"
        raise DataError(msg)
    if name in EMBEDDED and data_dir is not None:
        msg = f"{name} are built in and take no data_dir; {data_dir} may be meant for folder"
        raise DataError(msg)
    if name in RESIZED and data_dir is None:
        msg = f"{name} needs a data_dir: a folder or .tar; {LAYOUT}"
        raise DataError(msg)


def _find_root(name: str, data_dir: Path) -> Path:
    """Return ``data_dir`` or, if that has no ``train``, the data set's folder or tar inside it."""
    candidates = (data_dir / name, data_dir / f"{name}.tar")
    if data_dir.is_dir() and not (data_dir / "train").is_dir():
        return next((path for path in candidates if path.exists()), data_dir)
    return data_dir


def _from_records(
    name: str,
    records: list[Record],
    image_size: int | None,
    normalisation: Normalisation,
    *,
    flip: bool,
) -> tuple[ImageSource, dict[str, Tensor], tuple[str, ...]]:
    """Make a source of an image-folder layout: in memory if small, else decoded on demand."""
    class_names = tuple(sorted({record.class_name for record in records}))
    if len(class_names) != NUM_CLASSES.get(name, len(class_names)):
        msg = f"{name} has {NUM_CLASSES[name]} classes, not {len(class_names)}; use folder instead"
        raise DataError(msg)
    class_index = {class_name: index for index, class_name in enumerate(class_names)}
    labels = torch.tensor([class_index[record.class_name] for record in records])
    splits = torch.tensor([SPLITS.index(record.split) for record in records])
    positions = {
        split: (splits == number).nonzero().flatten()
        for number, split in enumerate(SPLITS)
        if bool((splits == number).any())
    }
    shape = CIFAR_SHAPE if name in NUM_CLASSES else _load_shape(records, image_size)
    if max(shape) <= SMALL_SIDE and len(records) * 3 * math.prod(shape) <= MEMORY_LIMIT:
        images = decode_all(records, [partial(centre_crop, shape=shape)] * len(records), shape)
        source: ImageSource = _in_memory(images, labels, normalisation, len(class_names), flip=flip)
    else:
        mean, std = normalisation
        source = LazySource(
            records,
            labels,
            num_classes=len(class_names),
            size=min(shape),
            mean=mean,
            std=std,
            flip=flip,
        )
    return source, positions, class_names


def _load_shape(records: list[Record], image_size: int | None) -> tuple[int, int]:
    """Return (height, width) to load: as asked, as stored if all are small, or 224."""
    if image_size is not None:
        return image_size, image_size
    shapes: Counter[tuple[int, int]] = Counter()
    for record in records:  # stops at the first large image: of ImageNet it reads one
        shape = stored_shape(record)
        if max(shape) > SMALL_SIDE:
            return DEFAULT_SIZE, DEFAULT_SIZE
        shapes[shape] += 1
    return shapes.most_common(1)[0][0]


def _in_memory(
    images: Tensor, labels: Tensor, normalisation: Normalisation, num_classes: int, *, flip: bool
) -> MemorySource:
    """Make a source of uint8 images with the shift that fits their size."""
    mean, std = normalisation
    padding = min(images.shape[2:]) // SHIFT_SHARE
    return MemorySource(
        images, labels, num_classes=num_classes, mean=mean, std=std, padding=padding, flip=flip
    )
