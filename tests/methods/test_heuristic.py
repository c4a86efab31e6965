import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError, MaskError
from prunegraph.core.masks import ChannelMask
from prunegraph.graph import StructureGraph, analyse
from prunegraph.methods.allocation import ALLOCATIONS, allocate, isomorphic_parts
from prunegraph.methods.controls import WidthsControl
from prunegraph.methods.heuristic import Heuristic
from prunegraph.methods.method import Problem
from prunegraph.methods.registry import make_method, method_names
from prunegraph.models import build_model
from support.toy_env import toy_graph

MakeProblem = Callable[..., Problem]


def shares(graph: StructureGraph, mask: ChannelMask) -> dict[str, float]:
    widths = graph.group_widths(mask)
    return {
        group.name: widths[group.name] / len(group.units)
        for group in graph.groups
        if group.frozen is None
    }


def test_uniform_keeps_one_share_everywhere(make_problem: MakeProblem) -> None:
    problem = make_problem()
    mask = make_method("l1/uniform").prune(problem).mask
    values = list(shares(problem.graph, mask).values())
    assert max(values) - min(values) < 2 / 16  # one channel of the smallest group, and the filling


def test_skip_full_keeps_residual_streams_whole(make_problem: MakeProblem) -> None:
    problem = make_problem()
    kept = shares(problem.graph, make_method("l1/skip_full").prune(problem).mask)
    assert kept.pop("conv1") == 1.0
    assert max(kept.values()) - min(kept.values()) < 2 / 16
    assert max(kept.values()) < 0.8


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn_scale", "fpgm", "lamp", "taylor"])
def test_a_criterion_keeps_the_highest_of_each_group(
    criterion: str, make_problem: MakeProblem
) -> None:
    problem = make_problem()
    keep = make_method(f"{criterion}/uniform").prune(problem).mask.keep
    values = problem.statistics[criterion]
    for group in problem.graph.groups:
        if group.frozen is None:
            kept = values[group.units[keep[group.units]]]
            assert len(kept) < len(group.units)
            gone = values[group.units[~keep[group.units]]]
            assert kept.min() >= gone.max()


def test_apoz_keeps_what_is_rarely_zero(make_problem: MakeProblem) -> None:
    problem = make_problem()
    keep = make_method("apoz/global").prune(problem).mask.keep
    free = problem.graph.free
    apoz = problem.statistics["apoz"]
    assert apoz[keep & free].mean() < apoz[~keep].mean() - 0.1


def test_a_layers_own_scale_is_taken_out_where_groups_compete(make_problem: MakeProblem) -> None:
    problem = make_problem()
    one = problem.graph.group_of == problem.graph.group_of[problem.graph.free][0]
    scaled = {
        **problem.statistics,
        "l2": np.where(one, 1e-3, 1.0) * problem.statistics["l2"],
        "taylor": np.where(one, 1e-3, 1.0) * problem.statistics["taylor"],
    }
    other = dataclasses.replace(problem, statistics=scaled)
    for name, same in (("l2/global", True), ("l2/per_mac", True), ("taylor/global", False)):
        masks = [make_method(name).prune(each).mask for each in (problem, other)]
        assert (masks[0] == masks[1]) is same, name


def test_global_compares_across_groups_and_per_mac_divides_by_cost(
    make_problem: MakeProblem,
) -> None:
    problem = make_problem()
    graph = problem.graph
    masks = {
        name: make_method(f"taylor/{name}").prune(problem).mask for name in ("global", "per_mac")
    }
    scores = problem.statistics["taylor"]
    assert masks["global"] == graph.project(scores, problem.budget)
    cost = np.maximum(graph.class_costs()[0], 1.0)
    assert masks["per_mac"] == graph.project((scores / cost).astype(np.float32), problem.budget)
    assert masks["global"] != masks["per_mac"]


def test_random_depends_on_the_seed(make_problem: MakeProblem) -> None:
    masks = {
        make_method("random/global").prune(make_problem(seed=seed)).mask.digest()
        for seed in range(4)
    }
    assert len(masks) == 4


def test_sensitivity_protects_the_group_that_hurts(make_problem: MakeProblem) -> None:
    problem = make_problem()
    result = make_method("l1/sensitivity").prune(problem)
    assert result.networks == problem.evaluator.num_networks == 7
    kept = shares(problem.graph, result.mask)
    evaluator, graph = problem.evaluator, problem.graph
    gain = {}
    for group in graph.groups:
        if group.frozen is None:
            keep = np.ones(graph.num_units, dtype=bool)
            order = np.argsort(problem.statistics["l1"][group.units])
            keep[group.units[order[: len(order) // 2]]] = False
            gain[group.name] = evaluator.evaluate(graph.mask(keep)).loss
    most, least = max(gain, key=gain.__getitem__), min(gain, key=gain.__getitem__)
    assert kept[most] > kept[least]


@pytest.mark.parametrize("name", ["l1/global", "taylor/global", "l2/uniform", "l1/sensitivity"])
def test_importances_of_ones_own_get_any_allocation(make_problem: MakeProblem, name: str) -> None:
    problem = make_problem()
    criterion, allocation = name.split("/")
    values = problem.statistics[criterion].copy()
    own = allocate(problem, values, allocation, of_the_layer=criterion != "taylor")
    known = Heuristic(criterion, allocation).prune(make_problem())
    assert (own.mask, own.networks) == (known.mask, known.networks)
    assert (own.networks > 0) == (allocation == "sensitivity")
    with pytest.raises(ConfigError, match="unknown allocation 'none'; there are uniform"):
        allocate(problem, values, "none")
    with pytest.raises(MaskError, match="do not fit: this graph has"):
        allocate(problem, values[1:], allocation)
    values[problem.graph.free] = np.nan
    with pytest.raises(MaskError, match="scores hold NaN"):
        allocate(problem, values, allocation)


def test_too_few_networks_for_sensitivity_are_refused(make_problem: MakeProblem) -> None:
    problem = make_problem(max_networks=6)
    with pytest.raises(ConfigError, match="which runs 7 on"):
        make_method("l1/sensitivity").prune(problem)
    assert problem.evaluator.num_networks == 0


def test_given_widths_are_kept_exactly_by_the_criterion(make_problem: MakeProblem) -> None:
    problem = make_problem()
    other = make_method("taylor/per_mac").prune(problem).mask
    widths = problem.graph.group_widths(other)
    mask = WidthsControl("l1", widths).prune(problem).mask
    assert problem.graph.group_widths(mask) == widths
    assert problem.graph.cost(mask) == problem.graph.cost(other)
    assert mask != other
    l1, keep = problem.statistics["l1"], mask.keep
    for group in problem.graph.groups:
        kept, gone = (l1[group.units[bits]] for bits in (keep[group.units], ~keep[group.units]))
        assert gone.size == 0 or kept.min() >= gone.max()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"nowhere": 3}, "'nowhere' is missing or unknown"), ({"conv1": 99}, "16 units, not 99")],
)
def test_widths_of_another_network_are_refused(
    change: dict[str, int], message: str, make_problem: MakeProblem
) -> None:
    problem = make_problem()
    widths = problem.graph.group_widths(problem.graph.dense_mask()) | change
    with pytest.raises(MaskError, match=message):
        WidthsControl("l1", widths).prune(problem)


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'nothing'.*l1/uniform.*cem"):
        make_method("nothing")
    with pytest.raises(ConfigError, match=r"unknown criterion 'l7'.*bn_scale"):
        Heuristic("l7", "uniform")
    with pytest.raises(ConfigError, match=r"unknown criterion 'l7'.*bn_scale"):
        WidthsControl("l7", {})
    with pytest.raises(ConfigError, match=r"unknown allocation 'evenly'.*skip_full"):
        Heuristic("l1", "evenly")
    assert {"random/uniform", "lamp/global", "apoz/skip_full", "random_search"} < set(
        method_names()
    )


def test_budgets_on_both_resources_are_met(make_problem: MakeProblem) -> None:
    problem = make_problem(budget=Budget(keep_macs=0.5, keep_params=0.2))
    cost = problem.graph.cost(make_method("l2/global").prune(problem).mask)
    dense = problem.graph.dense_cost
    assert cost.macs <= 0.5 * dense.macs
    assert 0.18 * dense.params < cost.params <= 0.2 * dense.params


def test_isomorphic_puts_groups_of_one_structure_together(make_problem: MakeProblem) -> None:
    model = build_model("digits_resnet14_w4", num_classes=10, image_shape=(1, 8, 8))
    graph = analyse(model, torch.zeros(1, 1, 8, 8))
    parts = isomorphic_parts(graph)
    of_group = {group.name: set(parts[group.units].tolist()) for group in graph.groups}
    assert all(len(numbers) == 1 for numbers in of_group.values())
    together: dict[int, list[str]] = {}
    for name, numbers in of_group.items():
        together.setdefault(min(numbers), []).append(name)
    alike = sorted(names for names in together.values() if len(names) > 1)
    # sizes and strides do not count: the inner channels of all blocks compete
    assert alike == [[f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1)]]


def test_isomorphic_compares_within_a_kind_and_keeps_one_share_of_each() -> None:
    graph = toy_graph([8, 8], [4, 4, 4])
    inner = [group for group in graph.groups if group.frozen is None]
    parts = isomorphic_parts(graph)
    assert len(set(parts[np.concatenate([group.units for group in inner])].tolist())) == 1
    assert len(set(parts.tolist())) == 3  # the two ends, and what is between them
    values = np.zeros(graph.num_units)
    values[inner[0].units] = 10.0 + np.arange(8)
    values[inner[1].units] = np.arange(8)
    scores = ALLOCATIONS["isomorphic"].scores(SimpleNamespace(graph=graph), values)
    assert scores[inner[0].units].min() > scores[inner[1].units].max()  # global within
    both = np.concatenate([group.units for group in inner])
    np.testing.assert_allclose(np.sort(scores[both]), (np.arange(16) + 0.5) / 16)
