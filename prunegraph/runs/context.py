"""One network of a run: its task, its context, and what every mask is measured with."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.masks import ChannelMask, FloatArray
from prunegraph.core.splits import TrainSplit
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.evaluation.log import OutcomeLog
from prunegraph.methods.context import Context
from prunegraph.methods.method import Problem
from prunegraph.runs.options.config import PruningOptions, SearchOptions
from prunegraph.runs.prepare import DEFAULT_DATASET, Target
from prunegraph.tasks.classification import WORST, evaluate
from prunegraph.training.loop import FinetuneConfig

FINETUNE_EPOCHS = 10
DIGITS_FINETUNE_EPOCHS = 40


@dataclass(frozen=True, eq=False, kw_only=True)
class RunContext:
    """A network with everything that methods and reports measure it with.

    Attributes:
        target: the network, its images, its structure.
        options: budget, calibration and fine-tuning.
        seed: fixes calibration images.
    """

    target: Target
    options: PruningOptions
    seed: int

    @property
    def budget(self) -> Budget:
        """What may remain."""
        return self.options.budget()

    @cached_property
    def measures(self) -> Context:
        """The network, and how its masks are judged."""
        target, options, search = self.target, self.options, self._search_options
        latency = self.budget.max_latency is not None and target.graph.latency_model is None
        return Context(
            task=target.task,
            structure=target.graph,
            seed=self.seed,
            num_calibration=options.calibration_images,
            reconstruct=options.reconstruct,
            layer_by_layer=options.layer_by_layer,
            metric=search.agent.metric,
            subset_size=search.agent.subset,
            device=target.device,
            timed=target.as_loaded() if latency else None,
        )

    @property
    def _search_options(self) -> SearchOptions:
        """How masks are scored; the defaults for a command that does not search."""
        return self.options if isinstance(self.options, SearchOptions) else SearchOptions()

    def evaluator(self, log: OutcomeLog | None = None) -> Evaluator:
        """Return an evaluator that has run nothing yet: each method counts its own networks."""
        return self.measures.evaluator(log)

    @cached_property
    def final_evaluator(self) -> Evaluator:
        """The evaluator of rows: what it runs counts for no method."""
        return self.evaluator()

    def project(self, scores: FloatArray, budget: Budget) -> ChannelMask:
        """Return the mask of the best scores ``[N]`` within a budget, a latency included."""
        return self.measures.problem(budget).project(scores)

    def problem(
        self,
        *,
        seed: int,
        max_networks: int = 0,
        log: OutcomeLog | None = None,
        folder: Path | None = None,
        progress: Callable[[int, str], None] | None = None,
    ) -> Problem:
        """Return what a method solves: see ``Context.problem``."""
        return self.measures.problem(
            self.budget,
            seed=seed,
            max_networks=max_networks,
            log=log,
            folder=folder,
            progress=progress,
        )

    def untimed_problem(self, max_networks: int) -> Problem:
        """Return what methods check before any work: no layer is timed for it."""
        untimed = self.measures.problem(self.budget.without_latency(), max_networks=max_networks)
        return dataclasses.replace(untimed, budget=self.budget)

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
