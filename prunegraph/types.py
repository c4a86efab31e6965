"""Types that cross package borders: masks, budgets, costs, outcomes and the three data splits.

The train, search and test splits are distinct types, so that a function which may look at one of
them cannot be handed another: the environment's evaluator accepts a ``SearchSplit`` only.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prunegraph.errors import BudgetError

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class KeepMask:
    """Which channel classes stay; made by ``StructureGraph.mask``, which checks it.

    Attributes:
        keep: ``[N]`` booleans, True = keep, read-only.
    """

    keep: BoolArray

    def __post_init__(self) -> None:
        self.keep.flags.writeable = False

    @property
    def num_kept(self) -> int:
        """Number of classes that stay."""
        return int(self.keep.sum())

    def digest(self) -> str:
        """Return 16 hex digits that name the mask."""
        packed = np.packbits(self.keep).tobytes()
        return hashlib.sha256(f"{self.keep.size}:".encode() + packed).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"KeepMask({self.num_kept} of {self.keep.size} classes, {self.digest()})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeepMask) and np.array_equal(self.keep, other.keep)

    def __hash__(self) -> int:
        return hash(self.digest())


@dataclass(frozen=True, eq=False)
class LayerError:
    """How far one layer's outputs move when some of the classes that it reads are removed.

    Attributes:
        classes: ``[U]`` the classes, ascending.
        gram: ``[U, U]``; the mean squared change of the outputs over their energy is
            ``x @ gram @ x`` for x = 1 where a class is removed, else 0. Kept weights stay as they
            are. This is ThiNet's error (Luo et al. 2017, equation 6) over all outputs.
    """

    classes: IntArray
    gram: Float64Array


def short(value: float) -> str:
    """Return a limit as names of files and titles show it: all digits of a whole number."""
    return str(value) if isinstance(value, int) else f"{value:g}"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may remain, on the example input; several limits hold at once.

    Attributes:
        keep_macs: at most this share, in (0, 1], of the dense network's multiply-adds remains.
        keep_params: at most this share, in (0, 1], of the dense network's parameters remains.
        max_memory: at most this many bytes of activations are alive at once.
        max_latency: a forward takes at most this many milliseconds (and 5 % for noise) where it
            is measured: ``pruning.project_latency`` alone can meet it.
        round_to: if given, the number of channels that a group keeps is a multiple of it, or all
            of them, or the group's minimum where the whole group is smaller. No limit by itself.
    """

    keep_macs: float | None = None
    keep_params: float | None = None
    max_memory: int | None = None
    max_latency: float | None = None
    round_to: int | None = None

    def __post_init__(self) -> None:
        if not self.as_dict().keys() - {"round_to"}:
            msg = "a budget needs at least one of keep_macs, keep_params, max_memory, max_latency"
            raise BudgetError(msg)
        for name, value in self.as_dict().items():
            if isinstance(value, bool) or not isinstance(value, Real):
                msg = f"{name}={value!r} must be a number, not of type {type(value).__name__}"
                raise BudgetError(msg)
        for name in ("keep_macs", "keep_params"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                percent = f"; {value:g} % is {value / 100:g}" if 1.0 < value <= 100.0 else ""
                msg = f"{name}={value} must lie in (0, 1]: it is the share that remains{percent}"
                raise BudgetError(msg)
        if self.max_latency is not None and not self.max_latency > 0.0:
            msg = f"max_latency={self.max_latency} must be milliseconds above 0"
            raise BudgetError(msg)
        for name, unit in (("max_memory", "bytes"), ("round_to", "channels, as 8 or 16")):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                msg = f"{name}={value} must be a whole number of {unit}"
                raise BudgetError(msg)

    def without_latency(self) -> "Budget":
        """Return the limits that can be met without a clock; all may remain if there are none."""
        values = self.as_dict()
        values.pop("max_latency", None)
        if not values.keys() - {"round_to"}:
            values["keep_macs"] = 1.0
        return Budget(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return what is set, by name; ``Budget(**budget.as_dict())`` is the same budget."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a network costs on one example input.

    Attributes:
        macs: multiply-adds of convolutions, linear layers and matrix products; one multiply-add
            counts once; biases, norms and activations are excluded (fvcore's convention).
        params: number of parameters, biases and norms included.
    """

    macs: int
    params: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One evaluated pruned network.

    Attributes:
        accuracy: top-1 in [0, 1] on the images used.
        loss: mean cross-entropy in nats.
        kl: mean KL divergence from the dense network's outputs in nats, or None if not measured.
        num_images: number of images used.
        cost: cost of the network that was evaluated.
        digest: ``KeepMask.digest()`` of its mask.
        seconds: wall time of surgery, recalibration and evaluation.
        soft_accuracy: mean probability that the network gives to the right class, or None if
            searches do not compare it.
    """

    accuracy: float
    loss: float
    kl: float | None
    num_images: int
    cost: Cost
    digest: str
    seconds: float
    soft_accuracy: float | None = None

    @property
    def steady(self) -> float | None:
        """What was measured to be compared in the accuracy's place, higher = better, or None.

        Two figures are less noisy: minus the divergence from the dense network, for which no label
        is needed, and the soft accuracy.
        """
        return self.soft_accuracy if self.kl is None else -self.kl

    @property
    def rank(self) -> tuple[float, float, float]:
        """What outcomes are chosen by, higher = better: ``steady``, accuracy, ties by loss."""
        return self.steady or 0.0, self.accuracy, -self.loss


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
