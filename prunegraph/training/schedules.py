"""Which learning rate or sparsity a step of a training has: pure functions of its number."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from prunegraph.core.errors import ConfigError


class Schedule(Protocol):
    """From a step to the share of the weights that are zero in it, in [0, 1)."""

    def __call__(self, step: int, /) -> float:
        """Return the sparsity of a step, counted from 0."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same sparsity in every step."""

    final: float

    def __post_init__(self) -> None:
        check_sparsities(self.final)

    def __call__(self, step: int, /) -> float:
        """Return the sparsity of a step."""
        del step
        return self.final


@dataclass(frozen=True)
class Cubic:
    """Fast at first, when many weights are of no use (Zhu and Gupta 2017, arXiv 1710.01878, eq. 1).

    Attributes:
        final: sparsity from ``end`` on.
        begin: last step of sparsity ``initial``.
        end: first step of the final sparsity.
        every: the sparsity rises in every so many steps.
        initial: sparsity until ``begin``.
    """

    final: float
    begin: int = 0
    end: int = 1
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        check_sparsities(self.initial, self.final)
        _check_steps(self.begin, self.end, self.every)

    def __call__(self, step: int, /) -> float:
        """Return the sparsity of a step."""
        share = _share(step, self.begin, self.end, self.every)
        if share == 1.0:
            return self.final
        return self.final + (self.initial - self.final) * (1.0 - share) ** 3


@dataclass(frozen=True)
class Geometric:
    """Each stage keeps the same share of the weights that are left (Han et al. 2015).

    After k stages of rate d the sparsity is ``1 - (1 - d)^k``.

    Attributes:
        final: sparsity from ``end`` on.
        begin: last step in which nothing is zero.
        end: first step of the final sparsity.
        every: steps of a stage.
    """

    final: float
    begin: int = 0
    end: int = 1
    every: int = 1

    def __post_init__(self) -> None:
        check_sparsities(self.final)
        _check_steps(self.begin, self.end, self.every)

    def __call__(self, step: int, /) -> float:
        """Return the sparsity of a step."""
        share = _share(step, self.begin, self.end, self.every)
        return self.final if share == 1.0 else 1.0 - (1.0 - self.final) ** share


@dataclass(frozen=True)
class Levels:
    """Sparsities that hold from given steps on; before the first one nothing is zero.

    Attributes:
        levels: pairs of a step and the sparsity from it on, in order.
    """

    levels: Sequence[tuple[int, float]]

    def __post_init__(self) -> None:
        check_sparsities(*(sparsity for _, sparsity in self.levels))
        if any(first >= second for (first, _), (second, _) in pairwise(self.levels)):
            msg = f"levels={self.levels} must be in the order of their steps"
            raise ConfigError(msg)

    def __call__(self, step: int, /) -> float:
        """Return the sparsity of a step."""
        return next((value for begin, value in reversed(self.levels) if step >= begin), 0.0)


def learning_rate_at(step: int, *, steps: int, warmup_steps: int, peak: float) -> float:
    """Return the learning rate of one step: a linear rise, then a half cosine towards zero.

    Args:
        step: from 0.
        steps: number of all steps.
        warmup_steps: steps of the rise; the last one reaches the peak.
        peak: the highest learning rate.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * share))


def _share(step: int, begin: int, end: int, every: int) -> float:
    """Return which share of the way from begin to end the last stage has reached, in [0, 1]."""
    if step >= end:
        return 1.0
    return max(0, (step - begin) // every) * every / (end - begin)


def check_sparsities(*sparsities: float) -> None:
    """Raise ConfigError unless sparsities lie in [0, 1) and never fall."""
    for sparsity in sparsities:
        if not 0.0 <= sparsity < 1.0:
            msg = f"a sparsity of {sparsity} must lie in [0, 1)"
            raise ConfigError(msg)
    if any(first > second for first, second in pairwise(sparsities)):
        msg = f"sparsities {', '.join(map(str, sparsities))} must not fall"
        raise ConfigError(msg)


def _check_steps(begin: int, end: int, every: int) -> None:
    if not (0 <= begin < end and every >= 1):
        msg = f"begin={begin}, end={end}, every={every}: 0 <= begin < end and every >= 1 are needed"
        raise ConfigError(msg)
