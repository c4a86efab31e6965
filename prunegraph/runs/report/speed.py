"""What a pruned network gains on the clock, and whether that is what its size promises."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from prunegraph.core.masks import ChannelMask
from prunegraph.graph import ExampleInputs, StructureGraph, unwrap
from prunegraph.graph.apply import apply_mask
from prunegraph.graph.costs.clock import device_in_words, measure_latencies
from prunegraph.graph.costs.latency_budget import TOLERANCE

PAYS = 0.5
"""Pruning pays in time if this share of the gain that multiply-adds promise becomes real."""

LEAST_PROMISED = 0.05
"""Share of the multiply-adds below which removing them promises no time."""

NUM_RUNS = 60
"""Forwards of a network."""

MAX_SECONDS = 3.0
"""Longest that the warm-up or the runs of one network take."""


def latencies(
    model: nn.Module, graph: StructureGraph, mask: ChannelMask, example_inputs: ExampleInputs
) -> dict[str, Any]:
    """Time a forward of the dense and of the pruned network.

    Each figure is that of the fastest forward: what else the machine does only adds.

    Args:
        model: the dense network, laid out as it is to be timed.
        graph: its structure.
        mask: which classes stay.
        example_inputs: what its forward takes; their batch is what is timed.

    Returns:
        The report's ``latency_ms``: milliseconds as ``dense`` and ``pruned``, and ``on``, the
        device in words, with how busy it was if that made them longer.
    """
    networks = unwrap(model), apply_mask(model, graph, mask)
    dense, pruned = measure_latencies(
        networks, example_inputs, num_runs=NUM_RUNS, max_seconds=MAX_SECONDS
    )
    on = device_in_words(example_inputs)
    busy = dense.disturbed or pruned.disturbed
    return {
        "dense": round(dense.least, 4),
        "pruned": round(pruned.least, 4),
        "on": on if busy is None else f"{on} ({busy})",
    }


def repaired(dense: float, pruned: float, macs: float) -> float:
    """Return the share of the promised time that is saved.

    Args:
        dense: milliseconds of the dense network.
        pruned: milliseconds of the pruned one.
        macs: share of the multiply-adds that remains.
    """
    return (1.0 - pruned / dense) / max(1.0 - macs, 1e-9)


def latency_warning(content: Mapping[str, Any]) -> str | None:
    """Return the line that says that a report's network is too slow, or does not pay in time.

    None if there is nothing to say.
    """
    times, pruned = content.get("latency_ms"), content["pruned"]
    if times is None:
        return None
    asked = content["budget"].get("max_latency", math.inf)
    device = times.get("on", "this device")
    if times["pruned"] > TOLERANCE * asked:
        why = (
            "the prediction was too low, or the machine is slower now; ask for less, "
            "or let apply --policy with this run measure"
        )
        if "decision" in content:
            why = "it took less when the policy decided, so the machine is slower now"
        return (
            f"the pruned network takes {times['pruned']:.3g} ms on {device}, {asked:g} were "
            f"asked for: {why}"
        )
    macs = pruned["macs"] / content["dense"]["macs"]
    if 1.0 - macs < LEAST_PROMISED or repaired(times["dense"], times["pruned"], macs) >= PAYS:
        return None
    if content["budget"].get("round_to", 1) % 8:
        why = "small layers, whose start takes the time, or odd widths, which --round-to 8 may mend"
    else:
        why = "small layers, whose start takes the time"
    return (
        f"pruning does not pay in time on {device}: "
        f"x{times['dense'] / times['pruned']:.2f} of the x{1 / macs:.2f} that multiply-adds "
        f"promise ({why})"
    )
