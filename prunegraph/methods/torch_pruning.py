"""Torch-Pruning's own pruners, at exactly the budget of every other method.

Torch-Pruning decides; nothing of it is carried out. On a copy of the network its pruner names the
channels that it would remove, and they are translated into prunable units. Its ratio of channels,
which knows no MACs, is halved down to the least one that meets the budget. Between that and the
budget units come back by Torch-Pruning's own importance. So its row has the same surgery,
recalibration and fine-tune as every other one.

A layer is left whole where the two structures disagree: where Torch-Pruning couples channels that
are apart in the structure graph, its choice would be another network than it thinks. So it is with
the residual streams of ResNets with parameter-free shortcuts, whose gather it does not know. They
lose channels only if the budget cannot be met without.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from prunegraph.core.errors import ConfigError, ModelError, one_line
from prunegraph.core.masks import BoolArray, Float64Array, IntArray
from prunegraph.core.splits import TrainSplit
from prunegraph.core.task import Task
from prunegraph.graph import StructureGraph, copy_network, unwrap
from prunegraph.graph.features import rank_in_group, rank_within
from prunegraph.methods.method import ChannelMethod, Problem, Result
from prunegraph.tasks.batches import num_samples

TP_CRITERIA = ("magnitude", "taylor", "bn_scale")
"""Importances of Torch-Pruning that its examples use."""

TP_SCOPES = ("uniform", "global")
"""``global_pruning=False`` and ``True``."""

NUM_HALVINGS = 10
"""Trials of the channel ratio: to a thousandth."""

NUM_SAMPLES = 512
"""Train samples that gradients are taken on, as for this package's own Taylor importance."""


@dataclass(frozen=True)
class TorchPruning(ChannelMethod):
    """Torch-Pruning's ``BasePruner`` (Fang et al. 2023, CVPR, "DepGraph").

    Args:
        criterion: one of ``TP_CRITERIA``.
        scope: one of ``TP_SCOPES``.

    Raises:
        ConfigError: a name is unknown.
    """

    criterion: str
    scope: str

    def __post_init__(self) -> None:
        if self.criterion not in TP_CRITERIA or self.scope not in TP_SCOPES:
            msg = f"unknown {self.name!r}; there are {', '.join(TP_CRITERIA)} x {TP_SCOPES}"
            raise ConfigError(msg)

    @property
    def name(self) -> str:
        """``"tp_criterion/scope"``."""
        return f"tp_{self.criterion}/{self.scope}"

    @property
    def per_seed(self) -> bool:
        """Whether its importance reads images."""
        return self.criterion == "taylor"

    def check(self, problem: Problem) -> None:
        """Say before any work that the package is missing, or the budget is of another kind.

        Raises:
            ConfigError: Torch-Pruning is not installed, or single weights are asked for.
        """
        super().check(problem)
        _torch_pruning(self.name)

    def prune(self, problem: Problem) -> Result:
        """Choose a mask that meets the problem's budget; runs no network.

        Raises:
            ConfigError: Torch-Pruning is not installed.
            ModelError: it cannot handle the network.
        """
        self.check(problem)
        try:
            scores = self._scores(problem)
        except Exception as error:
            reason = one_line(error, 200)
            msg = f"Torch-Pruning cannot handle this network ({reason}): leave {self.name} out"
            raise ModelError(msg) from error
        return Result(mask=problem.project(scores.astype(np.float32)))

    def _scores(self, problem: Problem) -> Float64Array:
        """Return ``[N]`` scores: what it removes is below what it keeps, in its own order."""
        peer = _Peer(self, problem)
        removed, low, high = peer.seen, 0.0, 1.0
        for _ in range(NUM_HALVINGS):
            middle = (low + high) / 2
            trial = peer.removed(middle)
            if problem.graph.cost_ratio(~trial, problem.budget) <= 1.0:
                removed, high = trial, middle
            else:
                low = middle
        scores: Float64Array = peer.rank() + ~removed + ~peer.seen  # what it cannot see goes last
        return scores


class _Peer:
    """Torch-Pruning at work on a copy of the network.

    Args:
        method: what to run.
        problem: on which network.
    """

    def __init__(self, method: TorchPruning, problem: Problem) -> None:
        self._tp = _torch_pruning(method.name)
        self._method, self._problem, self._graph = method, problem, problem.graph

    @cached_property
    def _model(self) -> nn.Module:
        """A copy of the network, with gradients if the importance is made of them."""
        model = copy_network(unwrap(self._problem.task.model)).eval().requires_grad_(True)
        if self._method.criterion == "taylor":
            train = self._problem.evaluator.calibration.sample(NUM_SAMPLES, self._problem.seed)
            _add_gradients(model, self._problem.task, train)
        return model

    @cached_property
    def _names(self) -> dict[nn.Module, str]:
        return {module: name for name, module in self._model.named_modules()}

    @cached_property
    def _ignored(self) -> list[nn.Module]:
        """What it must leave whole: what is frozen, and what it couples otherwise."""
        frozen = _frozen_layers(self._model, self._graph)
        apart: list[nn.Module] = []
        for _, written in self._groups(self._base(0.5, frozen), frozen):
            if any(not np.array_equal(written[0][1], own) for _, own in written[1:]):
                apart += [module for module, _ in written]
        return frozen + apart

    @cached_property
    def importance(self) -> Float64Array:
        """``[N]`` mean of its importance over a unit's channels; NaN where it has none."""
        importance = np.full(self._graph.num_units, np.nan)
        base = self._base(0.5, self._ignored)
        for group, written in self._groups(base, self._ignored):
            values = base.estimate_importance(group)
            if values is not None:
                units = written[0][1]
                total = np.bincount(units, values.double().cpu().numpy(), len(importance))
                importance[units] = total[units] / np.bincount(units)[units]
        return importance

    @cached_property
    def seen(self) -> BoolArray:
        """``[N]`` units that it can remove."""
        seen: BoolArray = np.isfinite(self.importance) & self._graph.free
        return seen

    def removed(self, ratio: float) -> BoolArray:
        """Return ``[N]`` the units that its pruner removes at a ratio of channels."""
        gone = np.zeros(self._graph.num_units, dtype=np.int64)
        size = np.ones(self._graph.num_units, dtype=np.int64)
        for group in self._base(ratio, self._ignored).step(interactive=True):
            module, units = next(self._written(group), (None, None))
            whole = None if module is None else self._units_of(module)
            if units is not None and whole is not None:
                np.add.at(gone, units, 1)
                size[units] = np.bincount(whole, minlength=len(size))[units]
        removed: BoolArray = (gone >= size) & self.seen
        return removed

    def rank(self) -> Float64Array:
        """Return ``[N]`` ranks in (0, 1) by its importance, within the scope that it compares."""
        values = np.where(self.seen, self.importance, 0.0)
        if self._method.scope == "uniform":
            return rank_in_group(self._graph, values)
        return rank_within(np.zeros(self._graph.num_units, dtype=np.int64), values)

    def _base(self, ratio: float, ignored: list[nn.Module]) -> Any:
        """Return a pruner that has removed nothing yet."""
        tp, example = self._tp, self._problem.task.example_inputs
        importance = {
            "magnitude": partial(tp.importance.GroupMagnitudeImportance, p=2),
            "taylor": tp.importance.GroupTaylorImportance,
            "bn_scale": tp.importance.BNScaleImportance,
        }[self._method.criterion]()
        return tp.pruner.BasePruner(
            self._model,
            example_inputs=(example,) if isinstance(example, Tensor) else example,
            importance=importance,
            global_pruning=self._method.scope == "global",
            pruning_ratio=ratio,
            ignored_layers=ignored,
        )

    def _groups(
        self, base: Any, ignored: list[nn.Module]
    ) -> Iterator[tuple[Any, list[tuple[nn.Module, IntArray]]]]:
        """Yield its groups with the layers that they cut, and the units in its own order."""
        leaves = [module for layer in ignored for module in layer.modules()]
        for group in base.DG.get_all_groups(leaves, base.root_module_types):
            written = list(self._written(group))
            if written:
                yield group, written

    def _written(self, group: Any) -> Iterator[tuple[nn.Module, IntArray]]:
        """Yield the layers whose outputs a group cuts, and the units that it names there."""
        for dependency, positions in group:
            module = dependency.target.module
            whole = self._units_of(module)
            if whole is not None and dependency.handler.__name__ == "prune_out_channels":
                yield module, whole[np.asarray(positions, dtype=np.int64)]

    def _units_of(self, module: nn.Module) -> IntArray | None:
        """Return the unit at each output channel of a layer, or None if it is not known."""
        axes = self._graph.param_units.get(f"{self._names.get(module)}.weight", {})
        return axes.get(1 if getattr(module, "transposed", False) else 0)


def _frozen_layers(model: nn.Module, graph: StructureGraph) -> list[nn.Module]:
    """Return the layers that write what must stay."""
    names = [
        str(op.param).rpartition(".")[0]
        for op in graph.ops
        if op.param and op.out_units.size and graph.frozen[op.out_units].any()
    ]
    return [model.get_submodule(name) for name in dict.fromkeys(names)]


def _add_gradients(model: nn.Module, task: Task, train: TrainSplit) -> None:
    for batch in task.batches(train, 64):
        (task.loss(model, batch) * max(num_samples(batch), 1)).backward()


def _torch_pruning(name: str) -> ModuleType:
    """Return the package, which is not among this one's requirements.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("torch_pruning")
    except ModuleNotFoundError as error:
        msg = f"{name} runs Torch-Pruning, which is not installed: pip install torch-pruning"
        raise ConfigError(msg) from error
