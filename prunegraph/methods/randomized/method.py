"""Levels of sparsity, each with candidates, a short training of each, and a whole one of the best.

After Li et al. 2023 (arXiv 2310.13183), of which the abstract and the code are public. Ours are the
split of search rows that candidates are judged on (the code takes the development set at the last
level), the loss in place of the score, and steps that all rows share.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.checks import check_fields, check_positive, check_range
from prunegraph.core.errors import BudgetError
from prunegraph.core.masks import BoolArray, Float64Array
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import copy_network, unwrap
from prunegraph.layerwise.weights import prunable_weights
from prunegraph.methods.method import Problem, Result, Role
from prunegraph.methods.randomized.draw import divide_kept, inclusion, largest, most_drawn
from prunegraph.methods.randomized.run import Selection
from prunegraph.methods.weights import TrainedWeights, nonzero_mask
from prunegraph.training.loop import FinetuneConfig

LEVELS = (0.54, 0.83, 0.92, 0.9375)
"""Sparsities on the way, as in the paper's code; those below the one that is asked for."""

APART = 0.015
"""A level nearer than this to the next one is left out."""

RELATIVE_LR = 0.01
"""AdamW's steps are about as large as its learning rate, whatever the gradients are."""

WARMUP = 0.1
"""Share of a training's steps over which the learning rate rises."""

Candidate = Callable[[np.random.Generator], WeightMask]
"""Returns one of a level's masks."""


@dataclass(frozen=True, kw_only=True)
class Levels(TrainedWeights):
    """A network that is pruned level by level and trained in each, by AdamW with distillation.

    Attributes:
        candidates: masks that are tried in each level.
        early: steps after which each is judged; 0: as it is.
        steps: of the whole training of a level.
        batch_size: samples a step.
        lr: peak learning rate; default: a hundredth of the weights' root mean square.
        distill: share of the dense network's outputs in the loss, in [0, 1].
    """

    selects: ClassVar[bool] = True
    """Whether there are candidates; else their steps go to the training of the one mask."""

    candidates: int = 4
    early: int = 25
    steps: int = 200
    batch_size: int = 32
    lr: float | None = None
    distill: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self, candidates=1, early=0, steps=1, batch_size=2)
        check_positive("lr", self.lr)
        check_range("distill", self.distill, 0.0, 1.0)

    @abstractmethod
    def candidate(
        self, values: Mapping[str, Float64Array], alive: WeightMask, kept: int
    ) -> Candidate:
        """Return what draws the masks of a level.

        Args:
            values: ``[n]`` absolute values of each layer's weights that are left.
            alive: which are left.
            kept: how many stay.
        """

    def check(self, problem: Problem) -> None:
        """Say before any work what it cannot serve.

        Raises:
            BudgetError: the budget is no sparsity, has a pattern, or more is zero already.
        """
        super().check(problem)
        weights, sparsity = prunable_weights(unwrap(problem.task.model)), problem.budget.sparsity
        size = sum(weight.size for weight in weights.values())
        if size - round((sparsity or 0.0) * size) < len(weights):
            msg = f"sparsity={sparsity} leaves some layers without a weight: ask less"
            raise BudgetError(msg)

    def prune(self, problem: Problem) -> Result:
        """Select and train level by level; an interrupted run goes on after its last training."""
        self.check(problem)
        model = copy_network(unwrap(problem.task.model))
        problem.task.place_model(model, next(model.parameters()).device)
        first, search = nonzero_mask(model), problem.task.search
        number = self.candidates if self.selects else 1
        run = Selection(
            problem=problem,
            config=self._config(model),
            candidates=number,
            early=self.early,
            steps=self.steps if number > 1 else self.steps + self.candidates * self.early,
            name=self.name,
            identity=problem.identity(
                self,
                train=problem.task.train.fingerprint(),
                search=None if search is None else search.fingerprint(),
            ),
            model=model,
            mask=first,
            levels=levels_to(problem.budget, first.sparsity),
            candidate=lambda level: self._candidate(model, run.mask, level),
        )
        return run.result()

    def _config(self, model: nn.Module) -> FinetuneConfig:
        return FinetuneConfig(
            epochs=1,
            batch_size=self.batch_size,
            peak_lr=RELATIVE_LR * rms(model) if self.lr is None else self.lr,
            warmup_epochs=WARMUP,
            optimizer="adamw",
            distill_weight=self.distill,
        )

    def _candidate(self, model: nn.Module, mask: WeightMask, sparsity: float) -> Candidate:
        values = {
            name: model.get_parameter(name).detach().abs().cpu().double()[bits].numpy()
            for name, bits in mask.keep.items()
        }
        return self.candidate(values, mask, mask.size - round(sparsity * mask.size))


@dataclass(frozen=True, kw_only=True)
class Randomized(Levels):
    """Candidates that keep other weights, as many in each layer.

    Attributes:
        draws: how often weights are drawn; more = nearer to magnitude pruning.
        exponent: of the absolute values that weights are drawn by.
    """

    name: ClassVar[str] = "randomized"
    beside: ClassVar[tuple[str, ...]] = (
        *("randomized_shares", "randomized_magnitude", "randomized_uniform"),
    )
    """Rows that a run of it has too."""

    draws: int = 8
    exponent: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, draws=1, exponent=0)

    def candidate(
        self, values: Mapping[str, Float64Array], alive: WeightMask, kept: int
    ) -> Candidate:
        """Return what draws the masks of a level: see ``draw.inclusion``."""
        counts = even_counts(alive, kept)
        chances = {n: inclusion(values[n], counts[n], self.exponent) for n in values}

        def drawn(generator: np.random.Generator) -> WeightMask:
            return within(
                alive,
                {n: most_drawn(chances[n], counts[n], self.draws, generator) for n in chances},
            )

        return drawn


@dataclass(frozen=True, kw_only=True)
class RandomizedShares(Levels):
    """Candidates that keep other numbers of weights a layer, the largest of each.

    Attributes:
        spread: standard deviation of the logarithm of a layer's share.
    """

    name: ClassVar[str] = "randomized_shares"

    spread: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, spread=0)

    def candidate(
        self, values: Mapping[str, Float64Array], alive: WeightMask, kept: int
    ) -> Candidate:
        """Return what draws the masks of a level: log-normal shares of the layers."""
        sizes = {name: bits.numel() for name, bits in alive.keep.items()}

        def drawn(generator: np.random.Generator) -> WeightMask:
            factors = np.exp(self.spread * generator.standard_normal(len(sizes)))
            shares = {n: size * f for (n, size), f in zip(sizes.items(), factors, strict=True)}
            counts = divide_kept(shares, {n: len(values[n]) for n in values}, kept)
            return within(alive, {n: largest(values[n], counts[n]) for n in values})

        return drawn


@dataclass(frozen=True, kw_only=True)
class RandomizedMagnitude(Levels):
    """The largest weights of each layer, with as many steps in all: a control."""

    name: ClassVar[str] = "randomized_magnitude"
    role: ClassVar[Role] = "control"
    selects: ClassVar[bool] = False

    def candidate(
        self, values: Mapping[str, Float64Array], alive: WeightMask, kept: int
    ) -> Candidate:
        """Return what gives the mask of a level, whatever the random numbers are."""
        counts = even_counts(alive, kept)
        mask = within(alive, {name: largest(values[name], counts[name]) for name in values})
        return lambda _: mask


@dataclass(frozen=True, kw_only=True)
class RandomizedUniform(Levels):
    """Weights that are drawn whatever their size, with as many steps in all: a control."""

    name: ClassVar[str] = "randomized_uniform"
    role: ClassVar[Role] = "control"
    selects: ClassVar[bool] = False

    def candidate(
        self, values: Mapping[str, Float64Array], alive: WeightMask, kept: int
    ) -> Candidate:
        """Return what draws the mask of a level."""
        counts = even_counts(alive, kept)

        def drawn(generator: np.random.Generator) -> WeightMask:
            return within(
                alive,
                {n: largest(generator.random(len(values[n])), counts[n]) for n in values},
            )

        return drawn


def levels_to(budget: Budget, zero: float) -> tuple[float, ...]:
    """Return the levels to a budget's sparsity, above the share that is zero already."""
    final = budget.sparsity or 0.0
    return (*(level for level in LEVELS if zero < level < final - APART), final)


def rms(model: nn.Module) -> float:
    """Return the root mean square of the prunable weights that are not zero."""
    weights = [model.get_parameter(name).detach().flatten() for name in prunable_weights(model)]
    values = torch.cat(weights).double()
    return float(values[values != 0.0].square().mean().sqrt())


def even_counts(alive: WeightMask, kept: int) -> dict[str, int]:
    """Return how many weights of each layer stay: the same share of each, where it has as many."""
    sizes = {name: float(bits.numel()) for name, bits in alive.keep.items()}
    return divide_kept(sizes, {name: int(bits.sum()) for name, bits in alive.keep.items()}, kept)


def within(alive: WeightMask, kept: Mapping[str, BoolArray]) -> WeightMask:
    """Return a mask nested in another.

    Args:
        alive: the other.
        kept: ``[n]`` which of each layer's weights that it keeps stay.
    """
    keep = {}
    for name, bits in alive.keep.items():
        keep[name] = torch.zeros_like(bits)
        keep[name][bits] = torch.from_numpy(kept[name])
    return WeightMask(keep)
