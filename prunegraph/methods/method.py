"""What every method is given, what it gives back, and what it says of itself."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast

import numpy as np
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError, ConfigError, ModelError
from prunegraph.core.masks import ChannelMask, FloatArray
from prunegraph.core.splits import TrainSplit
from prunegraph.core.task import Task
from prunegraph.core.tensors import parameter_digest
from prunegraph.core.weight_mask import WeightMask
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.evaluation.log import OutcomeLog
from prunegraph.graph import StructureGraph, unwrap
from prunegraph.graph.costs.latency import LatencyTable
from prunegraph.graph.costs.latency_budget import project_budget
from prunegraph.graph.features import node_features
from prunegraph.graph.rounding import restrict
from prunegraph.methods.prior import Prior, measure_divergence, prior_names, rank_priors

Role = Literal["agent", "baseline", "control"]
"""What a row is in a comparison: the agent's, what it must beat, or what explains the figures."""

SUBSET, SUBSET_TOKENS = 1500, 2048
"""Search samples that searches score their candidates on, and of networks that read tokens so many
of these: that tells networks apart whose divergences differ by 2 %."""

Kind = Literal["channels", "weights"]
"""What a mask is of: prunable units, which are cut out, or single weights, which become zero."""


class OfNetwork:
    """What is of one network, of which the structure is known where channels are chosen."""

    task: Task
    structure: StructureGraph | None

    @property
    def graph(self) -> StructureGraph:
        """The structure graph.

        Raises:
            ModelError: there is none.
        """
        if self.structure is None:
            msg = f"{self.task.name} has no structure graph: give one to choose channels"
            raise ModelError(msg)
        return self.structure


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem(OfNetwork):
    """One network to prune to one budget; made by ``make_problem``.

    Attributes:
        task: the dense network, which no method changes, its data, and what counts as good.
        structure: its structure graph; None where single weights become zero.
        budget: what may remain.
        statistics: measured arrays ``[N]`` by name, each measured when it is first asked for.
        make_evaluator: returns an evaluator that has counted nothing yet, but what a log knows.
        make_unlabelled: returns what compares outputs with the dense network's, without labels.
        num_calibration: train samples by which weights are chosen and changed.
        seed: fixes every random choice of the method.
        max_networks: pruned networks that the method may run.
        subset_size: search samples that a method scores its candidates on.
        latency: layer times measured before, used if the budget holds a latency; default: measured
            when they are needed.
        timed: the network as it is timed, if not as the task holds it.
        log: what an earlier start of the method measured.
        folder: where a long method keeps its checkpoints; None: it keeps none.
        progress: called with the number of networks run, by methods of single weights with the
            percent done, and what the method says of itself.
    """

    task: Task
    structure: StructureGraph | None
    budget: Budget
    statistics: Mapping[str, FloatArray]
    make_evaluator: Callable[[OutcomeLog | None], Evaluator]
    make_unlabelled: Callable[[], Evaluator]
    num_calibration: int = 1024
    seed: int = 0
    max_networks: int = 0
    subset_size: int = SUBSET
    latency: LatencyTable | None = None
    timed: nn.Module | None = None
    log: OutcomeLog | None = None
    folder: Path | None = None
    progress: Callable[[int, str], None] | None = None

    @cached_property
    def calibration(self) -> TrainSplit:
        """The samples by which weights are chosen and changed, drawn by the seed."""
        return self.task.train.sample(self.num_calibration, self.seed)

    @cached_property
    def evaluator(self) -> Evaluator:
        """Scores masks on the search split and counts the networks run."""
        return self.make_evaluator(self.log)

    def file(self, name: str) -> Path | None:
        """Return where a method keeps a checkpoint of a name; None: nowhere."""
        return None if self.folder is None else self.folder / f"{name}.safetensors"

    def tell(self, done: int, words: str) -> None:
        """Call ``progress``, if there is one."""
        if self.progress is not None:
            self.progress(done, words)

    def tell_block(self, done: int, total: int) -> None:
        """Tell how many blocks of a network are done."""
        self.tell(100 * done // total, f"block {done} of {total}")

    def identity(self, method: "Method", **data: Any) -> dict[str, Any]:
        """Return what tells a run of a method from others, as JSON values.

        Args:
            method: a dataclass of its options.
            data: fingerprints of what else it sees, such as samples.
        """
        given = {
            "method": method.name,
            **asdict(cast(Any, method)),
            "seed": self.seed,
            "budget": self.budget.as_dict(),
            "network": parameter_digest(unwrap(self.task.model)),
            **data,
        }
        return dict(json.loads(json.dumps(given)))

    def new_evaluator(self) -> Evaluator:
        """Return an evaluator that scores masks alike and has counted nothing yet."""
        return self.make_evaluator(None)

    @cached_property
    def unlabelled(self) -> Evaluator:
        """Compares outputs with the dense network's on train data: no label, no search sample."""
        return self.make_unlabelled()

    def project(self, scores: FloatArray, budget: Budget | None = None) -> ChannelMask:
        """Return the mask of the best scores ``[N]`` within the budget, a latency included."""
        return project_budget(
            self.timed or self.task.model,
            self.graph,
            scores,
            budget or self.budget,
            self.task.example_inputs,
            self.latency,
        )

    def priors(self, budget: Budget | None = None) -> list[Prior]:
        """Return what a policy may start from, first what moves the outputs least.

        They are judged without labels on train data. A second call runs no network.
        """
        divergence = partial(measure_divergence, self.unlabelled)
        return rank_priors(
            divergence,
            self.graph,
            self.statistics,
            budget or self.budget,
            names=prior_names(self.task, self.graph),
        )

    def features(
        self, names: Sequence[str], budget: Budget | None = None, prior: FloatArray | None = None
    ) -> FloatArray:
        """Return the named features of each prunable unit ``[N, F]``.

        Args:
            names: of the features.
            budget: default: the problem's own.
            prior: ``[N]`` scores that a policy starts from; default: the first of ``priors``.
        """
        budget = budget or self.budget
        if prior is None and "start" in names:
            prior = self.priors(budget)[0].scores
        return node_features(self.graph, self.statistics, budget, names, start=prior)


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """What a method chose.

    Attributes:
        mask: what stays; meets the problem's budget.
        model: the pruned network, where the method changed or trained weights that stay.
        networks: pruned networks run on the way to it.
        details: what a report tells of it besides, as JSON values.
    """

    mask: ChannelMask | WeightMask
    model: nn.Module | None = None
    networks: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def channels(self) -> ChannelMask:
        """The mask of a method that chooses channels."""
        assert isinstance(self.mask, ChannelMask)
        return self.mask


class Method(Protocol):
    """A pruning method. What it is, it says itself: nothing is read off its name."""

    @property
    def name(self) -> str:
        """Its name in tables, as ``"l1/uniform"``."""
        ...

    @property
    def role(self) -> Role:
        """What its rows are in a comparison."""
        ...

    @property
    def kind(self) -> Kind:
        """What its masks are of."""
        ...

    @property
    def searches(self) -> bool:
        """Whether it runs as many pruned networks as it may."""
        ...

    @property
    def per_seed(self) -> bool:
        """Whether its mask depends on chance, or on which samples were drawn."""
        ...

    def check(self, problem: Problem) -> None:
        """Say before any work what it cannot serve.

        Raises:
            PruneGraphError: the task, the budget, or too few networks; in one line.
        """
        ...

    def prune(self, problem: Problem) -> Result:
        """Choose a mask that meets the problem's budget."""
        ...


class ChannelMethod:
    """What most methods are: a baseline that chooses prunable units."""

    role: ClassVar[Role] = "baseline"
    kind: ClassVar[Kind] = "channels"
    searches: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = False
    """Whether its network is no plain cut of the dense one."""

    @property
    def per_seed(self) -> bool:
        """True: most methods depend on which samples were drawn."""
        return True

    def networks_needed(self, graph: StructureGraph) -> int:
        """Return how many pruned networks it runs at the least."""
        del graph
        return int(self.searches)

    def check(self, problem: Problem) -> None:
        """Say before any work what it cannot serve.

        Raises:
            ConfigError: too few networks.
            BudgetError: the budget is one of single weights.
        """
        problem.budget.check_channels()
        name = getattr(self, "name", type(self).__name__)
        if problem.budget.depth and self.changes_weights:
            msg = (
                f"{name} changes weights of layers that stay, depth removes some: leave depth out, "
                "or choose another method"
            )
            raise BudgetError(msg)
        needed = self.networks_needed(problem.graph)
        if problem.max_networks < needed:
            msg = (
                f"networks={problem.max_networks} is too few for {name}, which runs {needed} on "
                "this structure: give as many or choose another method"
            )
            raise ConfigError(msg)


def check_reach(problem: Problem, groups: Sequence[int], reason: str) -> None:
    """Say before any work that some groups alone cannot meet a budget.

    Args:
        problem: the network and its budget.
        groups: numbers of those that may lose units.
        reason: why the others stay whole.

    Raises:
        BudgetError: they cannot; it says the least that can.
    """
    graph = problem.graph
    whole = dict.fromkeys(np.setdiff1d(graph.free_groups, groups).tolist(), reason)
    left = restrict(graph, whole, graph.widths)
    left.project(np.zeros(graph.num_units, dtype=np.float32), problem.budget.without_latency())
