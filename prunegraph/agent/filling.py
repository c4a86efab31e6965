"""Thresholds for a limit of memory, which binds at one moment of the forward after the other.

One threshold for all channels lets the moment that needs most meet the limit, and removes as many
channels where memory is plentiful. So the channels that are not alive in that moment get a lower
threshold, at which the next moment meets the limit, and so on: water-filling, as in max-min
fairness (Bertsekas and Gallager, Data Networks, section 6.5.2).
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize.elementwise import find_root

from prunegraph.agent.threshold import OTHERS, BudgetThreshold, solve_threshold
from prunegraph.core.masks import BoolArray, Float64Array, IntArray

MOST_STAGES = 6
"""Thresholds of a row, at the most."""

MET = 0.99
"""Share of a limit from which on it counts as met: chance moves a sum by more."""

TOLERANCE = 1e-3
"""How far a threshold but the first may lie from its solution, in units of a score."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Filling:
    """Thresholds of B score vectors.

    Attributes:
        thresholds: ``[B, N]``; a unit is kept with probability
            ``sigmoid((score - threshold) / temperature)``.
        stages: ``[B, N]`` units of one number share a threshold.
        slopes: ``[B, N]`` what a unit adds to the cost that made its threshold.
    """

    thresholds: Float64Array
    stages: IntArray
    slopes: Float64Array


def fill(
    budget_threshold: BudgetThreshold,
    scores: Float64Array,
    limits: Float64Array,
    temperature: float,
) -> Filling:
    """Return thresholds at which no moment of the forward wastes memory.

    Args:
        budget_threshold: of the network, whose structure knows its memory.
        scores: ``[B, N]``.
        limits: ``[B, 4]`` what may remain, as of ``expected_cost_ratios``.
        temperature: above 0.
    """
    graph = budget_threshold.graph
    assert graph.memory_model is not None
    first = solve_threshold(graph, scores, limits, temperature)
    thresholds = np.repeat(first[:, None], graph.num_units, axis=1)
    kept = _probabilities(budget_threshold, scores, thresholds, temperature)
    slopes = budget_threshold.cost_slopes(kept, limits)
    stages = np.zeros(scores.shape, dtype=np.int64)
    rising = np.repeat(graph.free[None], len(scores), axis=0)
    for stage in range(1, MOST_STAGES):
        met = graph.memory_model.moments(kept) >= MET * limits[:, [OTHERS]]
        rising &= ~graph.memory_model.alive_in(met)
        rising[budget_threshold.ratios_but_memory(kept, limits) >= MET] = False
        rows = np.flatnonzero(rising.any(axis=1))
        if not len(rows):
            break
        thresholds[rows] = _lowered(
            budget_threshold,
            scores[rows],
            limits[rows],
            temperature,
            thresholds[rows],
            rising[rows],
            met[rows],
        )
        kept = _probabilities(budget_threshold, scores, thresholds, temperature)
        worst = np.where(met, -1.0, graph.memory_model.moments(kept)).argmax(axis=1)
        slopes = np.where(rising, graph.memory_model.bytes_in(worst), slopes)
        stages[rising] = stage
    return Filling(thresholds=thresholds, stages=stages, slopes=slopes)


def _probabilities(
    budget_threshold: BudgetThreshold,
    scores: Float64Array,
    thresholds: Float64Array,
    temperature: float,
) -> Float64Array:
    logits = (scores - thresholds) / temperature
    return np.where(budget_threshold.graph.free, 1.0 / (1.0 + np.exp(-logits)), 1.0)


def _lowered(
    budget_threshold: BudgetThreshold,
    scores: Float64Array,
    limits: Float64Array,
    temperature: float,
    thresholds: Float64Array,
    rising: BoolArray,
    met: BoolArray,
) -> Float64Array:
    """Return thresholds ``[B, N]``, those of rising units so low that another limit is met.

    Args:
        budget_threshold: of the network.
        scores: ``[B, N]``.
        limits: ``[B, 4]``.
        temperature: above 0.
        thresholds: ``[B, N]``.
        rising: ``[B, N]`` at least one unit a row, of equal thresholds.
        met: ``[B, T]`` moments that meet the limit already; no rising class is alive in them.
    """
    memory = budget_threshold.graph.memory_model
    assert memory is not None

    def excess(values: Float64Array, places: Float64Array) -> Float64Array:
        rows = places.astype(int)
        tried = np.where(rising[rows], values[:, None], thresholds[rows])
        kept = _probabilities(budget_threshold, scores[rows], tried, temperature)
        needs = np.where(met[rows], 0.0, memory.moments(kept) / limits[rows][:, [OTHERS]])
        others = budget_threshold.ratios_but_memory(kept, limits[rows])
        return np.asarray(np.maximum(needs.max(axis=1), others) - 1.0)

    places = np.arange(len(scores), dtype=np.float64)
    low = scores.min(axis=1) - 20.0 * temperature
    high = thresholds.max(axis=1, initial=-np.inf, where=rising)
    tolerances = {"xatol": TOLERANCE, "xrtol": 0.0, "fatol": 0.0, "frtol": 0.0}
    found = find_root(excess, (low, high), args=(places,), tolerances=tolerances).x
    found = np.where(excess(low, places) <= 0.0, low, found)
    return np.where(rising, found[:, None], thresholds)
