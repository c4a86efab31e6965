"""A dense network with what methods measure of it, each thing once."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.splits import SearchSplit
from prunegraph.core.task import Task
from prunegraph.evaluation.evaluator import QUICK_CALIBRATION, Evaluator, metric_of
from prunegraph.evaluation.log import OutcomeLog
from prunegraph.graph import StructureGraph
from prunegraph.graph.costs.latency import LatencyTable, measure_latency_table
from prunegraph.layerwise.reconstruct import Reconstruction, drawn_samples
from prunegraph.layerwise.room import most_fitted
from prunegraph.layerwise.sequential import (
    SEARCH_MEMORY,
    SEARCH_SAMPLES,
    LayerwiseReconstruction,
)
from prunegraph.layerwise.silenced import SilencedReconstruction
from prunegraph.methods.criteria.measured import LazyStatistics, measure_costly
from prunegraph.methods.criteria.taylor import measure
from prunegraph.methods.method import SUBSET, SUBSET_TOKENS, OfNetwork, Problem
from prunegraph.rewards.config import Metric
from prunegraph.tasks.batches import num_tokens

UNLABELLED_SAMPLES = 2048
"""Train samples that priors are compared on, by the outputs of pruned and dense network; of
networks that read tokens ``SUBSET_TOKENS``."""

QUICK_SAMPLES = 512
"""Samples on which a quick evaluator compares outputs."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Context(OfNetwork):
    """One network, and how masks become networks and are judged.

    Attributes:
        task: the dense network, its data, and what counts as good.
        structure: its structure graph; None where single weights become zero.
        seed: fixes calibration images.
        statistics_seed: fixes the images of statistics and priors; default: ``seed``.
        num_calibration: train samples that recalibrate batch norm.
        reconstruct: whether the weights that stay make up for what was removed.
        layer_by_layer: whether they do so one layer after the other.
        metric: what searches compare masks by.
        subset_size: search samples that searches score candidates on; None = ``SUBSET``, or
            as many as ``SUBSET_TOKENS`` need.
        device: where networks run; None = where the task's network is.
        timed: the network as it is timed, if not as the task holds it.
        unlabelled_log: what an earlier start has measured without labels, by the same seeds.
    """

    task: Task
    structure: StructureGraph | None
    seed: int = 0
    statistics_seed: int | None = None
    num_calibration: int = 1024
    reconstruct: bool = True
    layer_by_layer: bool = True
    metric: Metric = "soft_accuracy"
    subset_size: int | None = None
    device: str | torch.device | None = None
    timed: nn.Module | None = None
    unlabelled_log: OutcomeLog | None = None

    @property
    def drawn(self) -> int:
        """The seed of statistics and priors."""
        return self.seed if self.statistics_seed is None else self.statistics_seed

    def with_statistics(self, seed: int) -> "Context":
        """Return a context that judges masks alike, with statistics and priors of other images.

        Searches that shared a prior would share its luck: each seed measures its own.
        """
        if seed not in self._by_seed:
            other = dataclasses.replace(self, statistics_seed=seed)
            shared = ["_tables", "_by_seed"]
            if self.structure is not None:
                shared += ["reconstruction", "quick_reconstruction"]
            other.__dict__.update({name: getattr(self, name) for name in shared})
            self._by_seed[seed] = other
        return self._by_seed[seed]

    @cached_property
    def _by_seed(self) -> dict[int, "Context"]:
        """The contexts that ``with_statistics`` returns: what one has measured, it keeps."""
        return {self.drawn: self}

    @cached_property
    def statistics(self) -> LazyStatistics:
        """Measured arrays ``[N]`` by name, each measured when a method first asks for it."""
        given: dict[str, Any] = {"seed": self.drawn, "device": self.device}
        return LazyStatistics(
            lambda: measure(self.task, self.graph, **given),
            lambda name: measure_costly(name, self.task, self.graph, **given),
        )

    @cached_property
    def unlabelled(self) -> Evaluator:
        """Compares outputs with the dense network's on train images: no label, no search image.

        The images are others than those that calibrate, if there are enough.
        """
        train, search = self.task.train, None
        if self.task.search is not None:
            drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.drawn))
            most = self._tokens_or(UNLABELLED_SAMPLES, SUBSET_TOKENS)
            search = SearchSplit(train.source, train.index[drawn.flip(0)[:most]])
        return Evaluator(
            self.task,
            self.graph,
            search=search,
            num_calibration=min(self.num_calibration, QUICK_CALIBRATION),
            seed=self.drawn,
            device=self.device,
            metric="kl",
            reconstruction=self.quick_reconstruction or self.reconstruction,
            log=self.unlabelled_log,
        )

    def evaluator(self, log: OutcomeLog | None = None) -> Evaluator:
        """Return an evaluator that has run nothing yet: each method counts its own networks.

        Args:
            log: what an earlier start of the method measured.
        """
        quick = self.quick_reconstruction
        return Evaluator(
            self.task,
            self.graph,
            num_calibration=self.num_calibration,
            seed=self.seed,
            device=self.device,
            metric=metric_of(self.task, self.metric),
            reconstruction=quick if self._tokens else self.reconstruction,
            quick_reconstruction=None if self._tokens else quick,
            log=log,
        )

    def quick_evaluator(self, batch: int, *, labelled: bool = True) -> Evaluator:
        """Return an evaluator that takes milliseconds a mask of a small network.

        It compares outputs on ``QUICK_SAMPLES`` with the dense network's. Layers are reconstructed
        at once, and batch norm goes by the images that are scored.

        Args:
            batch: so many samples at once.
            labelled: they are search samples; else train samples.
        """
        train, search = self.task.train, self.task.search
        if not labelled or search is None:
            few = train.sample(QUICK_SAMPLES, self.drawn)
            search = SearchSplit(few.source, few.index)
        return Evaluator(
            self.task,
            self.graph,
            search=search.sample(QUICK_SAMPLES, self.drawn),
            num_calibration=1,
            batch_size=batch,
            device=self.device,
            metric="kl",
            reconstruction=self._silenced if self.reconstruct else None,
            recalibrate=False,
        )

    @property
    def _tokens(self) -> int:
        """Tokens of a sample; 0 if it holds others than whole numbers."""
        return num_tokens(self.task.example_inputs)

    def _tokens_or(self, samples: int, tokens: int) -> int:
        """Return how many samples hold so many tokens; ``samples`` of others."""
        return max(tokens // self._tokens, 1) if self._tokens else samples

    @cached_property
    def reconstruction(self) -> Reconstruction | None:
        """What changes the weights that stay; None if they stay as they are."""
        if not self.reconstruct:
            return None
        if not self.layer_by_layer:
            return self._at_once
        return self._fit(LayerwiseReconstruction, self._most_samples())

    @cached_property
    def quick_reconstruction(self) -> Reconstruction | None:
        """The same for searches: on few images, of tokens at once; None if it is quick as it is.

        What it makes of networks that read tokens is judged by their score alone: to compare
        outputs with and without it takes several times as long as the fit.
        """
        if self.reconstruct and self._tokens:
            return self._at_once.unguarded()  # statistics are kept
        in_turn = self.reconstruct and self.layer_by_layer
        few = self._most_samples(SEARCH_SAMPLES, SEARCH_MEMORY)
        if not in_turn or few == self._most_samples():
            return None
        return self._fit(LayerwiseReconstruction, few)

    @cached_property
    def _at_once(self) -> Reconstruction:
        return self._fit(Reconstruction, self.num_calibration)

    @cached_property
    def _silenced(self) -> Reconstruction:
        return self._fit(SilencedReconstruction, QUICK_CALIBRATION).unguarded()

    def _most_samples(self, *bounds: int) -> int:
        """Return on how many of the calibration images networks can be fitted."""
        return min(self.num_calibration, most_fitted(self.task, self.graph, *bounds))

    def _fit(self, kind: type[Reconstruction], most: int) -> Reconstruction:
        samples, others = drawn_samples(self.task.train, most, self.seed)
        return kind.on_samples(
            self.task,
            self.graph,
            samples,
            held_out=others,
            seed=self.seed,
            device=self.device,
        )

    def latency(self, budget: Budget) -> LatencyTable | None:
        """Return layer times on this device; None if they are not needed, or predicted."""
        if budget.max_latency is None or self.graph.latency_model is not None:
            return None
        if budget not in self._tables:
            self._tables[budget] = measure_latency_table(
                self.timed or self.task.model, self.graph, self.task.example_inputs, budget=budget
            )
        return self._tables[budget]

    @cached_property
    def _tables(self) -> dict[Budget, LatencyTable]:
        return {}

    def problem(
        self,
        budget: Budget,
        *,
        seed: int | None = None,
        max_networks: int = 0,
        log: OutcomeLog | None = None,
        folder: Path | None = None,
        progress: Callable[[int, str], None] | None = None,
    ) -> Problem:
        """Return what a method solves, with an evaluator of its own.

        Args:
            budget: what may remain.
            seed: of the method, and of what it measures; default: that of the statistics.
            max_networks: pruned networks that the method may run.
            log: what an earlier start of the method measured.
            folder: where a long method keeps its checkpoints.
            progress: called with the number of networks run, or the percent done, and a word.
        """
        own = self if seed is None else self.with_statistics(seed)
        return Problem(
            task=self.task,
            structure=self.structure,
            budget=budget,
            statistics=own.statistics,
            make_evaluator=own.evaluator,
            make_unlabelled=lambda: own.unlabelled,
            num_calibration=self.num_calibration,
            seed=own.drawn,
            max_networks=max_networks,
            subset_size=self.subset_size or self._tokens_or(SUBSET, SUBSET_TOKENS),
            latency=None if self.structure is None else self.latency(budget),
            timed=self.timed,
            log=log,
            folder=folder,
            progress=progress,
        )

    def untimed_problem(self, budget: Budget, max_networks: int) -> Problem:
        """Return what methods check before any work: no layer is timed for it."""
        untimed = self.problem(budget.without_latency(), max_networks=max_networks)
        return dataclasses.replace(untimed, budget=budget)


def make_problem(
    task: Task,
    graph: StructureGraph | None,
    budget: Budget,
    *,
    seed: int = 0,
    max_networks: int = 0,
    **options: Any,
) -> Problem:
    """Return the problem of one network and one budget.

    Args:
        task: the dense network, its data, and what counts as good.
        graph: its structure; None where single weights become zero.
        budget: what may remain.
        seed: fixes every random choice.
        max_networks: pruned networks that the method may run.
        options: of ``Context``: how masks become networks and are judged.
    """
    context = Context(task=task, structure=graph, seed=seed, **options)
    return context.problem(budget, max_networks=max_networks)
