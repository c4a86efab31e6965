"""Pruning in several steps, each of the network that the one before has left."""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.checks import check_at_least
from prunegraph.core.errors import BudgetError, ConfigError, ModelError
from prunegraph.core.masks import ChannelMask, IntArray
from prunegraph.core.task import Task
from prunegraph.graph import StructureGraph
from prunegraph.graph.rounding import restrict
from prunegraph.training.loop import FinetuneConfig, finetune

Between = Callable[[nn.Module, int], object] | FinetuneConfig | None
"""What happens between two steps: a function of the network and the number of the step that made
it, from 1, which may train the network in place; or the built-in fine-tune."""

Schedule = Literal["cubic", "linear"]

PROGRESS: dict[str, Callable[[float], float]] = {
    "cubic": lambda time: 1.0 - (1.0 - time) ** 3,  # Zhu and Gupta 2017, arXiv 1710.01878, eq. 1
    "linear": lambda time: time,
}
"""From the share of the steps to the share of what goes in the end; both in [0, 1]."""


def budgets_of(
    graph: StructureGraph, budget: Budget, steps: int, schedule: Schedule
) -> list[Budget]:
    """Return what may remain of the dense network after each step; the last is the budget itself.

    Raises:
        ConfigError: there is no such schedule, or no step.
        BudgetError: the budget is of a kind that one step alone meets.
    """
    if schedule not in PROGRESS:
        msg = f"unknown schedule {schedule!r}: give {' or '.join(PROGRESS)}"
        raise ConfigError(msg)
    check_at_least("steps", steps, 1)
    at_once = {"max_latency", "depth"} & budget.as_dict().keys()
    if steps > 1 and at_once:
        msg = f"a budget with {min(at_once)} is met in one step: leave steps out"
        raise BudgetError(msg)
    memory = graph.peak_memory(graph.dense_mask()) if budget.max_memory else 0

    def after(step: int) -> Budget:
        gone = PROGRESS[schedule](step / steps)
        limits = {"keep_macs": 1.0, "keep_params": 1.0, "max_memory": memory}
        asked: dict[str, Any] = budget.as_dict()
        for name in limits.keys() & asked.keys():
            left = limits[name] - gone * (limits[name] - asked[name])
            asked[name] = math.ceil(left) if name == "max_memory" else left
        return Budget(**asked)

    return [*(after(step) for step in range(1, steps)), budget]


def of_what_is_left(budget: Budget, dense: StructureGraph, left: StructureGraph) -> Budget:
    """Return a budget of the dense network as one of a network that was cut out of it."""
    asked: dict[str, Any] = budget.as_dict()
    wholes = {
        "keep_macs": (dense.dense_cost.macs, left.dense_cost.macs),
        "keep_params": (dense.dense_cost.params, left.dense_cost.params),
    }
    for name in wholes.keys() & asked.keys():
        whole, now = wholes[name]
        # costs are whole numbers: half a one more keeps the rounding of the quotient away
        asked[name] = min((math.floor(asked[name] * whole) + 0.5) / now, 1.0)
    return Budget(**asked)


def dense_units(dense: StructureGraph, mask: ChannelMask, left: StructureGraph) -> IntArray:
    """Return ``[N]`` which unit of the dense network each unit of a cut one is; -1 = none.

    Args:
        dense: the structure of the dense network.
        mask: what was kept of it.
        left: the structure of the network that was cut out.
    """
    found = np.full(left.num_units, -1, dtype=np.int64)
    for name, axes in left.param_units.items():
        for axis, units in axes.items():
            own = dense.param_units.get(name, {}).get(axis)
            kept = np.empty(0) if own is None else own[mask.keep[own]]
            if len(kept) == len(units):
                found[units] = kept
    return found


def narrow_alike(dense: StructureGraph, left: StructureGraph, units: IntArray) -> StructureGraph:
    """Return a cut network's structure, in which stays what has to stay in the dense one."""
    whole: dict[int, str] = {}
    least: dict[int, int] = {}
    widths: dict[int, tuple[int, ...]] = {}
    for number, group in enumerate(left.groups):
        own = units[group.units]
        if not (own >= 0).all() or len(np.unique(own)) < len(own):  # a part of a dense unit
            whole[number] = group.frozen or "it cannot be followed into the dense network"
            continue
        origin = int(dense.group_of[own[0]])
        first = dense.groups[origin]
        if origin in dense.widths:
            widths[number] = tuple(width for width in dense.widths[origin] if width <= len(own))
        least[number] = max(group.min_keep, min(first.min_keep, len(own)))
        if group.frozen is None and first.frozen is not None:
            whole[number] = first.frozen
    return restrict(left, whole, widths, least)


def joined(
    dense: StructureGraph, before: ChannelMask, units: IntArray, after: ChannelMask
) -> ChannelMask:
    """Return what two steps have left of the dense network.

    Args:
        dense: the structure of the dense network.
        before: what the first step has left of it.
        units: see ``dense_units``.
        after: what the second step has left of the cut network.
    """
    keep = before.keep.copy()
    keep[units[~after.keep]] = False
    return dense.mask(keep)


def train_between(between: Between, model: nn.Module, task: Task, step: int, seed: int) -> None:
    """Do what a user asks for between two steps; the network is in eval mode afterwards.

    Args:
        between: see ``Between``.
        model: the network that the step has left; it is changed in place.
        task: of the dense network, which is the teacher if the fine-tune has one.
        step: number of the step, from 1.
        seed: of a fine-tune.
    """
    if isinstance(between, FinetuneConfig):
        teacher = task.model if between.distill_weight else None
        finetune(model, task, between, seed=seed + step, teacher=teacher)
    elif between is not None:
        between(model, step)
    model.eval()


def check_joined(dense: StructureGraph, mask: ChannelMask, model: nn.Module) -> None:
    """Raise ModelError if the network of all steps is not what their joined mask leaves."""
    found, told = sum(item.numel() for item in model.parameters()), dense.cost(mask).params
    if found != told:
        msg = f"the steps left {found:,} parameters, their mask {told:,}: prune in one step"
        raise ModelError(msg)
