"""How long a forward takes on the device at hand."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from prunegraph.graph import ExampleInputs, call_forward, evaluation_mode
from prunegraph.graph.trace.calls import tensors_in

RUNS_IN_TURN = 3
"""Runs of a network before the next one has its turn."""

LEAST_RAN = 0.75
"""Below this share of its own time on a processor a run tells more of the other processes."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How long a forward takes.

    Attributes:
        least: milliseconds of the fastest run. What else the machine does only adds, so this is
            what the network takes by itself, and what counts (as Python's timeit advises).
        median: milliseconds.
        p90: milliseconds that nine of ten runs stay below.
        num_runs: runs that were timed.
        ran: share of the fastest run in which its thread had a processor; 1 on other devices, and
            on Windows, whose clock of a thread is too coarse.
    """

    least: float
    median: float
    p90: float
    num_runs: int
    ran: float

    @property
    def disturbed(self) -> str | None:
        """In words, how busy the machine was if that made the fastest run longer, or None."""
        if self.ran >= LEAST_RAN:
            return None
        share = 100.0 * (1.0 - self.ran)
        return f"other processes had the processor for {share:.0f} % of the fastest run"


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
    (latency,) = measure_latencies(
        [model],
        example_inputs,
        num_runs=num_runs,
        num_warm_up=num_warm_up,
        max_seconds=max_seconds,
    )
    return latency


def measure_latencies(
    models: Sequence[nn.Module],
    example_inputs: ExampleInputs,
    *,
    num_runs: int = 50,
    num_warm_up: int = 10,
    max_seconds: float = float("inf"),
) -> list[Latency]:
    """Time networks in turn, three runs at a time: all meet the machine in the same states.

    Args are those of ``measure_latency``, for each network.
    """
    device = next(
        (tensor.device for tensor in tensors_in(example_inputs)),
        torch.device("cpu"),
    )
    with torch.inference_mode(), ExitStack() as modes:
        for model in models:
            modes.enter_context(evaluation_mode(model))
        runs = [_timed(partial(call_forward, model, example_inputs), device) for model in models]
        _repeat(runs, num_warm_up, max_seconds)
        times = _repeat(runs, num_runs, max_seconds)
    return [
        Latency(
            least=min(each)[0],
            median=float(np.median(each, axis=0)[0]),
            p90=float(np.quantile(each, 0.9, axis=0)[0]),
            num_runs=len(each),
            ran=min(each)[1],
        )
        for each in times
    ]


def device_in_words(example_inputs: ExampleInputs) -> str:
    """Return what a forward of these inputs runs on: a GPU's name, or the CPU and its threads."""
    kinds = {tensor.device.type for tensor in tensors_in(example_inputs)}
    if kinds == {"cuda"}:
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"the CPU with {threads} thread{'s' if threads > 1 else ''}"


Run = Callable[[], tuple[float, float]]
"""Runs something, and returns its milliseconds and the share of them on a processor."""


def _timed(call: Callable[[], Any], device: torch.device) -> Run:
    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    tells = device.type == "cpu" and os.name == "posix"

    def run() -> tuple[float, float]:
        synchronise()
        start, start_cpu = time.perf_counter(), time.thread_time()
        call()
        synchronise()
        took, ran = time.perf_counter() - start, time.thread_time() - start_cpu
        return 1e3 * took, min(ran / took, 1.0) if tells else 1.0

    return run


def _repeat(runs: Sequence[Run], most: int, max_seconds: float) -> list[list[tuple[float, float]]]:
    """Return what up to ``most`` runs of each took, in turn; fewer if time is up."""
    times: list[list[tuple[float, float]]] = [[] for _ in runs]
    start = time.perf_counter()
    while len(times[0]) < most:
        if times[0] and time.perf_counter() - start > max_seconds * len(runs):
            break
        for run, taken in zip(runs, times, strict=True):
            taken += [run() for _ in range(min(RUNS_IN_TURN, most - len(taken)))]
    return times
