"""One network of the benchmark ``structure.py``: both sides, stage by stage.

Each finished stage appends a JSON line to a file, so that a crash loses only the stage it is in.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from structure_cases import build, lists
from structure_peer import (
    build_graph,
    covered_modules,
    covered_params,
    make_pruner,
    peer_form,
    restore_values,
    set_sizes,
    write_positions,
)
from structure_table import NUM_MASKS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError
from prunegraph.core.masks import ChannelMask
from prunegraph.graph import StructureGraph, analyse, evaluation_mode
from prunegraph.graph.apply import apply_mask
from prunegraph.graph.build import MODEL_OUTPUT
from prunegraph.testing import assert_masked_equals_pruned, count_cost, largest_difference

KEEP_MACS = 0.5
FLOAT64 = (torch.float64, 1e-5)
FLOAT32 = (torch.float32, 1e-3)
SMALL = 100_000_000  # parameters up to which networks are compared in float64
REPEAT_WITHIN = 3.0  # seconds within which a timing is repeated, to take the least
REPEATS = 3
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)


class Stages:
    """Runs stages and writes what each one found.

    Args:
        path: file to which lines are appended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def _write(self, **line: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Write what the body puts into the dictionary; an exception ends the stage alone."""
        self._write(stage=name)
        found: dict[str, Any] = {}
        try:
            yield found
        except Exception as error:  # whatever a network or a peer raises is a result
            message = " ".join(f"{type(error).__name__}: {error}".split())
            self._write(stage=name, found=found, error=message[:300])
        else:
            self._write(stage=name, found=found)


class UsedParameters(TorchDispatchMode):
    """Notes the storage of every tensor that enters an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the tensors and run the operation."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.storages.add(leaf.untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


def layer_weights(model: nn.Module, example: Tensor) -> list[str]:
    """Return the names of convolution, linear and attention weights that the forward uses."""
    used = UsedParameters()
    with evaluation_mode(model), used:
        model(example)
    layers = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, LAYERS)
        for parameter in module.parameters(recurse=False)
    }
    return [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in layers
        and parameter.dim() >= 2
        and parameter.untyped_storage().data_ptr() in used.storages
    ]


def least_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the least wall time of a few calls, and the last result."""
    times: list[float] = []
    while not times or (len(times) < REPEATS and sum(times) < REPEAT_WITHIN):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def precision(model: nn.Module) -> tuple[torch.dtype, float]:
    """Return the type in which a network is compared, and the tolerance."""
    small = sum(parameter.numel() for parameter in model.parameters()) <= SMALL
    return FLOAT64 if small else FLOAT32


def draw_mask(graph: StructureGraph, seed: int) -> ChannelMask:
    """Return a mask of half of the MACs with uneven widths; if that is too little, random bits."""
    rng = np.random.default_rng(seed)
    shift = rng.normal(scale=0.5, size=len(graph.groups))
    scores = rng.normal(size=graph.num_units) + shift[graph.group_of]
    try:
        return graph.project(scores.astype(np.float32), Budget(keep_macs=KEEP_MACS))
    except BudgetError:
        return graph.repair(scores > 0, Budget(keep_macs=1.0), rng)[0]


def output_layers(model: nn.Module, graph: StructureGraph | None) -> list[nn.Module]:
    """Return the layers whose outputs are the network's."""
    if graph is None:
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        return layers[-1:]
    members = [m for g in graph.groups if g.frozen == MODEL_OUTPUT for m in g.members]
    modules = dict(model.named_modules())
    found = []
    for member in members:
        path, _, axis = member.rpartition(":")
        module = modules.get(path.removesuffix(".weight"))
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        if isinstance(module, LAYERS) and int(axis) == int(transposed):
            found.append(module)
    return found


def measure_ours(stages: Stages, model: nn.Module, example: Tensor, names: list[str]) -> Any:
    """Run prunegraph's stages and return its graph, or None."""
    graph: StructureGraph | None = None
    with stages.stage("ours.analyse") as found:
        seconds, graph = least_seconds(lambda: analyse(model, example))
        found["analyse_seconds"] = seconds
        unproven, _ = least_seconds(lambda: analyse(model, example, trial=False))
        found["unproven_seconds"] = unproven
        found["prunable"], _ = graph.prunable_params(set(names))
        found["frozen"] = [f"{item.module}: {item.reason}" for item in graph.frozen_ops]
    if graph is None:
        return None
    mask = draw_mask(graph, 0)
    with stages.stage("ours.prune") as found:
        found["prune_seconds"], _ = least_seconds(lambda: _prune_half(model, graph))
        limit = KEEP_MACS * graph.dense_cost.macs
        found["kept_macs"] = graph.cost(mask).macs / graph.dense_cost.macs
        room = graph.cost_model.added_by_each(mask.keep)[0][~mask.keep]
        found["budget_met"] = bool(
            graph.cost(mask).macs <= limit and (graph.cost(mask).macs + room > limit).all()
        )
    dtype, tolerance = precision(model)
    with stages.stage("ours.compare") as found:
        found["equal_masks"], found["difference"] = 0, 0.0
        for seed in range(NUM_MASKS):
            difference = assert_masked_equals_pruned(
                model, graph, draw_mask(graph, seed), example, dtype=dtype, tolerance=tolerance
            )
            found["equal_masks"] += 1
            found["difference"] = max(found["difference"], difference)
    return graph


def _prune_half(model: nn.Module, graph: StructureGraph) -> nn.Module:
    return apply_mask(model, graph, draw_mask(graph, 0))


def measure_theirs(
    stages: Stages, model: nn.Module, example: Tensor, names: list[str], graph: Any
) -> None:
    """Run Torch-Pruning's stages."""
    dense = peer_form(model)
    ignored_paths = _paths(model, output_layers(model, graph))
    dependency = None
    with stages.stage("theirs.analyse") as found:
        seconds, dependency = least_seconds(lambda: build_graph(dense, example))
        found["analyse_seconds"] = seconds
    if dependency is None:
        return
    with stages.stage("theirs.groups") as found:
        ignored = [dense.get_submodule(path) for path in ignored_paths]
        start = time.perf_counter()
        covered = covered_modules(dependency, ignored)
        found["groups_seconds"] = time.perf_counter() - start
        found["prunable"] = covered_params(dense, covered, names)
    dtype, tolerance = precision(model)
    masked = pruned = None
    with stages.stage("theirs.prune") as found:
        candidate = peer_form(model)
        ignored = [candidate.get_submodule(path) for path in ignored_paths]
        pruner = make_pruner(candidate, example, ignored)
        write_positions(candidate)
        start = time.perf_counter()
        pruner.step()
        found["prune_seconds"] = time.perf_counter() - start
        set_sizes(candidate, pruner)
        masked = restore_values(candidate, dense)
        pruned = candidate
    if pruned is None:
        return
    runs = False
    with stages.stage("theirs.run") as found:
        found["kept_macs"] = count_cost(pruned, example).macs / count_cost(dense, example).macs
        found["runs"] = runs = True
    if not runs:
        return
    with stages.stage("theirs.compare") as found:
        if any(isinstance(module, nn.GroupNorm) for module in model.modules()):
            return  # it normalises over other groups of channels: zeros are no stand-in
        found["tolerance"] = tolerance
        found["difference"] = _difference(masked.to(dtype), pruned.to(dtype), example)


def _paths(model: nn.Module, modules: list[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if any(module is m for m in modules)]


def _difference(masked: nn.Module, pruned: nn.Module, example: Tensor) -> float:
    """Return the largest difference of outputs, relative to what the inputs change in them."""
    dtype = next(masked.parameters()).dtype
    inputs = example.to(dtype) if example.is_floating_point() else example
    expected, blank = (_outputs(masked, x) for x in (inputs, torch.zeros_like(inputs)))
    scale = max(float((a - b).abs().max()) for a, b in zip(expected, blank, strict=True))
    return largest_difference(expected, _outputs(pruned, inputs), scale=scale)


def _outputs(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    with evaluation_mode(model):
        return [x for x in tree_leaves(model(inputs)) if isinstance(x, Tensor)]


def measure(list_name: str, name: str, path: Path) -> None:
    """Measure one network and append what was found to a file, a JSON line a stage."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    stages = Stages(path)
    with stages.stage("model") as found:
        case = lists()[list_name][name]
        model, example = build(case), case.example()
        names = layer_weights(model, example)
        cost = count_cost(model, example)
        found["macs"], found["params"] = cost.macs, cost.params
        weights = dict(model.named_parameters())
        found["layer_params"] = sum(weights[each].numel() for each in names)
    if "layer_params" not in found:
        return
    graph = measure_ours(stages, model, example, names)
    measure_theirs(stages, model, example, names, graph)
