import copy
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError, ModelError
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.graph import analyse
from prunegraph.methods.method import Problem
from prunegraph.methods.registry import make_method, torch_pruning
from prunegraph.methods.torch_pruning import TorchPruning, _Peer

MakeProblem = Callable[..., Problem]


def problem_of(make_problem: MakeProblem, model: nn.Module, budget: Budget) -> Problem:
    """Return the digits problem with another network."""
    example = torch.zeros(1, 1, 8, 8)
    graph = analyse(model, example)
    other = make_problem(budget=budget)
    task = replace(other.task, model=model, example_inputs=example)  # type: ignore[type-var]
    return replace(
        other, task=task, structure=graph, make_evaluator=lambda _: Evaluator(task, graph)
    )


def chain() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    for norm in (net[1], net[4]):
        nn.init.uniform_(norm.weight)
    return net.eval()


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("criterion", ["magnitude", "bn_scale", "taylor"])
def test_its_choice_is_what_its_own_surgery_leaves(
    criterion: str, scope: str, make_problem: MakeProblem
) -> None:
    tp = pytest.importorskip("torch_pruning")
    model = chain()
    problem = problem_of(make_problem, model, Budget(keep_macs=0.5))
    removed = _Peer(TorchPruning(criterion, scope), problem).removed(0.4)
    importance = {
        "magnitude": tp.importance.GroupMagnitudeImportance(p=2),
        "bn_scale": tp.importance.BNScaleImportance(),
        "taylor": tp.importance.GroupTaylorImportance(),
    }[criterion]
    own = copy.deepcopy(model)
    images, labels = next(problem.evaluator.calibration.sample(512, problem.seed).batches(512))
    nn.functional.cross_entropy(own(images), labels, reduction="sum").backward()
    tp.pruner.BasePruner(
        own,
        example_inputs=(torch.zeros(1, 1, 8, 8),),
        importance=importance,
        global_pruning=scope == "global",
        pruning_ratio=0.4,
        ignored_layers=[own[8]],
    ).step()
    assert 0 < own[0].out_channels < 12 or 0 < own[3].out_channels < 16
    for layer in (0, 3):
        kept = ~removed[problem.graph.param_units[f"{layer}.weight"][0]]
        assert int(kept.sum()) == own[layer].out_channels
    first = ~removed[problem.graph.param_units["0.weight"][0]]
    torch.testing.assert_close(own[0].weight, model[0].weight[torch.from_numpy(first)])


def test_the_mask_keeps_its_best_channels_at_exactly_the_budget(make_problem: MakeProblem) -> None:
    pytest.importorskip("torch_pruning")
    problem = problem_of(make_problem, chain(), Budget(keep_macs=0.5))
    result = TorchPruning("magnitude", "uniform").prune(problem)
    keep = result.mask.keep
    kept = [keep[g.units].mean() for g in problem.graph.groups if g.frozen is None]
    assert max(kept) - min(kept) < 0.15
    norms = problem.task.model[0].weight.detach().flatten(1).norm(dim=1).numpy()
    kept_first = keep[problem.graph.param_units["0.weight"][0]]
    assert norms[~kept_first].mean() < norms[kept_first].mean()
    assert result.networks == 0


def test_what_it_couples_otherwise_is_left_whole(make_problem: MakeProblem) -> None:
    pytest.importorskip("torch_pruning")
    problem = make_problem(budget=Budget(keep_macs=0.6))
    mask = TorchPruning("taylor", "global").prune(problem).mask
    widths = problem.graph.group_widths(mask)
    dense = problem.graph.group_widths(problem.graph.dense_mask())
    streams = [name for name in dense if not name.endswith("conv1") or name == "conv1"]
    assert len(streams) == 3
    assert all(widths[name] == dense[name] for name in streams)
    assert all(widths[name] < dense[name] for name in dense if name not in streams)
    # a budget that the rest cannot meet takes from them as well, last
    tight = make_problem(budget=Budget(keep_macs=0.03))
    widths = tight.graph.group_widths(TorchPruning("taylor", "global").prune(tight).mask)
    assert any(widths[name] < dense[name] for name in streams)


def test_without_the_package_there_is_one_clear_line(
    make_problem: MakeProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    message = r"^tp_magnitude/uniform runs Torch-Pruning, .*: pip install torch-pruning$"
    with pytest.raises(ConfigError, match=message):
        make_method("tp_magnitude/uniform").check(make_problem())


def test_a_network_that_it_cannot_handle_is_one_clear_line(
    make_problem: MakeProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    tp = pytest.importorskip("torch_pruning")

    def fail(*_: object, **__: object) -> None:
        text = "no rule\nfor this op"
        raise KeyError(text)

    monkeypatch.setattr(tp.pruner, "BasePruner", fail)
    message = r"^Torch-Pruning cannot handle this network \(KeyError: .*\): leave tp_taylor/global"
    with pytest.raises(ModelError, match=message):
        TorchPruning("taylor", "global").prune(make_problem())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown 'tp_l7/global'; there are magnitude"):
        TorchPruning("l7", "global")
    assert {"tp_taylor/global", "tp_bn_scale/uniform"} < set(torch_pruning())
