"""Measured times of a network's layers at a grid of widths: what each channel costs on this device.

They leave out what runs between the layers, which takes time by the bytes that it writes. Whole
networks place both on the clock: the dense one, the smallest, and some of uneven widths.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from prunegraph.core.budget import Budget
from prunegraph.core.masks import BoolArray, ChannelMask, Float64Array, FloatArray, IntArray
from prunegraph.graph import ExampleInputs, OpNode, StructureGraph, call_forward, evaluation_mode
from prunegraph.graph.analyse import unwrap
from prunegraph.graph.costs.clock import Latency, measure_latencies, measure_latency
from prunegraph.graph.features import rank_in_group
from prunegraph.graph.projection import minimum
from prunegraph.graph.surgery import apply_mask
from prunegraph.graph.trace.calls import tensors_in

STRENGTHS = (1 / 16, 1 / 4, 1 / 2, 3 / 4, 1.0)
"""Kept shares of an axis at which layers are timed."""

NUM_ROUNDS = 3
"""How often the layers are timed: the machine may be slow for a while."""

SECONDS_PER_WIDTH = 0.02
"""Time spent on a layer at one pair of widths, if three runs fit into it."""

NUM_UNEVEN = 8
"""Networks of uneven widths that tell layers from bytes."""

UNEVENNESS = 0.5
"""Standard deviation of a group's advantage in them, in ranks within a group (0 to 1)."""

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)
"""Layers that can be timed alone."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LatencyTable:
    """Measured times of a network's layers at a grid of widths, placed on the clock.

    A ``CostFunction`` of the structure, in milliseconds.

    ``milliseconds(mask) = offset + scale * sum of the layers' interpolated times + rates * mask``.

    Attributes:
        positions: ``[2 M, N]`` how many positions of each unit lie on the output axis of each of
            the M timed layers, then on its input axis.
        widths: ``[2, M, K]`` kept positions of the grid, ascending; outputs, then inputs.
        times: ``[M, K, K]`` milliseconds by output and input width, ascending along both.
        dense: the whole network's latency.
        smallest: the latency of the network in which each group keeps its minimum.
        scale: network milliseconds for one of the layers'.
        offset: milliseconds that no width changes.
        rates: ``[N]`` milliseconds for the bytes that a forward writes for each unit.
        excess: of ten networks of uneven widths nine take at most this many times their prediction.
    """

    positions: Any
    widths: Float64Array
    times: Float64Array
    dense: Latency
    smallest: Latency
    scale: float
    offset: float
    rates: Float64Array
    excess: float

    def slower_by(self, factor: float) -> "LatencyTable":
        """Return a table that predicts ``factor`` times as many milliseconds."""
        return replace(
            self,
            scale=factor * self.scale,
            offset=factor * self.offset,
            rates=factor * self.rates,
        )

    def milliseconds(self, keep: BoolArray) -> float:
        """Return the predicted latency at keep bits ``[N]``; never falls as units join."""
        return float(self.expected(keep[None].astype(np.float64))[0])

    def expected(self, probabilities: Float64Array) -> Float64Array:
        """Return the predicted latency ``[B]`` at bits or keep probabilities ``[B, N]``."""
        layers = self._at_kept_widths(np.asarray(self.positions @ probabilities.T))
        return np.asarray(layers + probabilities @ self.rates)

    def slopes(self, probabilities: Float64Array) -> Float64Array:
        """Return the derivatives ``[B, N]`` of ``expected``."""
        place = self._locate(np.asarray(self.positions @ probabilities.T))
        corners = self._corners(place)  # [2, 2, M, B]
        by_out = (1 - place.share[1]) * (corners[1, 0] - corners[0, 0])
        by_out += place.share[1] * (corners[1, 1] - corners[0, 1])
        by_in = (1 - place.share[0]) * (corners[0, 1] - corners[0, 0])
        by_in += place.share[0] * (corners[1, 1] - corners[1, 0])
        by_width = np.stack([by_out, by_in]) / place.step
        slopes = self.positions.T @ by_width.reshape(-1, len(probabilities))
        return np.asarray(self.scale * slopes.T + self.rates)

    def at_stake(self, limit: float) -> BoolArray:
        """Return the units ``[N]`` that take time, if the whole network takes too long."""
        used = (np.asarray(self.positions.sum(axis=0)).ravel() > 0) | (self.rates > 0)
        return used & (self.milliseconds(np.ones(len(used), dtype=bool)) > limit)

    def fits_with_each(self, keep: BoolArray, limit: float) -> BoolArray:
        """Return ``[N]`` where the prediction stays within a limit if one removed unit joins."""
        kinds, kind_of = self._kinds
        bits = keep.astype(np.float64)
        layers = self._at_kept_widths(np.asarray(self.positions @ bits)[:, None] + kinds)[kind_of]
        return np.asarray(layers + bits @ self.rates + self.rates <= limit)

    def swapped(self, keep: BoolArray, drops: IntArray, adds: IntArray) -> Float64Array:
        """Return the prediction ``[D, A]`` after swaps, to first order."""
        bits = keep[None].astype(np.float64)
        slope = np.append(self.slopes(bits)[0], 0.0)  # -1 is none
        return np.asarray(self.expected(bits)[0] + slope[adds] - slope[drops][:, None])

    @cached_property
    def _kinds(self) -> tuple[Float64Array, IntArray]:
        """Distinct columns ``[2 M, U]`` of ``positions``, and which of them is each unit's."""
        kinds, kind_of = np.unique(self.positions.toarray(), axis=1, return_inverse=True)
        return kinds, np.asarray(kind_of).ravel()

    def _at_kept_widths(self, kept: Float64Array) -> Float64Array:
        """Return the latency ``[B]`` at kept positions ``[2 M, B]`` of the layers' axes."""
        place = self._locate(kept)
        corners = self._corners(place)
        total = np.zeros(corners.shape[2:])
        for right_out in (0, 1):
            for right_in in (0, 1):
                weight = abs(1 - right_out - place.share[0]) * abs(1 - right_in - place.share[1])
                total += weight * corners[right_out, right_in]
        return np.asarray(self.offset + self.scale * total.sum(axis=0))

    def _locate(self, kept: Float64Array) -> "_Place":
        """Find kept positions ``[2 M, B]`` in the grid."""
        kept = kept.reshape(2, len(self.times), -1)
        last = self.widths.shape[-1] - 2
        below = (self.widths[:, :, None] <= kept[..., None]).sum(axis=-1) - 1
        point = np.clip(below, 0, last)
        low = np.take_along_axis(self.widths, point, axis=-1)
        high = np.take_along_axis(self.widths, point + 1, axis=-1)
        step = np.maximum(high - low, 1.0)
        share = np.clip((kept - low) / step, 0.0, 1.0)
        return _Place(point, share, step)

    def _corners(self, place: "_Place") -> Float64Array:
        """Return the times ``[2, 2, M, B]`` at the four grid points around each place."""
        row = np.arange(len(self.times))[:, None]
        outs, ins = place.point
        return np.array(
            [[self.times[row, outs + out, ins + right] for right in (0, 1)] for out in (0, 1)]
        )


class _Place(NamedTuple):
    """Where widths ``[2, M, B]`` lie in the grid: the point below, how far, the distance."""

    point: IntArray
    share: Float64Array
    step: Float64Array


def measure_latency_table(
    model: nn.Module,
    graph: StructureGraph,
    example_inputs: ExampleInputs,
    *,
    budget: Budget | None = None,
    num_runs: int = 50,
) -> LatencyTable:
    """Time a network's layers at a grid of widths, and some whole networks.

    Takes about as long as two thousand forwards. Layers of the same sizes are timed together.
    Kernels work on blocks of channels, so that one channel more may cost as much as sixteen: where
    widths are not rounded, each time is the mean of that at a width and just above it.

    Args:
        model: the dense network; it is left as it is.
        graph: its structure.
        example_inputs: what its forward takes, on its device; their batch is what is timed.
        budget: the latency about which the table is to be right, and what widths are rounded to.
            Without a latency, or if it is not between those of the smallest and the dense network:
            half way between them.
        num_runs: timed runs of a whole network.
    """
    model = unwrap(model)
    round_to = None if budget is None else budget.round_to
    calls = _layer_calls(model, graph, example_inputs)
    widths = np.ones((2, len(calls), len(STRENGTHS)))
    times = np.full((len(calls), len(STRENGTHS), len(STRENGTHS)), np.inf)
    for row, call in enumerate(calls):
        widths[:, row] = [_grid(graph, units, call.op) for units in call.axes]
    for _ in range(NUM_ROUNDS):
        cache: dict[Any, float] = {}
        for row, call in enumerate(calls):
            for i, outs in enumerate(widths[0, row]):
                for j, ins in enumerate(widths[1, row]):
                    took = call.milliseconds(int(outs), int(ins), cache)
                    if round_to is None:
                        above = call.above(graph, int(outs), int(ins))
                        took = (took + call.milliseconds(*above, cache)) / 2
                    times[row, i, j] = min(times[row, i, j], took)
    times = np.maximum.accumulate(np.maximum.accumulate(times, axis=1), axis=2)
    counts = [
        np.bincount(call.axes[axis], minlength=graph.num_units) for axis in (0, 1) for call in calls
    ]
    ends = graph.dense_mask(), smallest_mask(graph, Budget(keep_macs=1.0, round_to=round_to))
    networks = model, apply_mask(model, graph, ends[1])
    dense, smallest = measure_latencies(networks, example_inputs, num_runs=num_runs)
    raw = LatencyTable(
        positions=sparse.csr_array(np.array(counts, dtype=np.float64).reshape(-1, graph.num_units)),
        widths=widths,
        times=times,
        dense=dense,
        smallest=smallest,
        scale=1.0,
        offset=0.0,
        rates=np.zeros(graph.num_units),
        excess=1.0,
    )
    near = None if budget is None else budget.max_latency
    if near is None or not 1.01 * smallest.least < near < dense.least:
        near = (smallest.least + dense.least) / 2
    limits = Budget(max_latency=near, round_to=round_to)
    return _on_the_clock(raw, ends, model, graph, example_inputs, limits, num_runs)


def _on_the_clock(
    raw: LatencyTable,
    ends: tuple[ChannelMask, ChannelMask],
    model: nn.Module,
    graph: StructureGraph,
    example_inputs: ExampleInputs,
    limits: Budget,
    num_runs: int,
) -> LatencyTable:
    """Share the time between the dense and the smallest network among layers and bytes.

    The share is that which fits networks of uneven widths best (least squares).
    """
    memory = graph.memory_model
    written = np.zeros(graph.num_units) if memory is None else memory.written
    by_layers, by_bytes = (_between(raw, ends, written, share=share) for share in (0.0, 1.0))
    if raw.dense.least <= raw.smallest.least:
        return by_layers
    uneven = _uneven_masks(replace(graph, latency_model=by_layers), limits)
    took = np.zeros(len(uneven))
    for row, mask in enumerate(uneven):
        networks = model, apply_mask(model, graph, mask)
        dense, slim = measure_latencies(networks, example_inputs, num_runs=num_runs // 2 + 1)
        took[row] = slim.least / dense.least * raw.dense.least  # as fast as the machine was then
    layers, apart = (
        np.array([table.milliseconds(mask.keep) for mask in uneven])
        for table in (by_layers, by_bytes)
    )
    apart -= layers
    fit = float((apart / took) @ ((took - layers) / took) / max(((apart / took) ** 2).sum(), 1e-12))
    share = min(max(fit, 0.0), 1.0)
    excess = float(np.quantile(took / (layers + share * apart), 0.9))
    return replace(_between(raw, ends, written, share=share), excess=excess)


def _between(
    raw: LatencyTable, ends: tuple[ChannelMask, ChannelMask], written: Float64Array, *, share: float
) -> LatencyTable:
    """Return the table that is right for the dense and the smallest network.

    Of the time between the two the bytes ``[N]`` take ``share``, the layers the rest.
    """
    dense, least = (mask.keep for mask in ends)
    gain, num_bytes = raw.dense.least - raw.smallest.least, float(written[dense & ~least].sum())
    gain = max(gain, 0.0)
    layers = raw.milliseconds(dense) - raw.milliseconds(least)
    share = share if num_bytes > 0 else 0.0
    table = replace(
        raw,
        scale=(1.0 - share) * gain / layers if layers > 0 else 0.0,
        rates=share * gain / max(num_bytes, 1.0) * written,
    )
    return replace(table, offset=raw.smallest.least - table.milliseconds(least))


def _uneven_masks(graph: StructureGraph, limits: Budget) -> list[ChannelMask]:
    """Return masks that a structure with a prediction puts at limits, the first of even widths."""
    even = rank_in_group(graph, np.zeros(graph.num_units))
    draws = UNEVENNESS * np.random.default_rng(0).normal(size=(NUM_UNEVEN, len(graph.groups)))
    draws[0] = 0.0
    scores = (even + draws[:, graph.group_of]).astype(np.float32)
    return [graph.project(row, limits) for row in scores]


def smallest_mask(
    graph: StructureGraph, budget: Budget, scores: FloatArray | None = None
) -> ChannelMask:
    """Return the mask in which each group keeps its minimum, the units with the best scores."""
    if scores is None:
        scores = np.zeros(graph.num_units, dtype=np.float32)
    keep, _ = minimum(graph, scores, budget)
    return graph.mask(keep)


@dataclass(frozen=True, eq=False, kw_only=True)
class _LayerCall:
    """One call of a layer that can be timed alone.

    Attributes:
        op: the layer in the structure.
        layer: the layer itself.
        inputs: a tensor without data, of the shape and layout that it was called on.
    """

    op: OpNode
    layer: nn.Module
    inputs: Tensor

    @property
    def axes(self) -> tuple[IntArray, IntArray]:
        """Units on the output axis and on the input axis."""
        return self.op.out_units, self.op.in_units

    def milliseconds(self, outs: int, ins: int, cache: dict[Any, float]) -> float:
        """Time the layer with ``outs`` output and ``ins`` input positions (a group of groups)."""
        layer, source = self._slice(outs, ins)
        key = (repr(layer), tuple(layer.weight.shape), tuple(source.shape), source.stride())
        if key not in cache:
            cache[key] = measure_latency(
                layer, source, num_warm_up=2, max_seconds=SECONDS_PER_WIDTH
            ).least
        return cache[key]

    def above(self, graph: StructureGraph, outs: int, ins: int) -> tuple[int, int]:
        """Return the widths with one more free position each, if there is one."""
        more = []
        for width, units in zip((outs, ins), self.axes, strict=True):
            step = _step(units, self.op) if graph.free[units].any() else 0
            more.append(min(width + step, max(len(units), 1)))
        return more[0], more[1]

    def _slice(self, outs: int, ins: int) -> tuple[Any, Tensor]:
        """Return the layer and its input at given widths; the values do not matter."""
        layer: Any = self.layer
        weight, bias = layer.weight.detach(), layer.bias
        if isinstance(layer, nn.Linear):
            weight, source = weight[:outs, :ins], self.inputs[..., :ins]
        elif self.op.depthwise:
            weight, source = weight[:outs], self.inputs[:, :outs]
        elif layer.transposed:
            weight, source = weight[:ins, :outs], self.inputs[:, :ins]
        else:
            weight, source = weight[:outs, :ins], self.inputs[:, : ins * self.op.groups]
        memo: dict[int, Any] = {id(layer.weight): nn.Parameter(weight.clone())}
        if bias is not None:
            memo[id(bias)] = nn.Parameter(bias.detach()[:outs].clone())
        slim = copy.deepcopy(layer, memo)
        if self.op.depthwise:
            slim.groups = outs
        return slim, torch.empty_like(source.clone(), device=weight.device).fill_(1.0)


def _layer_calls(
    model: nn.Module, graph: StructureGraph, example_inputs: ExampleInputs
) -> list[_LayerCall]:
    """Run the forward once and return the calls of layers that hold a unit that may go."""
    inputs: dict[str, list[Tensor]] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def noted(_module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs.setdefault(name, []).append(tensors_in((args, kwargs))[0].to("meta"))

        return noted

    layers = {name: item for name, item in model.named_modules() if type(item) in LAYERS}
    handles = [
        item.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, item in layers.items()
    ]
    try:
        with evaluation_mode(model):
            call_forward(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    calls = []
    for op in graph.ops:
        name = op.name.partition("#")[0]
        free = any(graph.free[axis].any() for axis in (op.out_units, op.in_units))
        if free and inputs.get(name):
            calls.append(_LayerCall(op=op, layer=layers[name], inputs=inputs[name].pop(0)))
    return calls


def _grid(graph: StructureGraph, units: IntArray, op: OpNode) -> Float64Array:
    """Return ``[K]`` the widths of an axis at which a layer is timed."""
    size = max(len(units), 1)
    if not graph.free[units].any():
        return np.full(len(STRENGTHS), float(size))
    step = _step(units, op)
    widths = np.ceil(np.array(STRENGTHS) * size / step) * step
    return np.asarray(np.clip(widths, step, size))


def _step(units: IntArray, op: OpNode) -> int:
    """Return how many positions of an axis come and go together: one in each group."""
    return op.groups if units is op.out_units and not op.depthwise else 1
