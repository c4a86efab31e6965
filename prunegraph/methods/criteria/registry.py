"""How important each prunable unit is, by published criteria; higher = keep.

A criterion is one decorated function in one file of this folder, where its family is. By that alone
it has a row with every allocation, in every list of methods.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prunegraph.core.checks import find_named
from prunegraph.core.masks import Float64Array, FloatArray
from prunegraph.methods.criteria.dense import Dense


@dataclass(frozen=True, eq=False, kw_only=True)
class Given:
    """What a criterion is made of.

    Attributes:
        statistics: measured arrays ``[N]`` of the dense network, by name.
        num_units: N.
        seed: fixes what is left to chance.
    """

    statistics: Mapping[str, FloatArray]
    num_units: int
    seed: int = 0


Score = Callable[[Given], FloatArray | Float64Array]
Measure = Callable[[Dense], Float64Array]


@dataclass(frozen=True, eq=False, kw_only=True)
class Criterion:
    """A criterion, with what it says of itself.

    Attributes:
        name: of its rows, as ``"l1"``.
        score: from what is given to importances ``[N]``, higher = keep.
        of_the_layer: its scale is that of a layer, its fan-in, width or map size. Where groups
            compete it is divided by the group's mean, as by Torch-Pruning; else whole groups go.
        per_seed: whether it depends on which samples were drawn, or on chance.
        measure: of criteria that look at the network itself: what is kept as a statistic.
        num_samples: train samples that this takes by default.
    """

    name: str
    score: Score
    of_the_layer: bool
    per_seed: bool
    measure: Measure | None = None
    num_samples: int = 0


CRITERIA: dict[str, Criterion] = {}
"""Every criterion by name; ``criterion`` and ``measured_criterion`` add to it."""


def criterion(
    name: str, *, of_the_layer: bool = False, reads_images: bool = True, by_chance: bool = False
) -> Callable[[Score], Score]:
    """Register a function of statistics that are there anyway.

    Args:
        name: of its rows.
        of_the_layer: see ``Criterion``.
        reads_images: whether the statistics that it reads were measured on train data.
        by_chance: whether it draws random numbers.
    """

    def add(score: Score) -> Score:
        CRITERIA[name] = Criterion(
            name=name,
            score=score,
            of_the_layer=of_the_layer,
            per_seed=reads_images or by_chance,
        )
        return score

    return add


def statistic_criterion(
    name: str, statistic: str, *, of_the_layer: bool = False, reads_images: bool = True
) -> None:
    """Register a statistic that is a criterion as it is.

    Args:
        name: of its rows.
        statistic: its name.
        of_the_layer: see ``Criterion``.
        reads_images: whether it was measured on train data.
    """
    add = criterion(name, of_the_layer=of_the_layer, reads_images=reads_images)
    add(lambda given: given.statistics[statistic])


def measured_criterion(
    name: str, *, num_samples: int, of_the_layer: bool = False
) -> Callable[[Measure], Measure]:
    """Register a function of the dense network; it is run once, when a method first asks.

    Args:
        name: of its rows, and of the statistic that it becomes.
        num_samples: train samples that it is given.
        of_the_layer: see ``Criterion``.
    """

    def add(measure: Measure) -> Measure:
        CRITERIA[name] = Criterion(
            name=name,
            score=lambda given: given.statistics[name],
            of_the_layer=of_the_layer,
            per_seed=True,
            measure=measure,
            num_samples=num_samples,
        )
        return measure

    return add


def find_criterion(name: str) -> Criterion:
    """Return the criterion of that name.

    Raises:
        ConfigError: there is none.
    """
    return find_named(name, CRITERIA, "criterion")


def importance(
    name: str, statistics: Mapping[str, FloatArray], num_units: int, seed: int = 0
) -> Float64Array:
    """Return ``[N]`` importances, higher = keep.

    Args:
        name: of a criterion.
        statistics: measured arrays ``[N]``.
        num_units: N.
        seed: fixes what is left to chance.
    """
    given = Given(statistics=statistics, num_units=num_units, seed=seed)
    return find_criterion(name).score(given).astype("float64")
