"""How important each prunable unit is, by published criteria; higher = keep."""

from collections.abc import Mapping

import numpy as np

from prunegraph.core.masks import Float64Array, FloatArray

CRITERIA: Mapping[str, str] = {
    "l1": "l1",
    "l2": "l2",
    "bn_scale": "bn_scale",
    "fpgm": "fpgm",
    "lamp": "lamp",
    "taylor": "taylor",
    "activation": "activation_mean",
    "apoz": "apoz",
    "hrank": "hrank",
    "chip": "chip",
    "obd": "obd",
    "thinet": "thinet",
    "residual_taylor": "residual_taylor",
}
"""Criterion -> the statistic that it reads (``pruning.statistics``, ``costly_statistics``)."""

RANDOM = "random"

CRITERION_NAMES: tuple[str, ...] = (RANDOM, *CRITERIA)


def importance(
    criterion: str, statistics: Mapping[str, FloatArray], num_units: int, seed: int
) -> Float64Array:
    """Return ``[N]`` importances from 0 up, higher = keep.

    Args:
        criterion: one of ``CRITERION_NAMES``.
        statistics: measured arrays ``[N]``.
        num_units: N.
        seed: fixes ``"random"``.
    """
    if criterion == RANDOM:
        return np.random.default_rng(seed).random(num_units)
    values = statistics[CRITERIA[criterion]].astype(np.float64)
    return 1.0 - values if criterion == "apoz" else values  # mostly zero = unimportant
