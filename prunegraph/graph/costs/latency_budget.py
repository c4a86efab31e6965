"""Latency budgets: measured layer times guide the projection, then the whole network is measured.

What counts in the end is the clock: a network that is too slow is cut further and measured again.
"""

from dataclasses import dataclass, replace

from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError
from prunegraph.core.masks import ChannelMask, FloatArray
from prunegraph.graph import ExampleInputs, StructureGraph
from prunegraph.graph.analyse import unwrap
from prunegraph.graph.costs.clock import Latency, device_in_words, measure_latency
from prunegraph.graph.costs.latency import LatencyTable, measure_latency_table, smallest_mask
from prunegraph.graph.projection import why_no_less
from prunegraph.graph.surgery import apply_mask

TOLERANCE = 1.05
"""A network meets a latency if its fastest run is at most this many times what was asked."""

NUM_TIGHTENINGS = 3
"""How often a network that is too slow is cut further."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LatencyProjection:
    """What ``project_latency`` returns.

    Attributes:
        mask: which units stay.
        latency: of the pruned network, measured.
        dense: of the whole network, measured.
        num_measured: pruned networks that were measured.
    """

    mask: ChannelMask
    latency: Latency
    dense: Latency
    num_measured: int


def project_latency(
    model: nn.Module,
    graph: StructureGraph,
    scores: FloatArray,
    budget: Budget,
    example_inputs: ExampleInputs,
    *,
    table: LatencyTable | None = None,
    num_runs: int = 50,
) -> LatencyProjection:
    """Project scores to a budget with a latency, and measure that the network meets it.

    The fastest of ``num_runs`` forwards takes at most 1.05 times ``budget.max_latency``; a network
    that is slower is cut further, three times at most.

    Args:
        model: the dense network, on the device that counts; it is left as it is.
        graph: its structure.
        scores: ``[N]`` finite scores, higher = keep first.
        budget: what may remain; ``max_latency`` is set, other limits hold too.
        example_inputs: what the forward takes; their batch is what is timed.
        table: measured before for this network, device and number of threads; default: now.
        num_runs: timed runs of a network.

    Raises:
        BudgetError: no latency is asked, or it cannot be met; the message says the least reached.
        MaskError: scores of another shape, or not finite.
    """
    asked = budget.max_latency
    if asked is None:
        msg = "project_latency needs a budget with max_latency; without one use graph.project"
        raise BudgetError(msg)
    model, others = unwrap(model), budget.without_latency()
    graph.project(scores, others)  # raises before anything slow if other limits cannot be met
    if table is None:
        table = measure_latency_table(
            model, graph, example_inputs, budget=budget, num_runs=num_runs
        )
    predicted = replace(graph, latency_model=table)
    least = smallest_mask(graph, others, scores)
    reached, target = float("inf"), asked
    for attempt in range(1 + NUM_TIGHTENINGS):
        mask = least
        if table.milliseconds(least.keep) <= target:
            mask = predicted.project(scores, replace(others, max_latency=target))
        slim = apply_mask(model, graph, mask)
        latency = measure_latency(slim, example_inputs, num_runs=num_runs)
        if latency.least <= TOLERANCE * asked:
            return LatencyProjection(
                mask=mask, latency=latency, dense=table.dense, num_measured=attempt + 1
            )
        reached = min(reached, latency.least)
        if mask == least:
            break
        target *= asked / latency.least
    msg = (
        f"max_latency={asked:g} ms cannot be met on {device_in_words(example_inputs)}: "
        f"the least reached is {reached:.3g} ms, the dense network takes {table.dense.least:.3g} "
        f"({why_no_less(graph, budget.round_to)}); give {reached:.3g} or more"
    )
    if latency.disturbed is not None:
        msg += f"; {latency.disturbed}: ask again when the machine does less"
    raise BudgetError(msg)


def project_budget(
    model: nn.Module,
    graph: StructureGraph,
    scores: FloatArray,
    budget: Budget,
    example_inputs: ExampleInputs,
    table: LatencyTable | None = None,
) -> ChannelMask:
    """Project scores to any budget: exactly, or by ``project_latency`` if it holds a latency.

    A latency that the graph predicts (``latency_model``) is met by that prediction, like the exact
    costs. Args and errors are those of ``project_latency``.
    """
    if budget.max_latency is None or graph.latency_model is not None:
        return graph.project(scores, budget)
    return project_latency(model, graph, scores, budget, example_inputs, table=table).mask
