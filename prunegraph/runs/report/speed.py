"""What a pruned network gains on the clock, and whether that is what its size promises."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from prunegraph.core.masks import ChannelMask
from prunegraph.graph import ExampleInputs, StructureGraph, unwrap
from prunegraph.graph.apply import apply_mask
from prunegraph.graph.costs.clock import device_in_words, measure_latencies
from prunegraph.graph.costs.latency_budget import TOLERANCE

PAYS = 0.5
"""Pruning pays in time if this share of the gain that multiply-adds promise becomes real."""

FASTER = 1.2
"""A batch that is so many times as fast is named where one input does not pay."""

LEAST_PROMISED = 0.05
"""Share of the multiply-adds below which removing them promises no time."""

NUM_RUNS = 60
"""Forwards of a network."""

MAX_SECONDS = 3.0
"""Longest that the warm-up or the runs of one network take."""

BATCH = 64
"""Inputs that a run times at once, besides one alone."""

BATCH_MEMORY = 2**30
"""Bytes of activations that they may take at most."""


def latencies(
    model: nn.Module,
    graph: StructureGraph,
    mask: ChannelMask,
    example_inputs: ExampleInputs,
    *,
    batch: int = 1,
) -> dict[str, Any]:
    """Time a forward of the dense and of the pruned network.

    Each figure is that of the fastest forward: what else the machine does only adds.

    Args:
        model: the dense network, laid out as it is to be timed.
        graph: its structure.
        mask: which classes stay.
        example_inputs: what its forward takes; their batch is what is timed.
        batch: how many of a tensor's inputs are timed at once besides, if memory allows; 1 = none.

    Returns:
        The report's ``latency_ms``: milliseconds as ``dense`` and ``pruned``, and ``on``, the
        device in words, with how busy it was if that made them longer; as ``dense_batch`` and
        ``pruned_batch`` those of ``batch`` inputs at once.
    """
    networks = unwrap(model), apply_mask(model, graph, mask)
    dense, pruned = measure_latencies(
        networks, example_inputs, num_runs=NUM_RUNS, max_seconds=MAX_SECONDS
    )
    on = device_in_words(example_inputs)
    busy = dense.disturbed or pruned.disturbed
    times = {
        "dense": round(dense.least, 4),
        "pruned": round(pruned.least, 4),
        "on": on if busy is None else f"{on} ({busy})",
    }
    memory = batch * graph.peak_memory(graph.dense_mask())
    if batch > 1 and isinstance(example_inputs, Tensor) and memory <= BATCH_MEMORY:
        inputs = example_inputs[:1].expand(batch, *example_inputs.shape[1:]).contiguous()
        together = measure_latencies(networks, inputs, num_runs=NUM_RUNS, max_seconds=MAX_SECONDS)
        several = zip(("dense_batch", "pruned_batch"), together, strict=True)
        times |= {"batch": batch, **{name: round(each.least, 4) for name, each in several}}
    return times


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
    odd = content["budget"].get("round_to", 1) % 8
    many = times.get("batch")
    gain = times["dense_batch"] / times["pruned_batch"] if many else 0.0
    ways = [
        *[f"{many} images at once, which are x{gain:.2f} as fast"] * (gain >= FASTER),
        *["widths in multiples: --round-to 8"] * bool(odd),
        f"a budget in time: --max-latency {macs * times['dense']:.2g}",
    ]
    return (
        f"pruning does not pay in time on {device}: "
        f"x{times['dense'] / times['pruned']:.2f} of the x{1 / macs:.2f} that multiply-adds "
        f"promise, since starting small layers takes the time; what may pay: {'; '.join(ways)}"
    )
