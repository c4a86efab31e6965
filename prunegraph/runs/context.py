"""One network of a run: its task, its context, and what every mask is measured with."""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from prunegraph.artefacts.masked import StoredMask, load_masked
from prunegraph.artefacts.pruned import StoredChannels, load_pruned
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ModelError
from prunegraph.core.masks import ChannelMask
from prunegraph.core.splits import Split, TrainSplit
from prunegraph.core.task import Task, with_parts
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.methods.context import Context
from prunegraph.runs.options.config import PruningOptions, SearchOptions
from prunegraph.runs.target import Target
from prunegraph.training.loop import FinetuneConfig

Mask = ChannelMask | StoredMask
"""What a method chose: units, which are cut out, or single weights. Single weights, and units whose
method has changed the weights that stay, lie on disk with their network (``StoredChannels``)."""

MOST = 1e9
"""An error that is no number, or larger, counts as this."""


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
        timed = self.budget.max_latency is not None and target.graph.latency_model is None
        return Context(
            task=target.task,
            structure=target.structure,
            seed=self.seed,
            num_calibration=target.num_calibration or options.calibration_images,
            reconstruct=options.reconstruct,
            layer_by_layer=options.layer_by_layer,
            metric=search.agent.metric,
            subset_size=search.agent.subset,
            device=target.device,
            timed=target.as_loaded() if timed else None,
        )

    @property
    def _search_options(self) -> SearchOptions:
        """How masks are scored; the defaults for a command that does not search."""
        return self.options if isinstance(self.options, SearchOptions) else SearchOptions()

    @cached_property
    def final_evaluator(self) -> Evaluator:
        """The evaluator of rows: what it runs counts for no method."""
        return self.measures.evaluator()

    def recipe(self) -> FinetuneConfig:
        """Return the fine-tune that every row gets."""
        options = self.options
        asked: dict[str, Any] = {
            "epochs": options.finetune_epochs,
            "batch_size": options.batch_size,
            "peak_lr": options.finetune_lr,
            "lora_rank": options.finetune_lora,
            "distill_weight": options.distill,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        return dataclasses.replace(self.target.recipe, **given)

    def recipe_record(self) -> dict[str, Any]:
        """Return what a report tells of how masks become networks, as JSON values."""
        asked: dict[str, Any] = {
            "layer_by_layer": self.options.reconstruct and self.options.layer_by_layer,
            "on_search_images_too": self.options.finetune_on_search,
        }
        record = {**vars(self.recipe()), "reconstruct": self.options.reconstruct}
        return record | {name: True for name, value in asked.items() if value}

    @property
    def trains(self) -> bool:
        """Whether there are fine-tunes."""
        return self.recipe().epochs > 0

    @property
    def finetune_task(self) -> Task:
        """The task, with what every row is fine-tuned on."""
        task = self.target.task
        if not self.options.finetune_on_search or task.search is None:
            return task
        train = TrainSplit(task.train.source, torch.cat([task.train.index, task.search.index]))
        return with_parts(task, train=train)

    @property
    def teacher(self) -> nn.Module | None:
        """The network from whose outputs fine-tunes learn, if they do."""
        return self.target.model if self.recipe().distill_weight else None

    def network(self, mask: Mask) -> nn.Module:
        """Return a mask's network as it is before the fine-tune, ready to be measured.

        Raises:
            ArtefactError: a file of a stored one is missing, damaged or of another network.
        """
        target = self.target
        if isinstance(mask, StoredMask):
            return self.placed(load_masked(mask.where, target.build).model)
        if isinstance(mask, StoredChannels):
            saved = load_pruned(mask.where, target.build, graph=target.graph)
            return self.placed(saved.model)
        return self.final_evaluator.prune(mask, self.measures.reconstruction)

    def placed(self, model: nn.Module) -> nn.Module:
        """Return a network on the device, in the layout in which all networks are measured."""
        return self.target.task.place_model(model, self.target.device).eval()

    def test_accuracy(self, model: nn.Module) -> float:
        """Return the utility on the test split. Call it when every choice is made."""
        return self._utility(model, self.target.task.test)

    def search_accuracy(self, model: nn.Module) -> float:
        """Return the utility on the whole search split."""
        return self._utility(model, self.target.task.search)

    def recalibrated_search_accuracy(self, mask: Mask) -> float:
        """Return the utility of a mask's network, not fine-tuned, on the whole search split."""
        quick = isinstance(mask, ChannelMask) and not isinstance(mask, StoredChannels)
        if quick and self.target.task.score_name == "accuracy":
            assert isinstance(mask, ChannelMask)
            return self.final_evaluator.evaluate(mask).accuracy
        return self._of_pruned(mask, self.target.task.search)

    def recalibrated_test_accuracy(self, mask: Mask) -> float:
        """Return a mask's test utility before a fine-tune. Call it when every choice is made."""
        return self._of_pruned(mask, self.target.task.test)

    def _of_pruned(self, mask: Mask, split: Split | None) -> float:
        """Return the utility of a mask's network; the worst where its outputs are not finite."""
        try:
            return self._utility(self.network(mask), split)
        except ModelError:
            return self._worst

    def _utility(self, model: nn.Module, split: Split | None) -> float:
        utility = self.target.task.score(model, split).utility
        return utility if math.isfinite(utility) and utility > -MOST else self._worst

    @property
    def _worst(self) -> float:
        return 0.0 if self.target.task.higher_is_better else -MOST
