import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from prunegraph.core.masks import FloatArray
from prunegraph.env import ChannelPruningEnv, EnvConfig, PruningTask, pair_name
from prunegraph.env.task import make_pair

MakeTask = Callable[..., PruningTask]


def test_cell_names_hold_network_and_budget() -> None:
    assert pair_name("net", Budget(keep_macs=0.5)) == "net@keep_macs=0.5"
    both = Budget(keep_macs=0.5, keep_params=0.25)
    assert pair_name("net", both) == "net@keep_macs=0.5,keep_params=0.25"


def test_features_may_follow_the_budget(make_task: MakeTask) -> None:
    task = make_task()

    def features(budget: Budget) -> FloatArray:
        return np.full((task.graph.num_units, 2), 10.0 * (budget.keep_macs or 0), np.float32)

    task = dataclasses.replace(task, node_features=features)
    config = EnvConfig(budgets=(Budget(keep_macs=0.4), Budget(keep_macs=0.8)), episodes_per_pair=1)
    env = ChannelPruningEnv(task, config)
    seen = set()
    for _ in range(2):
        observation, info = env.reset()
        first = float(observation["node_features"][0])
        seen.add((info["budget"]["keep_macs"], first))
        env.step(np.ones(env.num_nodes, dtype=np.int8))
    assert seen == {(0.4, 4.0), (0.8, 5.0)}  # clipped to the space's bound


@pytest.mark.parametrize("fault", ["rows", "columns", "nan"])
def test_features_that_do_not_fit_are_refused(make_task: MakeTask, fault: str) -> None:
    task = make_task()
    array = np.zeros((task.graph.num_units, 3), dtype=np.float32)
    if fault == "rows":
        array = array[1:]
    elif fault == "columns":
        array = array.reshape(-1)
    else:
        array[0, 0] = np.nan
    with pytest.raises(ConfigError, match="node features of small"):
        ChannelPruningEnv(dataclasses.replace(task, node_features=array))


def test_networks_with_other_features_are_refused(make_task: MakeTask) -> None:
    large = make_task("large")
    other = np.zeros((large.graph.num_units, 2), dtype=np.float32)
    with pytest.raises(ConfigError, match="the same features"):
        ChannelPruningEnv((make_task(), dataclasses.replace(large, node_features=other)))


def test_a_network_without_free_classes_is_refused(make_task: MakeTask) -> None:
    task = make_task()
    graph = dataclasses.replace(task.graph, frozen=np.ones(task.graph.num_units, dtype=bool))
    with pytest.raises(ConfigError, match="nothing to prune"):
        make_pair(0, dataclasses.replace(task, graph=graph), task.budget)


def test_the_remaining_share_counts_what_is_limited(make_task: MakeTask) -> None:
    task = make_task()
    half = task.graph.frozen.copy()
    half[np.flatnonzero(task.graph.free)[::2]] = True
    cost, dense = task.graph.cost(half), task.graph.dense_cost
    by_macs = make_pair(0, task, Budget(keep_macs=0.9, keep_params=0.2))
    by_params = make_pair(0, task, Budget(keep_params=0.2))
    assert by_macs.remaining_share(half) == cost.macs / dense.macs
    assert by_params.remaining_share(half) == cost.params / dense.params
    ratios = [task.graph.cost_ratio(half, pair.budget) for pair in (by_params, by_macs)]
    assert ratios == pytest.approx([cost.params / dense.params / 0.2] * 2)
