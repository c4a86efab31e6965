"""Chance: what every other criterion must beat."""

import numpy as np

from prunegraph.core.masks import Float64Array
from prunegraph.methods.criteria.registry import Given, criterion


@criterion("random", reads_images=False, by_chance=True)
def random(given: Given) -> Float64Array:
    """Draw importances from [0, 1)."""
    return np.random.default_rng(given.seed).random(given.num_units)
