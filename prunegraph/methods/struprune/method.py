"""StruPrune: neurons and heads leave a language model, one module at a time.

After *StruPrune: Structure-wise global pruning* (StructPrune): global pruning is split into one
problem a module, solved by ADMM with a structured mask in closed form, so that the memory is that
of one module; shares of modules follow a softmax of their importances. The abstract says no more.
Reconstruction of ours: the mask keeps the columns that the optimal brain surgeon would remove last,
the updates are SparseLLM's (``layerwise/admm.py``), both streams are followed, shares are chosen by
held-out calibration loss.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from prunegraph.core.checks import check_choice, check_fields, check_positive
from prunegraph.core.errors import ModelError
from prunegraph.core.files import write_json
from prunegraph.core.masks import ChannelMask, FloatArray
from prunegraph.core.precision import autocasting
from prunegraph.core.reading import checked, read_json
from prunegraph.core.splits import Batch
from prunegraph.graph import StructureGraph, evaluation_mode, unwrap
from prunegraph.graph.apply import apply_mask
from prunegraph.layerwise.block_files import BlockFiles
from prunegraph.layerwise.reconstruct import drawn_samples
from prunegraph.layerwise.room import TOKENS, most_samples, warn_of_few
from prunegraph.methods.method import ChannelMethod, Problem, Result, check_reach
from prunegraph.methods.struprune.modules import Module, find_modules, linear_layers
from prunegraph.methods.struprune.walk import Walk, Walked
from prunegraph.tasks.batches import joined, num_samples, num_tokens
from prunegraph.tasks.classification import model_device

TEMPERATURES = (2.0, 4.0, 8.0)
"""Of the softmax of importances, that ``auto`` tries beside ``uniform``."""

SHARES_FILE = "shares.json"

MOST_REMOVED = 0.85
"""Of a module, as long as others have units left."""

FEW = 4
"""Held-out samples on which networks are compared."""


@dataclass(frozen=True)
class StruPrune(ChannelMethod):
    """Cuts neurons, and heads, out of each module, and changes the weights that stay by ADMM.

    Attributes:
        allocation: how much of each module goes. ``"uniform"``: the same share. ``"softmax"``: a
            share proportional to ``exp(-importance / temperature)``. ``"auto"``: of uniform and
            the temperatures 2, 4 and 8 what has the least loss on held-out calibration data.
        importance: of a module, in standard deviations: ``"loss"``: what the held-out loss gains
            when it alone is cut; ``"error"``: the logarithm of its reader's error then.
        temperature: of the softmax.
        heads: whether key-value groups leave with their query heads; else neurons alone do.
        rounds: of ADMM, at most; 0: least squares alone.
    """

    name: ClassVar[str] = "struprune"
    changes_weights: ClassVar[bool] = True

    allocation: Literal["auto", "uniform", "softmax"] = "uniform"
    importance: Literal["loss", "error"] = "loss"
    temperature: float = 4.0
    heads: bool = False
    rounds: int = 8

    def __post_init__(self) -> None:
        valid = {"allocation": ("auto", "uniform", "softmax"), "importance": ("loss", "error")}
        for name, words in valid.items():
            check_choice(name, getattr(self, name), words)
        check_positive("temperature", self.temperature)
        check_fields(self, rounds=0)

    def check(self, problem: Problem) -> None:
        """Say before any work what it cannot serve.

        Raises:
            BudgetError: the budget is one of single weights, or more than the modules must go.
            ModelError: no linear layer reads neurons, or no heads can leave.
        """
        super().check(problem)
        find = partial(find_modules, problem.graph, unwrap(problem.task.model))
        modules = find(heads=self.heads)
        if not modules:
            msg = (
                f"struprune finds no linear layer in {problem.task.name} that alone reads neurons: "
                "choose another method" + ("" if self.heads else ", or heads=true")
            )
            raise ModelError(msg)
        if self.heads and len(modules) == len(find(heads=False)):
            reasons = sorted({group.frozen for group in problem.graph.groups if group.frozen})
            msg = (
                f"no heads of {problem.task.name} can leave ({'; '.join(reasons) or 'it has none'})"
                ": leave heads out"
            )
            raise ModelError(msg)
        what = "neurons and heads alone" if self.heads else "neurons alone, heads with heads=true"
        check_reach(problem, [module.group for module in modules], f"struprune cuts {what}")

    def prune(self, problem: Problem) -> Result:
        """Choose the mask and change the weights that stay, module by module."""
        self.check(problem)
        with evaluation_mode(unwrap(problem.task.model)):
            return Pruning(self, problem).result()


class Pruning:
    """One pruning.

    Args:
        method: its options.
        problem: what to prune.
    """

    def __init__(self, method: StruPrune, problem: Problem) -> None:
        self._method, self._problem, self._task = method, problem, problem.task
        num_examples = num_samples(problem.task.example_inputs)
        most = most_samples(problem.graph, num_examples, problem.num_calibration, TOKENS)
        own, others = drawn_samples(problem.task.train, most, problem.seed)
        fitted = joined(list(own.batches(max(len(own), 1))))
        self._held = [fitted] if others is None else list(others.batches(1))
        batch = joined([fitted, *self._held]) if others is not None else fitted
        dense = unwrap(problem.task.model)
        layers = linear_layers(problem.graph, dense)
        modules = find_modules(problem.graph, dense, heads=method.heads)
        self.walk = Walk(
            dense=dense,
            modules=modules,
            layers=list(layers),
            run=lambda network: self._forward(network, batch),
            share=num_samples(fitted) / max(num_samples(batch), 1),
        )
        self._modules = modules
        rows = num_samples(fitted) * max(num_tokens(fitted), 1)
        warn_of_few(rows, max(len(module.units) for module in modules))

    def _forward(self, network: nn.Module, batch: Batch) -> None:
        with autocasting(model_device(network), wanted=self._task.autocast):
            self._task.forward(network, batch)

    def _loss(self, network: nn.Module) -> float:
        """Return the mean loss on held-out calibration data."""
        losses = []
        for batch in self._held[:FEW]:
            with autocasting(model_device(network), wanted=self._task.autocast), torch.no_grad():
                losses.append(float(self._task.loss(network, batch)))
        return sum(losses) / len(losses)

    def result(self) -> Result:
        """Choose the shares, then cut and fit."""
        problem = self._problem
        identity = problem.identity(self._method, calibration=problem.calibration.fingerprint())
        files = BlockFiles(folder=problem.folder, identity=identity)
        files.open()
        weights, details = self._known_weights(files)
        counts = self.counts(weights)
        walked = self.walk.prune(counts, self._method.rounds, files, problem.tell_block)
        mask = self._mask(walked)
        model = apply_mask(walked.network, problem.graph, mask).eval()
        details["errors"] = {name: min(errors) for name, errors in walked.errors.items()}
        details["rounds"] = {name: int(np.argmin(own)) for name, own in walked.errors.items()}
        details["calibration"] = len(problem.calibration)
        return Result(mask=mask, model=model, details=details)

    def _known_weights(self, files: BlockFiles) -> tuple[dict[str, float], dict[str, Any]]:
        """Return what ``_weights`` does; an earlier start may have found it."""
        if files.folder is None:
            return self._weights()
        path = files.folder / SHARES_FILE
        if not path.is_file():
            weights, details = self._weights()
            write_json(path, {"weights": weights, "details": details})
        shape = {"weights": dict[str, float], "details": dict[str, Any]}
        found = checked(read_json(path), shape, str(path))
        return found["weights"], found["details"]

    def _weights(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Return by how much each module loses more than others, and what was found on the way."""
        method, uniform = self._method, dict.fromkeys((m.reader for m in self._modules), 1.0)
        if method.allocation == "uniform":
            return uniform, {"allocation": "uniform"}
        found = self.walk.measure(self.counts(uniform), self._loss)
        values = [found[module.reader][method.importance == "error"] for module in self._modules]
        if method.allocation == "softmax":
            chosen = self._softmax(values, method.temperature)
            return chosen, {"allocation": "softmax", "importances": values}
        tried = {"uniform": uniform}
        tried |= {f"softmax, T={t:g}": self._softmax(values, t) for t in TEMPERATURES}
        losses = {}
        for name, weights in tried.items():
            self._problem.tell(0, f"tries {name}")
            losses[name] = self._loss(self.walk.prune(self.counts(weights), 0).network)
        best = min(losses, key=losses.__getitem__)
        return tried[best], {"allocation": best, "importances": values, "tried": losses}

    def _softmax(self, values: Sequence[float], temperature: float) -> dict[str, float]:
        deviation = float(np.std(values)) or 1.0
        return {
            module.reader: math.exp(-(value - float(np.mean(values))) / deviation / temperature)
            for module, value in zip(self._modules, values, strict=True)
        }

    def counts(self, weights: Mapping[str, float]) -> dict[str, int]:
        """Return how many units of each module stay."""
        graph = self._problem.graph
        mask = self._problem.project(_scores(graph, self._modules, weights))
        kept = np.bincount(graph.group_of, weights=mask.keep, minlength=len(graph.groups))
        return {module.reader: int(kept[module.group]) for module in self._modules}

    def _mask(self, walked: Walked) -> ChannelMask:
        keep = np.ones(self._problem.graph.num_units, dtype=bool)
        for module in self._modules:
            keep[np.setdiff1d(module.units, walked.kept[module.reader])] = False
        return self._problem.graph.mask(keep)


def _scores(
    graph: StructureGraph, modules: Sequence[Module], weights: Mapping[str, float]
) -> FloatArray:
    """Return ``[N]`` scores by which the budget decides how many units of each module stay.

    Shares in proportion to the weights, rescaled to the budget, at most ``MOST_REMOVED`` (water
    filling): a unit leaves when the common factor has grown to its place over the weight. Which
    units leave is not said. All else stays.

    Args:
        graph: the structure.
        modules: what may lose units.
        weights: by reader; default: 1.
    """
    when = np.full(graph.num_units, np.inf)
    for module in modules:
        units, weight = graph.groups[module.group].units, weights.get(module.reader, 1.0)
        places = np.arange(1, len(units) + 1) / len(units)
        when[units] = np.where(places <= MOST_REMOVED, places, places + 1e6) / weight
    order = np.argsort(np.argsort(-when, kind="stable"), kind="stable")
    return -order.astype(np.float32)
