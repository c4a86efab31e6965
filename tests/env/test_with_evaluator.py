"""The environment on a real network, real images and the real evaluator."""

import dataclasses

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from prunegraph.core.budget import Budget
from prunegraph.core.masks import unpack_bits
from prunegraph.data import load_dataset
from prunegraph.env import ChannelPruningEnv, EnvConfig, PruningTask
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.graph import analyse
from prunegraph.models import build_model
from support.tasks import image_task


@pytest.fixture(scope="module")
def task() -> PruningTask:
    dataset = load_dataset("digits")
    torch.manual_seed(0)
    model = build_model(
        "digits_resnet8", num_classes=dataset.num_classes, image_shape=dataset.image_shape
    )
    graph = analyse(model.eval(), torch.zeros(1, *dataset.image_shape))
    return PruningTask(
        name="digits_resnet8",
        graph=graph,
        node_features=np.zeros((graph.num_units, 2), dtype=np.float32),
        evaluator=Evaluator(
            image_task(model, dataset.train, dataset.search),
            graph,
            num_calibration=64,
            metric="kl",
        ),
        budget=Budget(keep_macs=0.5),
    )


def test_checker_passes(task: PruningTask) -> None:
    config = EnvConfig(subset_size=40, metric="kl")
    env = ChannelPruningEnv(task, config)
    check_env(env, skip_render_check=True)
    assert env.networks_evaluated == task.evaluator.num_networks > 0


def test_outcome_is_that_of_the_pruned_network(task: PruningTask) -> None:
    env = ChannelPruningEnv(task, EnvConfig(subset_size=40))
    observation, _ = env.reset(seed=0)
    rng = np.random.default_rng(0)
    *_, info = env.step(rng.integers(0, 2, env.num_nodes))
    assert info["outcome"].num_images == 40
    assert info["outcome"].cost.macs <= 0.5 * task.graph.dense_cost.macs
    assert info["outcome"].cost.macs >= 0.45 * task.graph.dense_cost.macs
    assert env.observation_space.contains(observation)


def test_a_memory_is_met_and_the_rest_stays(task: PruningTask) -> None:
    graph = task.graph
    budget = Budget(max_memory=int(0.8 * graph.peak_memory(graph.dense_mask())))
    env = ChannelPruningEnv(dataclasses.replace(task, budget=budget), EnvConfig(subset_size=40))
    observation, _ = env.reset(seed=0)
    stake = observation["action_mask"][: graph.num_units] > 0.5
    assert np.array_equal(stake, graph.at_stake(budget))
    assert 0 < stake.sum() < graph.free.sum()
    *_, info = env.step(np.zeros(env.num_nodes))
    assert info["cost_ratio"] <= 1.0
    mask = graph.mask(unpack_bits(info["mask_bits"], graph.num_units))
    assert graph.fits(mask, budget)
    assert mask.keep[~stake].all()
    env.reset()
    *_, info = env.step(np.ones(env.num_nodes))
    assert info["raw_cost_ratio"] == pytest.approx(1.25, rel=0.01)
    assert 0.9 < info["cost_ratio"] <= 1.0


def test_an_equal_mask_costs_no_network(task: PruningTask) -> None:
    env = ChannelPruningEnv(task, EnvConfig(subset_size=40))
    env.reset(seed=5)
    info = env.step(np.ones(env.num_nodes))[4]
    before = env.networks_evaluated
    measured = env.measure(info["pair"], info["mask_bits"], info["block"])
    assert env.networks_evaluated == before
    assert measured.accuracy == info["outcome"].accuracy
    env.measure(info["pair"], info["mask_bits"], info["block"] + 1)
    assert env.networks_evaluated == before + 1
