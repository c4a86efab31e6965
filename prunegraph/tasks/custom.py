"""A task of a user's own: any network, a loss, and a score that tells how good a network is."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.errors import ConfigError, DataError, ModelError, first_line
from prunegraph.core.splits import Batch, Split, TrainSplit
from prunegraph.core.task import ExampleInputs, Score, Scores
from prunegraph.graph import copy_network, evaluation_mode, unwrap
from prunegraph.graph.trace.calls import tensors_in
from prunegraph.tasks.base import SplitTask
from prunegraph.tasks.batches import ready_split
from prunegraph.tasks.classification import place_images
from prunegraph.tasks.outputs import logits_in, loss_and_outputs

CUSTOM_LOSS = "give your own as loss="
"""What to do where the default one does not fit."""

NUM_BATCHES = 8
"""Batches that are taken from a loader."""

Loss = Callable[[nn.Module, Any], Tensor]
"""Of a network on a batch: the mean over its samples."""

ScoreFunction = Callable[[nn.Module], float]
"""Of a network in eval mode, which it may not change."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CustomTask(SplitTask):
    """A network of any kind with a loss and a score of its owner's; a ``Task``.

    Attributes:
        model: the dense network; nothing changes it.
        example_inputs: what its forward takes.
        train: batches of its training data, of any form that ``loss_function`` takes.
        score_function: tells how good a network is, on data that it chooses itself.
        higher_is_better: False if the score is an error.
        loss_function: mean loss of a network on a batch.
        score_name: what the score is called.
        name: of the network, in rows and errors.
    """

    kind: ClassVar[str] = "custom"
    autocast: ClassVar[bool] = False
    search: ClassVar[None] = None
    test: ClassVar[None] = None

    model: nn.Module
    example_inputs: ExampleInputs
    train: TrainSplit
    score_function: ScoreFunction
    higher_is_better: bool
    loss_function: Loss
    score_name: str = "score"
    name: str = "network"

    def place(self, batch: Batch, model: nn.Module) -> Batch:
        """Return the batch as it is: the loss takes it where it lies."""
        del model
        return batch

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Return what the network gives when its loss on a batch is computed."""
        _, outputs = loss_and_outputs(self.loss, model, batch)
        return outputs

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch.

        Raises:
            ModelError: it is no finite number.
        """
        value: object = self.loss_function(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
            msg = f"the loss returns {what}, not one number: reduce it with mean()"
            raise ModelError(msg)
        return value

    def divergence(self, outputs: Any, dense: Any, temperature: float = 1.0) -> Tensor:
        """Return the squared distance of outputs from others over the variance of those.

        Outputs are of no known kind, so no temperature applies to them.
        """
        del temperature
        pairs = list(zip(_floats(outputs), _floats(dense), strict=False))
        if not pairs:
            msg = "the network returns no tensors of numbers: there is nothing to distill"
            raise ModelError(msg)
        return torch.stack([_distance(own, other) for own, other in pairs]).mean()

    def score(self, model: nn.Module, split: Split | None = None) -> Score:
        """Return what its owner says of a network.

        Raises:
            ModelError: no number.
        """
        del split  # the score looks at data of its own
        with evaluation_mode(model):
            answer: Any = self.score_function(model)
        try:
            value = float(answer)
        except (TypeError, ValueError, RuntimeError) as error:
            msg = f"the score is {answer}: return a number"
            raise ModelError(msg) from error
        return Score(name=self.score_name, value=value, higher_is_better=self.higher_is_better)

    @cached_property
    def dense_score(self) -> Score:
        """The score of the dense network.

        Raises:
            ModelError: it is NaN or infinite.
        """
        score = self.score(copy_network(unwrap(self.model)))
        if not math.isfinite(score.value):
            msg = f"the {self.score_name} of the whole network is {score.value}: return a number"
            raise ModelError(msg)
        return score

    def dense_outputs(self, model: nn.Module, batches: Iterable[Batch], *, autocast: bool) -> None:
        """Return None: networks are compared by their scores."""

    def measure(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        autocast: bool,
        dense_outputs: Tensor | None = None,
    ) -> Scores:
        """Return the score's utility on the scale of an accuracy; its fall is the divergence."""
        del batches, autocast, dense_outputs
        dense, score = self.dense_score, self.score(model)
        utility = score.relative_to(dense)
        return Scores(
            accuracy=utility,
            loss=-utility,
            kl=dense.relative_to(dense) - utility,
            soft_accuracy=None,
        )


def custom(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    train: TrainSplit | Iterable[Any],
    score: ScoreFunction,
    higher_is_better: bool,
    loss: Loss | None = None,
    score_name: str = "score",
    name: str = "network",
) -> CustomTask:
    """Return the task of a network of any kind.

    Args:
        model: the trained network, on the device where it runs; nothing changes it.
        example_inputs: what its forward takes.
        train: batches of shuffled training data, as the loss takes them: a list, or a loader of
            which the first ``NUM_BATCHES`` are taken.
        score: how good a network is, as one number: mAP, perplexity, R^2, ... It is given networks
            in eval mode, and may not change them. Measure it on data that neither training nor the
            final report sees.
        higher_is_better: False if the score is an error, a perplexity, ...
        loss: mean loss of a network on a batch; default: cross-entropy of (inputs, class numbers).
        score_name: what the score is called in reports.
        name: of the network, in rows and errors.

    Raises:
        PruneGraphError: there are no batches, or the arguments are of the wrong kind.
    """
    flag: object = higher_is_better
    if not isinstance(flag, bool):
        msg = f"higher_is_better={flag!r} must be True or False"
        raise ConfigError(msg)
    loss = cross_entropy if loss is None else loss
    functions: dict[str, object] = {"score": score, "loss": loss}
    for what, function in functions.items():
        if not callable(function):
            msg = f"{what} is a {type(function).__name__}, not a function of a network"
            raise ConfigError(msg)
    split = train if isinstance(train, Split) else ready_split(train, "train", NUM_BATCHES)
    given: object = split
    if not isinstance(given, TrainSplit):
        msg = f"train is a {type(given).__name__}, not a TrainSplit or batches: see docs/own.md"
        raise DataError(msg)
    return CustomTask(
        model=model,
        example_inputs=example_inputs,
        train=given,
        score_function=score,
        higher_is_better=higher_is_better,
        loss_function=loss,
        score_name=score_name,
        name=name,
    )


def cross_entropy(network: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross-entropy of a batch ``(inputs [b, ...], class numbers [b, ...])``.

    Raises:
        DataError: the batch is no such pair, or its labels do not fit the network's logits.
        ModelError: the network returns no tensor, or does not take the inputs.
    """
    pair = tuple(batch) if isinstance(batch, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        kind = type(batch).__name__
        msg = f"train holds batches of {kind}, not (inputs, class numbers): {CUSTOM_LOSS}"
        raise DataError(msg)
    inputs, labels = pair
    try:
        logits = logits_in(network(_placed(inputs, network)))
    except RuntimeError as error:
        msg = f"the network fails on train inputs of {list(inputs.shape)}: {first_line(error)}"
        raise DataError(msg) from error
    if not isinstance(logits, Tensor):
        msg = f"{type(network).__name__} returns {type(logits).__name__}, not logits: {CUSTOM_LOSS}"
        raise ModelError(msg)
    # those of a regression would pass for shares of classes
    if labels.is_floating_point() and logits.ndim < 2:
        msg = f"train holds labels of {labels.dtype}, no class numbers: {CUSTOM_LOSS}"
        raise DataError(msg)
    try:
        return F.cross_entropy(logits.float(), labels.to(logits.device))
    except (RuntimeError, ValueError, IndexError) as error:
        msg = (
            f"train holds labels {list(labels.shape)} of {labels.dtype}, which do not fit logits "
            f"of {list(logits.shape)} ({first_line(error)}): {CUSTOM_LOSS}"
        )
        raise DataError(msg) from error


def _placed(inputs: Tensor, network: nn.Module) -> Tensor:
    """Return inputs where a network reads them; numbers of tokens keep their precision."""
    if inputs.is_floating_point():
        return place_images(inputs, network)
    return inputs.to(next((item.device for item in network.parameters()), inputs.device))


def _floats(outputs: Any) -> list[Tensor]:
    return [item for item in tensors_in(outputs) if item.is_floating_point()]


def _distance(own: Tensor, other: Tensor) -> Tensor:
    """Return the mean squared distance over the variance of the other."""
    own, other = own.float(), other.float()
    variance = (other - other.mean()).square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (own - other).square().mean() / variance
