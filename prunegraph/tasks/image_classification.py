"""Image classification: accuracy, cross-entropy, and the divergence from the dense logits."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.errors import DataError
from prunegraph.core.splits import Batch, SearchSplit, Split, TestSplit, TrainSplit
from prunegraph.core.task import ExampleInputs, Score, Scores
from prunegraph.tasks.base import SplitTask, check_splits
from prunegraph.tasks.classification import (
    WORST,
    compute_logits,
    evaluate,
    place_images,
    place_model,
    soft_divergence,
)
from prunegraph.tasks.images import Images, image_split
from prunegraph.tasks.outputs import class_logits


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageClassification(SplitTask):
    """A classifier of images; a ``Task``. Its batches are ``(images [b, c, h, w], labels [b])``.

    Attributes:
        model: the dense network; nothing changes it.
        example_inputs: what its forward takes.
        train: images for gradients, calibration and training.
        search: images that masks are scored on.
        test: images that are measured once, at the end, or None.
        name: of the network, in rows and errors.
    """

    kind: ClassVar[str] = "image_classification"
    score_name: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    autocast: ClassVar[bool] = True

    model: nn.Module
    example_inputs: ExampleInputs
    train: TrainSplit
    search: SearchSplit
    test: TestSplit | None = None
    name: str = "network"

    def __post_init__(self) -> None:
        super().__post_init__()
        why = "masks are scored on search images and recalibrated on train images, see docs/own.md"
        check_splits(self.train, self.search, self.test, why)

    def place_model(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Move a network to a device, channels last if it can run so; return it."""
        images, _ = next(iter(self.train.batches(1)))
        return place_model(model, device, images)

    def place(self, batch: Batch, model: nn.Module) -> Batch:
        """Return images where a network reads them; labels stay where they are."""
        images, labels = batch
        return place_images(images, model), labels

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits ``[b, classes]`` of a batch.

        Raises:
            ModelError: the network returns something else.
        """
        advice = " in training mode: switch its auxiliary outputs off" if model.training else ""
        return class_logits(model(place_images(batch[0], model)), advice=advice)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of a batch, computed in float32."""
        logits = self.forward(model, batch)
        return F.cross_entropy(logits.float(), batch[1].to(logits.device))

    def divergence(self, outputs: Any, dense: Any, temperature: float = 1.0) -> Tensor:
        """Return the mean KL divergence from other logits times the squared temperature."""
        return soft_divergence(class_logits(outputs), class_logits(dense), temperature)

    def score(self, model: nn.Module, split: Split | None = None) -> Score:
        """Return the accuracy on a split; None = the search split."""
        value = evaluate(model, self.search if split is None else split).accuracy
        return Score(name=self.score_name, value=value, higher_is_better=True)

    def dense_outputs(
        self, model: nn.Module, batches: Iterable[Batch], *, autocast: bool
    ) -> Tensor:
        """Return the logits ``[n, classes]`` as float32 on the CPU."""
        return compute_logits(model, batches, autocast=autocast)

    def measure(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        autocast: bool,
        dense_outputs: Tensor | None = None,
    ) -> Scores:
        """Return accuracy, loss, soft accuracy, and the KL divergence if dense logits are given."""
        return evaluate(model, batches, autocast=autocast, dense_logits=dense_outputs, worst=WORST)


def training_task(model: nn.Module, train: TrainSplit) -> ImageClassification:
    """Return the task of a classifier that is trained and not searched."""
    images, _ = next(iter(train.batches(1)))
    nothing = SearchSplit(train.source, train.index[:0])
    return ImageClassification(model=model, example_inputs=images, train=train, search=nothing)


def image_classification(
    model: nn.Module,
    *,
    train: TrainSplit | Images,
    search: SearchSplit | Images | None = None,
    test: TestSplit | Images | None = None,
    example_inputs: ExampleInputs | None = None,
    num_images: int = 1024,
    name: str = "network",
) -> ImageClassification:
    """Return the task of a classifier of images.

    Images are given as a split (``prunegraph.data``), as tensors ``(images, labels)``, or as a
    loader of shuffled batches ``(images [b, c, h, w], labels [b])``, normalised as the network
    takes them. Without labels the network's own answers are used.

    Args:
        model: the trained network, on the device where it runs; nothing changes it.
        train: images that it was trained on.
        search: images that masks are scored on, which training has not seen; None = as many
            further ones of ``train``.
        test: images that are measured once, at the end.
        example_inputs: what the network's forward takes; default: the first train image.
        num_images: images that are taken from a loader, at most.
        name: of the network, in rows and errors.

    Raises:
        PruneGraphError: images and labels do not fit the network, or there are none.
    """
    if num_images < 1:
        msg = f"num_images={num_images} must be at least 1"
        raise DataError(msg)
    if search is None and isinstance(train, Split):
        msg = "a TrainSplit needs a SearchSplit beside it: give search="
        raise DataError(msg)
    most = num_images if search is not None else 2 * num_images
    fitting = image_split(TrainSplit, train, "train", model, example_inputs, most)
    if search is not None:
        scoring = image_split(SearchSplit, search, "search", model, example_inputs, num_images)
    else:  # of a loader with few images some are in both
        count = max(len(fitting) // 2, 1) if isinstance(train, tuple) else num_images
        scoring = SearchSplit(fitting.source, fitting.index[-count:])
        fitting = TrainSplit(fitting.source, fitting.index[:count])
    tested = None
    if test is not None:
        tested = image_split(TestSplit, test, "test", model, example_inputs, num_images)
    example = example_inputs
    if example is None:
        example, _ = next(iter(fitting.batches(1)))
    return ImageClassification(
        model=model, example_inputs=example, train=fitting, search=scoring, test=tested, name=name
    )
