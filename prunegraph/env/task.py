"""What an episode is played on: a network, how its masks are scored, and a budget."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError, ConfigError
from prunegraph.core.masks import BoolArray, FloatArray
from prunegraph.evaluation.pool import MaskEvaluator
from prunegraph.graph import StructureGraph
from prunegraph.graph.features import FEATURE_BOUND


@dataclass(frozen=True, eq=False, kw_only=True)
class PruningTask:
    """One network to prune.

    Attributes:
        name: names it in ledgers and reports; unique among an environment's tasks.
        graph: its structure.
        node_features: ``[N, F]`` channel features, or a function that makes them for a budget.
        evaluator: scores its masks.
        budget: what may remain, unless the environment draws budgets from a grid.
    """

    name: str
    graph: StructureGraph
    node_features: FloatArray | Callable[[Budget], FloatArray]
    evaluator: MaskEvaluator
    budget: Budget


@dataclass(frozen=True, eq=False, kw_only=True)
class Pair:
    """A (network, budget) pair, with what its episodes share.

    Attributes:
        name: names it in ledgers.
        graph_id: the task's position.
        task: the network.
        budget: what may remain.
        features: ``[N, F]`` in [-5, 5].
        at_stake: ``[N]`` the free units that cost something of what is limited: the policy
            decides on these, the others stay.
        steps: groups with free units, in topological order.
    """

    name: str
    graph_id: int
    task: PruningTask
    budget: Budget
    features: FloatArray
    at_stake: BoolArray
    steps: tuple[int, ...]

    def remaining_share(self, keep: BoolArray) -> float:
        """Return the share of the dense MACs (of the params, if they alone count) in ``keep``."""
        cost, dense = self.task.graph.cost(keep), self.task.graph.dense_cost
        if self.budget.keep_macs is None and self.budget.keep_params is not None:
            return cost.params / dense.params
        return cost.macs / dense.macs


def pair_name(task_name: str, budget: Budget) -> str:
    """Return the name of a (network, budget) pair, as ``"resnet20@keep_macs=0.5"``."""
    return f"{task_name}@{str(budget).replace(', ', ',')}"


def check_at_stake(name: str, graph: StructureGraph, budget: Budget) -> BoolArray:
    """Return the units ``[N]`` that a policy is to decide on.

    Raises:
        BudgetError: there are none, since the whole network meets the budget.
    """
    at_stake = graph.at_stake(budget)
    if not at_stake.any():
        msg = f"{name}: nothing is to be pruned for {budget}, which the whole network meets"
        if budget.max_memory is not None:
            msg += f": it needs {graph.peak_memory(graph.dense_mask())} bytes; give fewer"
        raise BudgetError(msg)
    return at_stake


def make_pair(graph_id: int, task: PruningTask, budget: Budget) -> Pair:
    """Check a task at a budget and return the pair.

    Raises:
        BudgetError: the budget cannot be met.
        ConfigError: nothing can be pruned, or the features do not fit or are not finite.
    """
    graph = task.graph
    steps = tuple(graph.free_groups.tolist())
    if not steps:
        msg = f"{task.name} has nothing to prune: every prunable unit is frozen"
        raise ConfigError(msg)
    graph.project(np.zeros(graph.num_units, dtype=np.float32), budget)
    at_stake = check_at_stake(task.name, graph, budget)
    features = task.node_features
    array = np.asarray(features(budget) if callable(features) else features, dtype=np.float32)
    if array.ndim != 2 or len(array) != graph.num_units or not np.isfinite(array).all():
        msg = (
            f"node features of {task.name} have shape {array.shape}: they must be finite, one row "
            f"for each of its {graph.num_units} prunable units"
        )
        raise ConfigError(msg)
    clipped = np.clip(array, -FEATURE_BOUND, FEATURE_BOUND)
    return Pair(
        name=pair_name(task.name, budget),
        graph_id=graph_id,
        task=task,
        budget=budget,
        features=clipped,
        at_stake=at_stake,
        steps=steps,
    )
