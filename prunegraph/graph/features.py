"""What the policy sees of each prunable unit and each operation: a named, documented schema.

Features do not depend on how much may remain, which joins the policy later as context. The
exceptions are ``start``, which is chosen for a budget, and *what* is limited: ``prior`` divides by
the parameters that a unit frees where a budget limits parameters alone, and by its MACs otherwise.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from prunegraph.core.budget import Budget
from prunegraph.core.masks import BoolArray, Float64Array, FloatArray, IntArray
from prunegraph.graph.graph import StructureGraph

FEATURE_BOUND = 5.0
"""Features are clipped to plus and minus this."""

LOG_FLOOR = 1e-6
"""Logarithms add this share of the mean, so that a dead channel is low but does not dwarf all."""

LOG_STATISTICS = ("taylor", "l1", "l2", "bn_scale", "fpgm", "lamp", "activation_mean")
"""Statistics that enter as logarithms: they are positive and span orders of magnitude."""

RANKED_STATISTICS = ("l1", "taylor")
"""Statistics whose rank within the group is a feature."""

GROUP_STATISTICS = ("taylor", "l1", "bn_scale", "activation_mean", "prior")
"""Columns whose mean over the group is a feature."""

FEATURE_DOCS: dict[str, str] = {
    "start": "what the policy starts from (see ``pruners.start``); ``prior`` where none is given",
    "prior": "log(Taylor per MAC freed)",
    "taylor": "log of the first-order Taylor importance",
    "l1": "log of the L1 norm of the producing filters",
    "l2": "log of their L2 norm",
    "bn_scale": "log of the mean |scale| of the norms over the unit",
    "fpgm": "log of the distance to the other filters of the group",
    "lamp": "log of the layer-adaptive magnitude score",
    "activation_mean": "log of the mean |activation| that consumers read",
    "apoz": "share of zeros in that activation",
    "twin_similarity": "highest |cosine| of the producing filter with another one of the group",
    "twin_rank": "1 = the larger of that pair, -1 = the smaller; not standardised",
    "macs_freed": "log of the MACs that removing the unit alone frees",
    "params_freed": "log of the parameters that removing the unit alone frees",
    "group_macs_share": "MACs on the group's axes over all MACs; not standardised",
    "group_params_share": "parameters on the group's axes over all; not standardised",
    "group_size": "log of the number of units of the group",
    "depth": "position of the first producing op, -1 = first, 1 = last; not standardised",
    "kernel_size": "mean log of the kernel taps of the ops that touch the unit",
    "stride": "mean log of their strides",
    "spatial": "mean log of their output positions",
    "residual": "1 if several ops write the unit (a residual stream), -1 if one",
    "num_consumers": "log of the number of ops that read the unit",
    "rank_l1": "rank within the group by L1, -1 = lowest, 1 = highest; not standardised",
    "rank_taylor": "rank within the group by Taylor importance, likewise",
    "mean_taylor": "mean of column taylor over the group",
    "mean_l1": "mean of column l1 over the group",
    "mean_bn_scale": "mean of column bn_scale over the group",
    "mean_activation_mean": "mean of column activation_mean over the group",
    "mean_prior": "mean of column prior over the group",
    "free": "1 = may be removed, 0 = frozen; all other columns of a frozen unit are 0",
}
"""Every channel feature with its meaning; standardised over the free units unless said."""

FEATURE_NAMES: tuple[str, ...] = tuple(FEATURE_DOCS)

CONTEXT_NAMES = ("keep_macs", "keep_params", "cost_so_far", "step_share")
"""What a policy reads beside its network: the shares that may remain (1 = no limit); the share of
the dense cost that remains with the decisions made so far; the share of the steps made."""

OP_FEATURE_DOCS: dict[str, str] = {
    "macs_share": "log of the op's share of all MACs; standardised over the ops",
    "in_width": "log of the width that it reads; standardised",
    "out_width": "log of the width that it writes; standardised",
    "spatial": "log of its output positions; standardised",
    "kernel_size": "log of the kernel taps",
    "stride": "log of the stride",
    "groups": "log of the groups of a grouped convolution (0 for a depthwise one)",
    "depth": "position in the order of execution, -1 = first, 1 = last",
    "is_conv": "1 for a convolution",
    "is_linear": "1 for a linear layer",
    "is_depthwise": "1 for a depthwise convolution",
}
"""Every op feature with its meaning."""

OP_FEATURE_NAMES: tuple[str, ...] = tuple(OP_FEATURE_DOCS)


def prior_scores(
    graph: StructureGraph, statistics: Mapping[str, FloatArray], budget: Budget | None = None
) -> FloatArray:
    """Return the standardised log of Taylor importance per unit of cost.

    Args:
        graph: the structure.
        statistics: measured arrays ``[N]``; ``"taylor"`` is used.
        budget: decides the unit of cost: parameters if it limits parameters alone, else MACs.

    Returns:
        ``[N]``, mean 0 and deviation 1 over the free units, clipped to [-5, 5]; frozen 0.
    """
    per_cost = _log(graph, statistics["taylor"]) - _log(graph, unit_cost(graph, budget))
    return standardised(graph, per_cost)


def unit_cost(graph: StructureGraph, budget: Budget | None = None) -> Float64Array:
    """Return ``[N]`` what each unit alone frees, in the unit that ``budget`` limits (above 0)."""
    macs, params = graph.class_costs()
    only_params = budget is not None and budget.keep_macs is None and budget.keep_params is not None
    return np.maximum(params if only_params or not macs.any() else macs, 1.0)


def in_stream(graph: StructureGraph) -> BoolArray:
    """Return ``[N]`` True where a unit belongs to a residual stream: several ops add to it."""
    return (num_producers(graph) > 1) & graph.summed


def num_producers(graph: StructureGraph) -> IntArray:
    """Return ``[N]`` how many ops write each unit.

    A depthwise convolution passes its channels on and does not count, a layer that is called twice
    counts once.
    """
    written = {
        op.param or number: np.unique(op.out_units)
        for number, op in enumerate(graph.ops)
        if not op.depthwise
    }
    return _counts(graph, [*written.values()])


def rank_in_group(graph: StructureGraph, values: FloatArray | Float64Array) -> Float64Array:
    """Return ``[N]`` ranks within each group in (0, 1), see ``rank_within``."""
    return rank_within(graph.group_of, values)


def rank_within(parts: IntArray, values: FloatArray | Float64Array) -> Float64Array:
    """Return ranks within each part in (0, 1): ``(position + 0.5) / size``, ties by index.

    Of equal values the one with the lower index ranks higher, as in ``StructureGraph.project``.

    Args:
        parts: ``[N]`` number of each unit's part, from 0 up.
        values: ``[N]``, higher = higher rank.
    """
    num_units = len(parts)
    order = np.lexsort((-np.arange(num_units), values, parts))
    sizes = np.bincount(parts)
    first = np.cumsum(sizes) - sizes
    rank = np.empty(num_units)
    rank[order] = np.arange(num_units) - first[parts[order]]
    result: Float64Array = (rank + 0.5) / sizes[parts]
    return result


def group_mean(graph: StructureGraph, values: FloatArray | Float64Array) -> Float64Array:
    """Return ``[N]`` the mean of ``values`` over each unit's group."""
    sizes = np.bincount(graph.group_of, minlength=len(graph.groups))
    sums = np.bincount(graph.group_of, weights=values, minlength=len(graph.groups))
    result: Float64Array = (sums / np.maximum(sizes, 1))[graph.group_of]
    return result


def _group_sum(graph: StructureGraph, values: Float64Array) -> Float64Array:
    return group_mean(graph, values) * graph.group_sizes[graph.group_of]


def node_features(
    graph: StructureGraph,
    statistics: Mapping[str, FloatArray],
    budget: Budget | None = None,
    names: Sequence[str] = FEATURE_NAMES,
    start: FloatArray | None = None,
) -> FloatArray:
    """Return channel features.

    Args:
        graph: the structure.
        statistics: measured arrays ``[N]`` (see ``methods.criteria``).
        budget: used only to choose the unit of ``prior``.
        names: of the F features, in order, of ``FEATURE_NAMES``.
        start: ``[N]`` what the policy starts from; default: ``prior``.

    Returns:
        ``[N, F]`` float32 in [-5, 5]; equal inputs give equal features.
    """
    columns: dict[str, FloatArray | Float64Array] = {
        "prior": prior_scores(graph, statistics, budget)
    }
    columns["start"] = columns["prior"] if start is None else start
    for name in LOG_STATISTICS:
        columns[name] = _standardise(graph, _log(graph, statistics[name]))
    for name in ("apoz", "twin_similarity"):
        columns[name] = _standardise(graph, statistics[name])
    columns["twin_rank"] = 2.0 * statistics["twin_rank"] - 1.0
    columns |= _cost_columns(graph) | _position_columns(graph)
    for name in RANKED_STATISTICS:
        columns[f"rank_{name}"] = 2.0 * rank_in_group(graph, statistics[name]) - 1.0
    for name in GROUP_STATISTICS:
        columns[f"mean_{name}"] = group_mean(graph, columns[name])
    columns["free"] = np.ones(graph.num_units)
    return np.stack([_finish(graph, columns[name]) for name in names], axis=1)


def _cost_columns(graph: StructureGraph) -> dict[str, Float64Array]:
    macs, params = graph.class_costs()
    dense = graph.dense_cost
    return {
        "macs_freed": _standardise(graph, _log(graph, macs)),
        "params_freed": _standardise(graph, _log(graph, params)),
        "group_macs_share": _group_sum(graph, macs) / max(dense.macs, 1),
        "group_params_share": _group_sum(graph, params) / max(dense.params, 1),
        "group_size": _standardise(graph, np.log(graph.group_sizes[graph.group_of])),
    }


def _position_columns(graph: StructureGraph) -> dict[str, Float64Array]:
    """Return where the units stand: depth, kernels, strides, residual stream or inner."""
    consumers = _counts(graph, [np.unique(op.in_units) for op in graph.ops])
    depth = np.full(graph.num_units, np.inf)
    for op in reversed(graph.ops):
        depth[op.out_units] = op.depth
    depth[np.isinf(depth)] = 0.0
    last = max((op.depth for op in graph.ops), default=0)
    columns = {
        "depth": 2.0 * depth / max(last, 1) - 1.0,
        "residual": np.where(in_stream(graph), 1.0, -1.0),
        "num_consumers": _standardise(graph, np.log1p(consumers)),
    }
    for name in ("kernel_size", "stride", "spatial"):
        columns[name] = _standardise(graph, _mean_log_over_ops(graph, name))
    return columns


def _mean_log_over_ops(graph: StructureGraph, attribute: str) -> Float64Array:
    """Return ``[N]`` the mean log of an op's attribute over the ops that touch each unit."""
    total = np.zeros(graph.num_units)
    count = np.zeros(graph.num_units)
    for op in graph.ops:
        touched = np.unique(np.concatenate([op.in_units, op.out_units]))
        total[touched] += np.log(max(getattr(op, attribute), 1))
        count[touched] += 1
    result: Float64Array = total / np.maximum(count, 1)
    return result


def _counts(graph: StructureGraph, units_of_op: list[IntArray]) -> IntArray:
    joined = np.concatenate([*units_of_op, np.zeros(0, dtype=np.int64)])
    return np.bincount(joined, minlength=graph.num_units)


def _log(graph: StructureGraph, values: FloatArray | Float64Array) -> Float64Array:
    """Return the logarithm of values from 0 up, with a floor far below the mean."""
    positive = values[graph.free]
    floor = LOG_FLOOR * float(positive.mean(dtype=np.float64)) if positive.size else 0.0
    result: Float64Array = np.log(values.astype(np.float64) + max(floor, 1e-30))
    return result


def _standardise(graph: StructureGraph, values: FloatArray | Float64Array) -> Float64Array:
    """Return values with mean 0 and deviation 1 over the free units; 0 where all are equal."""
    free = values[graph.free].astype(np.float64)
    if not free.size:
        return np.zeros(graph.num_units)
    deviation = float(free.std())
    centred: Float64Array = values.astype(np.float64) - float(free.mean())
    if deviation <= 1e-7 * max(float(np.abs(free).max()), 1e-30):  # equal but for rounding
        return np.zeros(graph.num_units)
    return centred / deviation


def standardised(graph: StructureGraph, values: FloatArray | Float64Array) -> FloatArray:
    """Return ``[N]`` mean 0 and deviation 1 over the free units, clipped to [-5, 5]; frozen 0."""
    return _finish(graph, _standardise(graph, values))


def _finish(graph: StructureGraph, values: FloatArray | Float64Array) -> FloatArray:
    """Clip, silence frozen units and return float32."""
    clipped = np.clip(values, -FEATURE_BOUND, FEATURE_BOUND)
    finished: FloatArray = np.where(graph.free, clipped, 0.0).astype(np.float32)
    return finished


def op_features(graph: StructureGraph) -> FloatArray:
    """Return the op features in the order of ``OP_FEATURE_NAMES``.

    Returns:
        ``[M, F_op]`` float32 in [-5, 5].
    """
    num_ops = len(graph.ops)
    if not num_ops:
        return np.zeros((0, len(OP_FEATURE_NAMES)), dtype=np.float32)
    widths = np.array([(max(op.in_units.size, 1), op.out_units.size) for op in graph.ops])
    macs = np.array([op.macs_coefficient for op in graph.ops]) * widths.prod(axis=1)
    depth = np.array([op.depth for op in graph.ops], dtype=np.float64)
    columns = {
        "macs_share": _standardise_ops(np.log(np.maximum(macs, 1.0))),
        "in_width": _standardise_ops(np.log(widths[:, 0])),
        "out_width": _standardise_ops(np.log(np.maximum(widths[:, 1], 1))),
        "spatial": _standardise_ops(np.log([max(op.spatial, 1) for op in graph.ops])),
        "kernel_size": np.log([max(op.kernel_size, 1) for op in graph.ops]),
        "stride": np.log([max(op.stride, 1) for op in graph.ops]),
        "groups": np.log([1 if op.depthwise else max(op.groups, 1) for op in graph.ops]),
        "depth": 2.0 * depth / max(depth.max(), 1.0) - 1.0,
        "is_conv": np.array([op.kind == "conv" for op in graph.ops]),
        "is_linear": np.array([op.kind == "linear" for op in graph.ops]),
        "is_depthwise": np.array([op.depthwise for op in graph.ops]),
    }
    stacked = np.stack([columns[name] for name in OP_FEATURE_NAMES], axis=1)
    clipped: FloatArray = np.clip(stacked, -FEATURE_BOUND, FEATURE_BOUND).astype(np.float32)
    return clipped


def _standardise_ops(values: Float64Array) -> Float64Array:
    deviation = float(values.std())
    centred: Float64Array = values - float(values.mean())
    return centred / deviation if deviation > 1e-9 else np.zeros_like(centred)
