"""The learning curve that tells most: what the policy's own mask reached as the search went on."""

from collections.abc import Sequence

import numpy as np

from prunegraph.core.masks import unpack_bits
from prunegraph.runs.context import RunContext

GREEDY_POINTS = 8
"""Masks that are measured for the curve."""

GREEDY_IMAGES = 1500
"""Search images that they are measured on."""

GREEDY_CURVE = ("greedy_networks", "greedy_accuracy")
"""The figures of the curve: networks that were run before, accuracy then."""


def greedy_curve(
    context: RunContext, policy_masks: Sequence[tuple[int, str]]
) -> dict[str, list[float]]:
    """Measure the policy's own masks, evenly over the updates, the first and the last included.

    It is done when the search is over, decides nothing and counts for no method.

    Args:
        context: the network.
        policy_masks: networks run before, packed bits; none where the policy takes several steps.

    Returns:
        The figures of ``GREEDY_CURVE``.
    """
    if not policy_masks:
        return {name: [] for name in GREEDY_CURVE}
    graph, evaluator = context.target.graph, context.final_evaluator
    subset = evaluator.draw_subset(GREEDY_IMAGES, context.seed)
    count = min(GREEDY_POINTS, len(policy_masks))
    points, accuracies = [], []
    for index in np.linspace(0, len(policy_masks) - 1, count).round().astype(int):
        networks, bits = policy_masks[index]
        mask = graph.mask(unpack_bits(bits, graph.num_units))
        points.append(float(networks))
        accuracies.append(evaluator.evaluate(mask, subset).accuracy)
    return dict(zip(GREEDY_CURVE, (points, accuracies), strict=True))
