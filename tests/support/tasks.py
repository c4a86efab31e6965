"""Tasks of networks and images at hand."""

import torch
from torch import nn

from prunegraph.core.splits import ImageSource, SearchSplit, TrainSplit
from prunegraph.tasks.image_classification import ImageClassification


def image_task(
    model: nn.Module, train: TrainSplit, search: SearchSplit | None = None
) -> ImageClassification:
    """Return the task of a classifier; without a search split the train images stand in."""
    source: ImageSource = train.images
    return ImageClassification(
        model=model,
        example_inputs=torch.zeros(1, *source.image_shape),
        train=train,
        search=SearchSplit(train.source, train.index) if search is None else search,
    )
