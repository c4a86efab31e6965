"""The learning curve that tells most: what the policy's own mask reached as the search went on."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prunegraph.core.masks import ChannelMask
from prunegraph.rewards import unpack_bits
from prunegraph.runs.bench import Bench

GREEDY_POINTS = 8
"""Masks that are measured for the curve."""

GREEDY_IMAGES = 1500
"""Search images that they are measured on."""

GREEDY_CURVE = ("greedy_networks", "greedy_accuracy")
"""The figures of the curve: networks that were run before, accuracy then."""


def greedy_curve(
    history: Sequence[Mapping[str, Any]], cell: str, last: ChannelMask, bench: Bench
) -> dict[str, list[float]]:
    """Measure the policy's own masks, evenly over the updates, the first and the last included.

    It is done when the search is over, decides nothing and counts for no method.

    Args:
        history: one record an update, with the policy's mask before it.
        cell: which network and budget.
        last: the policy's mask after the last update.
        bench: the network.

    Returns:
        The figures of ``GREEDY_CURVE``; empty lists where the policy has no mask of one step.
    """
    graph, networks = bench.target.graph, [0, *(int(record["networks"]) for record in history)]
    masks = [
        (before, graph.mask(unpack_bits(bits, graph.num_units)))
        for before, record in zip(networks, history, strict=False)
        if (bits := record["greedy_masks"].get(cell))
    ]
    if not masks:
        return {name: [] for name in GREEDY_CURVE}
    masks.append((networks[-1], last))
    chosen = np.linspace(0, len(masks) - 1, min(GREEDY_POINTS, len(masks))).round().astype(int)
    evaluator = bench.final_evaluator
    subset = evaluator.draw_subset(GREEDY_IMAGES, bench.seed)
    accuracies = [evaluator.evaluate(masks[index][1], subset).accuracy for index in chosen]
    points = [float(masks[index][0]) for index in chosen]
    return dict(zip(GREEDY_CURVE, (points, accuracies), strict=True))
