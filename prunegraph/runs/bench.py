"""One network on the bench: evaluator, statistics, and what every mask is measured with."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.masks import ChannelMask, FloatArray
from prunegraph.core.splits import TrainSplit
from prunegraph.evaluation.evaluator import QUICK_CALIBRATION, Evaluator
from prunegraph.evaluation.log import OutcomeLog
from prunegraph.graph.costs.latency import LatencyTable, measure_latency_table
from prunegraph.graph.costs.latency_budget import project_budget
from prunegraph.graph.features import node_features
from prunegraph.layerwise.reconstruct import Reconstruction
from prunegraph.layerwise.sequential import (
    SEARCH_MEMORY,
    SEARCH_SAMPLES,
    LayerwiseReconstruction,
    most_samples,
)
from prunegraph.methods.criteria.measured import LazyStatistics, measure_costly
from prunegraph.methods.criteria.taylor import measure, measure_divergence, unlabelled_evaluator
from prunegraph.methods.prior import Start, rank_starts
from prunegraph.methods.problem import PruningProblem
from prunegraph.runs.options.config import PruningOptions, SearchOptions
from prunegraph.runs.prepare import DEFAULT_DATASET, Target
from prunegraph.tasks.batches import num_samples
from prunegraph.tasks.classification import WORST, evaluate
from prunegraph.training.loop import FinetuneConfig

FINETUNE_EPOCHS = 10
DIGITS_FINETUNE_EPOCHS = 40


@dataclass(frozen=True, eq=False, kw_only=True)
class Bench:
    """A network with everything that methods and reports measure it with.

    Attributes:
        target: the network, its images, its structure.
        options: budget, calibration and fine-tuning.
        seed: fixes calibration images.
        statistics_seed: fixes the images of statistics and starts; default: ``seed``.
    """

    target: Target
    options: PruningOptions
    seed: int
    statistics_seed: int | None = None

    @property
    def budget(self) -> Budget:
        """What may remain."""
        return self.options.budget()

    @property
    def _drawn(self) -> int:
        """The seed of statistics and starts."""
        return self.seed if self.statistics_seed is None else self.statistics_seed

    def with_statistics(self, seed: int) -> "Bench":
        """Return a bench that judges masks alike, with statistics and starts of other images.

        Searches that shared a start would share its luck: each seed measures its own.
        """
        if seed not in self._by_seed:
            bench = dataclasses.replace(self, statistics_seed=seed)
            kept = ("reconstruction", "quick_reconstruction", "final_evaluator", "_by_seed")
            bench.__dict__.update({name: getattr(self, name) for name in kept})
            self._by_seed[seed] = bench
        return self._by_seed[seed]

    @cached_property
    def _by_seed(self) -> dict[int, "Bench"]:
        """The benches that ``with_statistics`` returns: what one has measured, it keeps."""
        return {self._drawn: self}

    @cached_property
    def statistics(self) -> Mapping[str, FloatArray]:
        """Measured arrays ``[N]`` by name, those that run no pruned network."""
        target = self.target
        found = measure(target.task, target.graph, seed=self._drawn, device=target.device)
        for values in found.values():  # all methods read them
            values.flags.writeable = False
        return found

    @cached_property
    def lazy_statistics(self) -> LazyStatistics:
        """The same, and the costly ones, each measured when a method first asks for it."""
        target = self.target
        given = target.task, target.graph
        return LazyStatistics(
            self.statistics,
            lambda name: measure_costly(name, *given, seed=self._drawn, device=target.device),
        )

    @cached_property
    def unlabelled(self) -> Evaluator:
        """Compares outputs with the dense network's on train images: no label, no search image."""
        target = self.target
        return unlabelled_evaluator(
            target.task,
            target.graph,
            num_calibration=min(self.options.calibration_images, QUICK_CALIBRATION),
            seed=self._drawn,
            device=target.device,
            reconstruction=self.quick_reconstruction or self.reconstruction,
        )

    @cached_property
    def _starts(self) -> dict[Budget, list[Start]]:
        return {}

    def starts(self, budget: Budget) -> list[Prior]:
        """Return what policies may start from, first the heuristic that moves the outputs least."""
        if budget not in self._starts:
            divergence = partial(measure_divergence, self.unlabelled)
            self._starts[budget] = rank_priors(
                divergence, self.target.graph, self.statistics, budget
            )
        return self._starts[budget]

    def start(self, budget: Budget) -> Prior:
        """Return what policies start from."""
        return self.starts(budget)[0]

    def starting_from(self, names: Mapping[Budget, str]) -> "Bench":
        """Return a bench with the same measurements and, at some budgets, other starts."""
        bench = copy.copy(self)
        bench.__dict__.pop("_by_seed", None)  # those have starts of their own
        moved = {
            budget: sorted(self.starts(budget), key=lambda start: start.name != name)
            for budget, name in names.items()
        }
        bench.__dict__["_starts"] = {**self._starts, **moved}
        return bench

    def node_features(self, budget: Budget, names: Sequence[str]) -> FloatArray:
        """Return the named features of each prunable unit ``[N, F]``."""
        measured = {**self.statistics, "start": self.start(budget).scores}
        return node_features(self.target.graph, measured, budget, names)

    @property
    def _search_options(self) -> SearchOptions:
        """How masks are scored; the defaults for a command that does not search."""
        return self.options if isinstance(self.options, SearchOptions) else SearchOptions()

    def evaluator(self, log: OutcomeLog | None = None) -> Evaluator:
        """Return an evaluator that has run nothing yet: each method counts its own networks.

        Args:
            log: what an earlier start of the method measured.
        """
        target, search = self.target, self._search_options
        return Evaluator(
            target.task,
            target.graph,
            num_calibration=self.options.calibration_images,
            seed=self.seed,
            device=target.device,
            metric=search.metric,
            reconstruction=self.reconstruction,
            quick_reconstruction=self.quick_reconstruction,
            log=log,
        )

    @cached_property
    def reconstruction(self) -> Reconstruction | None:
        """What changes the weights that stay; None if they stay as they are."""
        if not self.options.reconstruct:
            return None
        if not self.options.layer_by_layer:
            return self._fit(Reconstruction, self.options.calibration_images)
        return self._fit(LayerwiseReconstruction, self._most_samples())

    @cached_property
    def quick_reconstruction(self) -> Reconstruction | None:
        """The same on few images, for searches; None if it is quick as it is."""
        in_turn = self.options.reconstruct and self.options.layer_by_layer
        few = self._most_samples(SEARCH_SAMPLES, SEARCH_MEMORY)
        if not in_turn or few == self._most_samples():
            return None
        return self._fit(LayerwiseReconstruction, few)

    def _most_samples(self, *bounds: int) -> int:
        """Return on how many of the calibration images networks can be fitted."""
        samples = num_samples(self.target.example_inputs)
        most = most_samples(self.target.graph, samples, *bounds)
        return min(self.options.calibration_images, most)

    def _fit(self, kind: type[Reconstruction], num_images: int) -> Reconstruction:
        target, seed = self.target, self.seed
        images = target.dataset.train.sample(num_images, seed)
        return kind.on_samples(target.task, target.graph, images, seed=seed, device=target.device)

    @cached_property
    def final_evaluator(self) -> Evaluator:
        """The evaluator of rows: what it runs counts for no method."""
        return self.evaluator()

    @cached_property
    def latency_table(self) -> LatencyTable | None:
        """Layer times on this device, for one image; None if they are not needed, or known."""
        if not self._measures_latency:
            return None
        graph, inputs = self.target.graph, self.target.example_inputs
        return measure_latency_table(self.timed_model, graph, inputs, budget=self.budget)

    @cached_property
    def timed_model(self) -> nn.Module:
        """The dense network, in the layout in which it is timed if a latency is measured."""
        return self.target.as_loaded() if self._measures_latency else self.target.model

    @property
    def _measures_latency(self) -> bool:
        return self.budget.max_latency is not None and self.target.graph.latency_model is None

    def project(self, scores: FloatArray, budget: Budget) -> ChannelMask:
        """Return the mask of the best scores ``[N]`` within a budget, a latency included."""
        target = self.target
        return project_budget(
            self.timed_model,
            target.graph,
            scores,
            budget,
            target.example_inputs,
            self.latency_table,
        )

    def problem(
        self, *, seed: int, max_networks: int, log: OutcomeLog | None = None
    ) -> Problem:
        """Return the problem that a baseline solves, with an evaluator of its own."""
        return Problem(
            model=self.timed_model,
            graph=self.target.graph,
            budget=self.budget,
            evaluator=self.evaluator(log),
            statistics=self.lazy_statistics,
            example_inputs=self.target.example_inputs,
            seed=seed,
            max_networks=max_networks,
            subset_size=self._search_options.agent.subset,
            latency=self.latency_table,
        )

    def recipe(self) -> FinetuneConfig:
        """Return the fine-tune that every row gets."""
        options = self.options
        digits = self.target.dataset.name == DEFAULT_DATASET
        default = DIGITS_FINETUNE_EPOCHS if digits else FINETUNE_EPOCHS
        return FinetuneConfig(
            epochs=default if options.finetune_epochs is None else options.finetune_epochs,
            batch_size=options.batch_size,
            peak_lr=options.finetune_lr,
            distill_weight=options.distill,
        )

    def recipe_record(self) -> dict[str, Any]:
        """Return what a report tells of how masks become networks, as JSON values."""
        asked = {
            "layer_by_layer": self.options.reconstruct and self.options.layer_by_layer,
            "on_search_images_too": self.options.finetune_on_search,
        }
        record = {**vars(self.recipe()), "reconstruct": self.options.reconstruct}
        return record | {name: True for name, value in asked.items() if value}

    @property
    def finetune_images(self) -> TrainSplit:
        """What every row is fine-tuned on."""
        train, search = self.target.dataset.train, self.target.dataset.search
        if not self.options.finetune_on_search:
            return train
        return TrainSplit(train.source, torch.cat([train.index, search.index]))

    @property
    def teacher(self) -> nn.Module | None:
        """The network from whose outputs fine-tunes learn, if they do."""
        return self.target.model if self.options.distill else None

    def test_accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on the test split. Call it when every choice is made."""
        return evaluate(model, self.target.dataset.test).accuracy

    def search_accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on the whole search split."""
        return evaluate(model, self.target.dataset.search).accuracy

    def recalibrated_test_accuracy(self, mask: ChannelMask) -> float:
        """Return a mask's test accuracy after recalibration. Call it when every choice is made.

        Like a search's it is 0 where the outputs are not finite.
        """
        pruned = self.final_evaluator.prune(mask)
        return evaluate(pruned, self.target.dataset.test, worst=WORST).accuracy
