"""How long a forward takes on the device at hand."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from prunegraph.graph import ExampleInputs, call_forward, evaluation_mode
from prunegraph.graph.calls import tensors_in

NUM_ROUNDS = 3
"""How often something is timed where the least counts."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How long a forward takes.

    Attributes:
        median: milliseconds.
        p90: milliseconds that nine of ten runs stay below.
        num_runs: runs that were timed.
    """

    median: float
    p90: float
    num_runs: int


def measure_latency(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    num_runs: int = 50,
    num_warm_up: int = 10,
    max_seconds: float = float("inf"),
) -> Latency:
    """Time a network's forward in eval mode, without gradients.

    Args:
        model: the network; it is left as it is.
        example_inputs: what its forward takes, on its device.
        num_runs: runs that are timed.
        num_warm_up: runs before those.
        max_seconds: stop once warm-up or timed runs took so long; three are timed in any case.
    """
    device = next(
        (tensor.device for tensor in tensors_in(example_inputs)),
        torch.device("cpu"),
    )
    with evaluation_mode(model), torch.inference_mode():
        run = _timed(lambda: call_forward(model, example_inputs), device)
        _repeat(run, num_warm_up, 1, max_seconds)
        times = _repeat(run, num_runs, 3, max_seconds)
    return Latency(
        median=float(np.median(times)), p90=float(np.quantile(times, 0.9)), num_runs=len(times)
    )


def device_in_words(example_inputs: ExampleInputs) -> str:
    """Return what a forward of these inputs runs on: a GPU's name, or the CPU and its threads."""
    kinds = {tensor.device.type for tensor in tensors_in(example_inputs)}
    if kinds == {"cuda"}:
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"the CPU with {threads} thread{'s' if threads > 1 else ''}"


def least_latencies(
    models: Sequence[nn.Module],
    example_inputs: ExampleInputs,
    *,
    num_runs: int = 50,
    max_seconds: float = float("inf"),
) -> list[Latency]:
    """Time networks in turn, ``NUM_ROUNDS`` times, and return of each the least median.

    What else the machine does only adds. Args are those of ``measure_latency``.
    """
    rounds = [
        [
            measure_latency(model, example_inputs, num_runs=num_runs, max_seconds=max_seconds)
            for model in models
        ]
        for _ in range(NUM_ROUNDS)
    ]
    return [min(each, key=lambda latency: latency.median) for each in zip(*rounds, strict=True)]


def _timed(call: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """Return a function that runs ``call`` and returns its milliseconds."""

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def run() -> float:
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        return 1e3 * (time.perf_counter() - start)

    return run


def _repeat(run: Callable[[], float], most: int, least: int, max_seconds: float) -> list[float]:
    """Return the milliseconds of up to ``most`` runs; fewer, but ``least``, if time is up."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < most:
        if len(times) >= least and time.perf_counter() - start > max_seconds:
            break
        times.append(run())
    return times
