"""Dynamic ASR Pathways: a mask for each language on one set of weights, while the network trains.

After Xie et al. 2023 (arXiv 2309.13018). Its abstract tells of masks that adapt while one
multilingual recogniser trains, from different beginnings. This is a reconstruction: the score of a
weight for a language, the schedule and the starts are ours (``MaskPlan``, ``docs/results.md``).
By absolute values alone all languages would choose the same mask, since they share the weights.

The controls train alike, with equally many steps, and differ in their masks alone.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, cast, get_args

import torch

from prunegraph.core.checks import check_choice, check_fields, check_positive
from prunegraph.core.errors import ConfigError
from prunegraph.core.splits import TrainSplit
from prunegraph.core.task import Task, with_parts
from prunegraph.core.weight_mask import GroupedMask, WeightMask
from prunegraph.graph import copy_network, unwrap
from prunegraph.methods.method import Problem, Result, Role
from prunegraph.methods.weights import TrainedWeights
from prunegraph.training.loop import FinetuneConfig, FinetuneResult, finetune
from prunegraph.training.masked import MaskPlan, agreement, dense_mask, least_mask
from prunegraph.training.schedules import Cubic

RAMP, CHOICE = 0.6, 0.75
"""Shares of the steps over which the sparsity rises, and masks are chosen: later choices harm."""

Start = Literal["one", "magnitude", "random"]


@dataclass(frozen=True, kw_only=True)
class MaskedTraining(TrainedWeights):
    """A network that trains on batches of one language each, while weights go.

    Attributes:
        epochs: passes over the train split.
        batch_size: utterances a step.
        lr: highest learning rate of AdamW; a cosine takes it to zero.
        every: masks are chosen anew in every so many steps, until three quarters of all.
    """

    epochs: int = 8
    batch_size: int = 32
    lr: float = 2e-3
    every: int = 20

    def __post_init__(self) -> None:
        check_positive("lr", self.lr)
        check_fields(self, epochs=1, every=1, batch_size=2)
        if self.finds_masks and self.epochs < 2:
            msg = f"epochs={self.epochs} is too few for {self.name}: half of them find its masks"
            raise ConfigError(msg)

    @property
    def finds_masks(self) -> bool:
        """Whether the first half of the epochs finds masks to begin with."""
        return False

    @property
    def joint_epochs(self) -> int:
        """Those in which all languages train together."""
        return self.epochs - self.epochs // 2 if self.finds_masks else self.epochs

    @property
    def trains_before(self) -> bool:
        """Whether ``plan`` trains networks, for half of the progress."""
        return self.finds_masks

    @abstractmethod
    def plan(self, problem: Problem) -> MaskPlan:
        """Return how the masks change."""

    def check(self, problem: Problem) -> None:
        """Say before any work what it cannot serve.

        Raises:
            BudgetError: the budget is no sparsity, has a pattern, asks for fewer zeros than
                there are, or leaves no weight.
            ConfigError: batches of the task have no language, or there is a single step.
        """
        super().check(problem)
        if not hasattr(problem.task, "group_of"):
            msg = (
                f"{self.name} needs batches that know their language, {problem.task.name} has "
                "none: give a task of speech_recognition"
            )
            raise ConfigError(msg)
        self.rising(problem.task, problem.budget.sparsity or 0.0)

    def prune(self, problem: Problem) -> Result:
        """Train, with as many weights for each language as were asked for, exactly."""
        self.check(problem)
        task, network = problem.task, copy_network(unwrap(problem.task.model))
        halves, plan = 1 + self.trains_before, self.plan(problem)
        trained = self._train(part_of(problem, halves - 1, halves), network, task, plan, self.name)
        mask = GroupedMask.of(trained.masks)
        if isinstance(mask, GroupedMask):
            mask.attach(network)
        active, stored, overlap = agreement(trained.masks)
        groups = {
            "active": active,
            "stored": stored,
            "overlap": overlap,
            "scores": cast(Any, task).group_scores(network),
            "history": [list(row) for row in trained.history],
        }
        return Result(mask=mask, model=network, details={"groups": groups})

    def _train(
        self, problem: Problem, network: torch.nn.Module, task: Task, plan: MaskPlan, label: str
    ) -> FinetuneResult:
        """Train a network in place; an interrupted training goes on."""

        def tell(done: int, epochs: int, loss: float, _: float) -> None:
            problem.tell(100 * done // epochs, f"{label}, loss {loss:.3f}")

        return finetune(
            network,
            task,
            self.recipe(task),
            seed=problem.seed,
            checkpoint=problem.file(label),
            progress=tell,
            masks=plan,
        )

    def recipe(self, task: Task) -> FinetuneConfig:
        """Return how the network is trained."""
        return FinetuneConfig(
            epochs=self.joint_epochs,
            batch_size=self.batch_size,
            peak_lr=self.lr,
            optimizer="adamw",
            autocast=task.autocast,
        )

    def rising(self, task: Task, sparsity: float, **options: Any) -> MaskPlan:
        """Return the plan in which the sparsity rises as a cubic.

        Raises:
            ConfigError: there is a single step, after which no mask can be chosen.
        """
        full, rest = divmod(len(task.train), self.batch_size)
        steps = self.joint_epochs * (full + (rest > 1))
        if steps < 2:
            msg = (
                f"{self.name} would train for {steps} step on {len(task.train)} utterances, and "
                "needs 2: give a smaller batch_size, or more epochs"
            )
            raise ConfigError(msg)
        every, end = min(self.every, max(steps // 10, 1)), round(RAMP * steps)
        return MaskPlan(
            schedule=Cubic(sparsity, end=end, every=every),
            every=every,
            until=max(round(CHOICE * steps), end + 1),
            **options,
        )


def part_of(problem: Problem, number: int, parts: int) -> Problem:
    """Return a problem whose progress is that of one of so many equal parts."""
    tell = problem.progress
    if tell is None:
        return problem
    return replace(problem, progress=lambda done, note: tell((100 * number + done) // parts, note))


def languages_of(task: Task) -> dict[str, TrainSplit]:
    """Return the train utterances of each language."""
    groups, names = cast(Any, task.train.source).groups, cast(Any, task).languages
    own = groups[task.train.index]
    numbers = own.unique().tolist()
    return {names[n]: task.train.take((own == n).nonzero().flatten()) for n in numbers}


@dataclass(frozen=True, kw_only=True)
class Pathways(MaskedTraining):
    """A mask for each language, by its own gradients; languages share the weights that both keep.

    Attributes:
        emphasis: weight of absolute values beside gradients in a score; large = nearly one mask for
            all.
        reselect: weights that are gone may come back, with the values that they had; otherwise each
            mask only shrinks.
        start: ``"one"`` mask for all, which keeps everything; masks of the final sparsity by
            ``"magnitude"``, each after a training on one language; ``"random"`` ones.
    """

    name: ClassVar[str] = "pathways"
    beside: ClassVar[tuple[str, ...]] = ("one_mask_by_score", "one_mask_of_union")
    """Rows that a run of it has too."""

    emphasis: float = 0.5
    reselect: bool = False
    start: Start = "one"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, emphasis=0)
        check_choice("start", self.start, get_args(Start))
        if self.start != "one" and not self.reselect:
            msg = f"start={self.start} begins at the final sparsity: give reselect as well"
            raise ConfigError(msg)

    @property
    def finds_masks(self) -> bool:
        """Whether the first half of the epochs finds masks to begin with."""
        return self.start == "magnitude"

    def plan(self, problem: Problem) -> MaskPlan:
        """Return the plan of masks by the languages' own scores."""
        task, sparsity = problem.task, problem.budget.sparsity or 0.0
        plan = self.rising(
            task,
            sparsity,
            masks=self._first(problem, sparsity),
            reselect=self.reselect,
            group_of=cast(Any, task).group_of,
            emphasis=self.emphasis,
        )
        if self.start == "one":
            return plan
        return replace(plan, schedule=Cubic(sparsity, initial=sparsity))

    def _first(self, problem: Problem, sparsity: float) -> Mapping[str, WeightMask]:
        """Return the masks that the languages begin with."""
        if self.start == "magnitude":
            return masks_by_magnitude(self, problem)
        generator = torch.Generator().manual_seed(problem.seed)
        whole = dense_mask(unwrap(problem.task.model))
        if self.start == "one":
            return dict.fromkeys(languages_of(problem.task), whole)

        def drawn() -> WeightMask:
            shapes = {name: bits.shape for name, bits in whole.keep.items()}
            noise = {n: torch.rand(shape, generator=generator) for n, shape in shapes.items()}
            return least_mask(noise, sparsity)

        return {name: drawn() for name in languages_of(problem.task)}


def masks_by_magnitude(method: MaskedTraining, problem: Problem) -> dict[str, WeightMask]:
    """Return the mask of each language after gradual magnitude pruning on its utterances alone.

    Each begins with the given weights. All together take half of the method's epochs.
    """
    task, sparsity = problem.task, problem.budget.sparsity or 0.0
    search = OneMask(
        epochs=method.epochs // 2,
        batch_size=method.batch_size,
        lr=method.lr,
        every=method.every,
    )
    found, languages = {}, languages_of(task)
    for number, (name, train) in enumerate(languages.items()):
        part, own = part_of(problem, number, 2 * len(languages)), with_parts(task, train=train)
        network, plan = copy_network(unwrap(task.model)), search.rising(own, sparsity)
        trained = search._train(part, network, own, plan, f"{method.name}-{name}")
        found[name] = next(iter(trained.masks.values()))
    return found


@dataclass(frozen=True, kw_only=True)
class LanguageSpecific(MaskedTraining):
    """Fixed masks of languages (LSP): by magnitude on each alone, then all train together.

    Half of the epochs find the masks. Then the given weights train with them.
    """

    name: ClassVar[str] = "language_masks"

    finds_masks: ClassVar[bool] = True

    def plan(self, problem: Problem) -> MaskPlan:
        """Return the plan of fixed masks; finds them first."""
        masks = masks_by_magnitude(self, problem)
        return MaskPlan(masks=masks, group_of=cast(Any, problem.task).group_of)


@dataclass(frozen=True, kw_only=True)
class OneMask(MaskedTraining):
    """One mask for all languages, by absolute values, which only shrinks (LAP)."""

    name: ClassVar[str] = "one_mask"

    def plan(self, problem: Problem) -> MaskPlan:
        """Return the plan of one mask by magnitude."""
        return self.rising(problem.task, problem.budget.sparsity or 0.0)


@dataclass(frozen=True, kw_only=True)
class OneMaskByScore(MaskedTraining):
    """One mask by the mean of the languages' scores: what of the gain the score explains.

    Attributes:
        emphasis: weight of absolute values beside gradients in a score.
        reselect: weights that are gone may come back, with the values that they had; otherwise the
            mask only shrinks.
    """

    name: ClassVar[str] = "one_mask_by_score"
    role: ClassVar[Role] = "control"

    emphasis: float = 0.5
    reselect: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, emphasis=0)

    def plan(self, problem: Problem) -> MaskPlan:
        """Return the plan of one mask by score."""
        return self._plan(problem, problem.budget.sparsity or 0.0)

    def _plan(self, problem: Problem, sparsity: float) -> MaskPlan:
        whole = dense_mask(unwrap(problem.task.model))
        return self.rising(
            problem.task,
            sparsity,
            masks=dict.fromkeys(languages_of(problem.task), whole),
            reselect=self.reselect,
            group_of=cast(Any, problem.task).group_of,
            emphasis=self.emphasis,
            joint=True,
        )


@dataclass(frozen=True, kw_only=True)
class OneMaskOfUnion(OneMaskByScore):
    """One mask by score, as large as the union of the languages' masks: at equal stored weights.

    It keeps more than the budget asks for. Pathways train first, to tell how large the union is.

    Attributes:
        start: of the pathways.
    """

    name: ClassVar[str] = "one_mask_of_union"

    start: Start = "one"

    def __post_init__(self) -> None:
        self.pathways()  # which checks the options

    def pathways(self) -> Pathways:
        """Return the method of the same options whose union it is as large as."""
        return Pathways(**asdict(self))

    @property
    def trains_before(self) -> bool:
        """True: pathways."""
        return True

    def plan(self, problem: Problem) -> MaskPlan:
        """Return the plan of one mask by score of the union's size."""
        union = self.pathways().prune(part_of(problem, 0, 2)).mask
        return self._plan(problem, 1.0 - union.num_kept / cast(WeightMask, union).size)
