"""What a network is for: its data, its loss and what counts as good."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from prunegraph.core.splits import Batch, SearchSplit, Split, TestSplit, TrainSplit

ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What the forward of a network takes: one tensor, positional or named arguments."""

WORST_UTILITY = -1.0
"""Of a network whose score is no number, or infinitely bad."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good a network is, in the task's own unit.

    Attributes:
        name: accuracy, perplexity, ...
        value: the figure.
        higher_is_better: False for errors.
    """

    name: str
    value: float
    higher_is_better: bool

    @property
    def utility(self) -> float:
        """The value, its sign changed if lower is better."""
        return self.value if self.higher_is_better else -self.value

    def relative_to(self, dense: "Score") -> float:
        """Return the utility on the scale of an accuracy: higher = better, about 0 to 1.

        If the dense network's score lies in [0, 1], it is the score itself, or one minus an error.
        Otherwise it is relative to the dense network's score, which becomes 1: a perplexity twice
        as high becomes 1/2. What would be below 0 is squashed into (-1, 0]. Higher utility always
        means a better score.

        Args:
            dense: the score of the dense network.
        """
        if math.isnan(self.value) or self.utility == -math.inf:
            return WORST_UTILITY
        if 0.0 <= dense.value <= 1.0:
            return _squashed(self.value if self.higher_is_better else 1.0 - self.value)
        if self.higher_is_better and dense.value > 0.0:
            return _squashed(self.value / dense.value)
        gain = (self.utility - dense.utility) / abs(dense.value)
        return 1.0 + gain if gain >= 0.0 else 1.0 / (1.0 - gain)


def _squashed(utility: float) -> float:
    """Return what is below 0 in (-1, 0], in the same order."""
    return utility if utility >= 0.0 else utility / (1.0 - utility)


class Scores(NamedTuple):
    """What is measured of a network that a search compares.

    Attributes:
        accuracy: the score's utility on the scale of an accuracy; top-1 in [0, 1] for classes.
        loss: mean loss, lower = better; cross-entropy in nats for classes.
        kl: mean divergence from the dense network's outputs, lower = better, or None if it was not
            asked for: KL in nats for classes; for scores of a user's the fall of the utility.
        soft_accuracy: mean probability of the right class; None if the task has no classes.
    """

    accuracy: float
    loss: float
    kl: float | None
    soft_accuracy: float | None


class Task(Protocol):
    """A network, its data and what counts as good."""

    @property
    def kind(self) -> str:
        """Which kind of task: ``"image_classification"``, ``"custom"``, ..."""
        ...

    @property
    def name(self) -> str:
        """Of the network, in rows and errors."""
        ...

    @property
    def model(self) -> nn.Module:
        """The dense network; nothing changes it."""
        ...

    @property
    def example_inputs(self) -> ExampleInputs:
        """What the network's forward takes."""
        ...

    @property
    def train(self) -> TrainSplit:
        """Samples for gradients, calibration and training."""
        ...

    @property
    def search(self) -> SearchSplit | None:
        """What masks are scored on; None = the score looks at data of its own."""
        ...

    @property
    def test(self) -> TestSplit | None:
        """Samples that are measured once, at the end; None = there are none."""
        ...

    @property
    def score_name(self) -> str:
        """Accuracy, perplexity, ..."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """False if the score is an error."""
        ...

    @property
    def autocast(self) -> bool:
        """Whether the network may run in another precision than its own."""
        ...

    def place_model(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Move a network to a device, laid out as it runs fastest there; return it."""
        ...

    def place(self, batch: Batch, model: nn.Module) -> Batch:
        """Return a batch where a network reads it: its device, precision and layout."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Return the network's outputs on a batch, on whatever device that lies."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss over the batch's samples, which gradients flow from."""
        ...

    def divergence(self, outputs: Any, dense: Any, temperature: float = 1.0) -> Tensor:
        """Return how far outputs are from those of another network, a mean over samples.

        Args:
            outputs: of ``forward``.
            dense: of ``forward`` of the other network on the same batch.
            temperature: divides logits, if the outputs are any.
        """
        ...

    def score(self, model: nn.Module, split: Split | None = None) -> Score:
        """Return how good a network is.

        Args:
            model: the network.
            split: what to measure on; None = ``search``. Scores that look at data of their own
                take no other.
        """
        ...

    def dense_outputs(
        self, model: nn.Module, batches: Iterable[Batch], *, autocast: bool
    ) -> Tensor | None:
        """Return what ``measure`` compares outputs with, a row a sample; None = nothing."""
        ...

    def measure(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        autocast: bool,
        dense_outputs: Tensor | None = None,
    ) -> Scores:
        """Return what a search compares networks by; the worst if outputs are not finite.

        Args:
            model: the network.
            batches: of the search split, or none if the task has none.
            autocast: run in bfloat16 where that is safe and the device computes it.
            dense_outputs: of the same samples, if the divergence is asked for.
        """
        ...

    def batches(self, split: Split, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Yield the split's batches of ``size`` samples, shuffled by a seed if one is given."""
        ...


def with_parts(task: Task, **parts: Any) -> Task:
    """Return a task of another ``model``, or with other samples to ``train`` on."""
    changed: Task = replace(cast(Any, task), **parts)
    return changed
