"""Whether the agent learned something that no baseline has, by a rule fixed before the numbers.

The verdict is a function of a report's rows alone, so that ``verify`` can recompute it.
"""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

import numpy as np

from prunegraph.core.extras import Late
from prunegraph.core.masks import Float64Array
from prunegraph.core.task import Task
from prunegraph.methods.method import Role

stats = Late("scipy.stats")

Metric = Literal["test_accuracy_recalibrated", "test_accuracy_finetuned"]

AGENT = "agent"
"""The name of the trained agent's rows."""

PRIOR = "prior"
"""The name of the row of what an untrained policy starts from, alone: a control."""

SAMPLER = "sampler"
"""The name of the rows of the agent's sampler with learning rate 0: a baseline."""

DENSE = "dense"
"""The name of the control rows that are not pruned."""

PERCENT = ("accuracy", "word error rate")
"""Scores that are shares: people read them in percent."""

MIN_SEEDS = 3
"""Search seeds below which a verdict would be noise."""

MAX_REPAIRED = 0.10
"""Average share of repaired bits above which the agent did not learn the budget."""

MAX_CHANCE = 0.05
"""Of so large a difference where there is none; above it nothing was shown."""

ROUNDING = 1e-9
"""Standard errors below it are rounding: the differences are the same."""

MIN_ROWS = 8
"""Rows below which a rank correlation says nothing."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What is told of a mask that a method chose, before any fine-tune.

    Attributes:
        name: the method.
        role: what it says of itself; of what the agent's search began with a control.
        searches: whether it runs as many networks as it may.
        seed: its search seed; the run's for a method that depends on neither images nor chance.
        networks_evaluated: pruned networks run to find the mask; of the agent's search of a family,
            on all of its networks.
        search_accuracy: on the search split, after recalibration.
        seconds: wall time of the choice, on as many threads as the method had, with what it was the
            first to measure of the dense network; None where it was not taken.
        beginning: whether it is what the agent's search began with, which it must beat.
        bytes_up: bytes that the clients of a federation sent; None without a federation.
        bytes_down: bytes that its server sent.
    """

    name: str
    role: Role
    searches: bool
    seed: int
    networks_evaluated: int
    search_accuracy: float
    seconds: float | None = None
    beginning: bool = False
    bytes_up: int | None = None
    bytes_down: int | None = None

    def told(self) -> dict[str, Any]:
        """Return these values by name, without those of what is more than this."""
        return {field.name: getattr(self, field.name) for field in fields(Chosen)}


@dataclass(frozen=True, kw_only=True)
class MethodRow(Chosen):
    """One pruned network of one method and seed.

    Attributes:
        macs: multiply-adds of the pruned network.
        params: parameters of the pruned network.
        test_accuracy_recalibrated: on the test split, after recalibration.
        test_accuracy_finetuned: on the test split, after fine-tuning; None if it was not.
        digest: name of the mask.
        finetune_seed: seed of the fine-tune; None if there was none.
        cell: folder with the fine-tuned network, in the run folder; None if there is none.
        memory: bytes of activations alive at once; None where the budget does not limit them.
        sparsity: share of the prunable weights that are zero; None where channels are cut out.

    The accuracies are utilities, higher = better: of a task whose score is no accuracy the score
    itself, of an error minus the error. ``report.json`` holds scores in the task's own unit.
    """

    macs: int
    params: int
    test_accuracy_recalibrated: float
    test_accuracy_finetuned: float | None
    digest: str
    finetune_seed: int | None = None
    cell: str | None = None
    memory: int | None = None
    sparsity: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain values, those first by which people look it up."""
        first = ("name", "seed", "macs", "params", *ACCURACIES, "networks_evaluated")
        return {name: getattr(self, name) for name in first} | asdict(self)

    @property
    def last(self) -> float:
        """The test accuracy after the fine-tune, where there is one."""
        tuned = self.test_accuracy_finetuned
        return self.test_accuracy_recalibrated if tuned is None else tuned


@dataclass(frozen=True, kw_only=True)
class Unit:
    """How a task's scores are written; in memory they are utilities under names of accuracies.

    Attributes:
        name: of the score: accuracy, perplexity, ...
        higher_is_better: False for errors.
    """

    name: str = "accuracy"
    higher_is_better: bool = True

    @classmethod
    def of_task(cls, task: Task) -> Self:
        """Return the unit of a task."""
        return cls(name=task.score_name, higher_is_better=task.higher_is_better)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Self:
        """Return the unit of a report."""
        return cls(name=content["score_name"], higher_is_better=content["higher_is_better"])

    def score(self, utility: float) -> float:
        """Return a score from a utility, and the other way round."""
        return utility if self.higher_is_better else -utility

    def key(self, name: str) -> str:
        """Return what a report calls a figure: accuracies are scores where the task has none."""
        return name if self.name == "accuracy" else name.replace("accuracy", "score")

    def written(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return figures by name as a report holds them."""
        return {self.key(name): self._turned(name, value) for name, value in values.items()}

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return figures of a report as they are in memory."""
        names = {self.key(name): name for name in (*ACCURACIES, *DENSE_ACCURACIES)}
        found = {names.get(key, key): value for key, value in values.items()}
        return {name: self._turned(name, value) for name, value in found.items()}

    def _turned(self, name: str, value: Any) -> Any:
        known = name in (*ACCURACIES, *DENSE_ACCURACIES) and isinstance(value, int | float)
        return self.score(value) if known else value

    @property
    def scale(self) -> float:
        """What a score is multiplied by where people read it: shares are percent."""
        return 100.0 if self.name in PERCENT else 1.0

    @property
    def label(self) -> str:
        """What an axis of scores is called."""
        return f"test {self.name}{', %' * (self.scale > 1.0)}"

    @property
    def plural(self) -> str:
        """The scores' name, of several."""
        return "accuracies" if self.name == "accuracy" else f"{self.name} scores"

    def shown(self, utility: float) -> float:
        """Return a score as people read it."""
        return self.scale * self.score(utility)

    def words(self, utility: float, digits: int = 1) -> str:
        """Return a score with its sign of percent."""
        return f"{self.shown(utility):.{digits}f}{' %' * (self.scale > 1.0)}"

    def difference(self, utility: float) -> str:
        """Return how much higher one utility is than another, in words."""
        points = "points" if self.name in PERCENT else f"{self.name} better"
        return f"{self.scale * utility:+.2f} {points}"

    def text(self, utility: float, digits: int = 2) -> str:
        """Return a score as a table shows it: shares in percent."""
        return f"{self.shown(utility):.{digits}f}"


ACCURACY = Unit()
"""Of classifiers."""


ACCURACIES = ("search_accuracy", "test_accuracy_recalibrated", "test_accuracy_finetuned")
"""The scores of a row."""

DENSE_ACCURACIES = ("test_accuracy", "test_accuracy_finetuned")
"""Those of the dense network."""


def is_agent(part: Chosen) -> bool:
    """Return whether a row is the agent's."""
    return part.role == "agent"


def is_control(part: Chosen) -> bool:
    """Return whether a row is a control: dense, what the agent began with, or at its widths."""
    return part.role == "control"


def is_baseline(part: Chosen) -> bool:
    """Return whether a row competes with the agent."""
    return part.role == "baseline"


def is_rival(part: Chosen) -> bool:
    """Return whether the agent must beat a row: a baseline's, or what its search began with."""
    return is_baseline(part) or part.beginning


def is_method(part: Chosen) -> bool:
    """Return whether a row is of what a run may end with."""
    return is_agent(part) or is_rival(part)


def pruned_rows(rows: Sequence[MethodRow], digest: str) -> list[MethodRow]:
    """Return the rows of the network that a run ends with.

    The agent's with this mask; where no agent searched, those of the baselines with it.
    """
    own = [row for row in rows if row.digest == digest and not is_control(row)]
    return [row for row in own if is_agent(row)] or own


def column(rows: Sequence[MethodRow], name: str) -> list[float]:
    """Return a method's known values of a column, one a search or, fine-tuned ones, one a row.

    A mask that was fine-tuned with several seeds has a row of each, the same but for the fine-tune.
    """
    tuned = name == "test_accuracy_finetuned"
    values = {number if tuned else row.seed: getattr(row, name) for number, row in enumerate(rows)}
    return [value for value in values.values() if value is not None]


def mean_by_name(rows: Sequence[MethodRow], name: str) -> dict[str, float]:
    """Return each method's mean of a column, of those that have one."""
    methods: dict[str, list[MethodRow]] = {}
    for row in rows:
        methods.setdefault(row.name, []).append(row)
    columns = {method: column(own, name) for method, own in methods.items()}
    return {method: float(np.mean(values)) for method, values in columns.items() if values}


def ranked(chosen: Sequence[Chosen], names: Collection[str]) -> list[str]:
    """Return those of the methods that chose masks, the best mean search accuracy first."""
    found: dict[str, dict[int, float]] = {}
    for item in chosen:
        if item.name in names:
            found.setdefault(item.name, {})[item.seed] = item.search_accuracy
    means = {name: statistics.mean(values.values()) for name, values in found.items()}
    return sorted(means, key=lambda name: (-means[name], name))


def best_baseline(chosen: Sequence[Chosen]) -> str | None:
    """Return what the agent must beat: the highest mean search accuracy over its searches, or None.

    A baseline, or the policy that the search began with: whatever that can do was not learned.
    """
    return next(iter(ranked(chosen, {item.name for item in chosen if is_rival(item)})), None)


def by_seed(rows: Sequence[MethodRow], name: str, metric: Metric) -> dict[int, float]:
    """Return a method's mean of ``metric`` for each seed that has one.

    The seed is that of the fine-tune where the metric is about it, else that of the search.
    """
    values: dict[int, list[float]] = {}
    for row in rows:
        value = getattr(row, metric)
        if row.name == name and value is not None:
            tuned = metric == "test_accuracy_finetuned" and row.finetune_seed is not None
            seed = row.finetune_seed if tuned else row.seed
            assert seed is not None
            values.setdefault(seed, []).append(value)
    return {seed: float(np.mean(column)) for seed, column in values.items()}


def judge(
    rows: Sequence[MethodRow],
    metric: Metric,
    *,
    repaired: float | None = None,
    unit: Unit = ACCURACY,
) -> tuple[str | None, str]:
    """Return the verdict and its reason.

    LEARNED when the agent's mean ``metric`` is above that of the best baseline (``best_baseline``)
    by more than two standard errors of the paired difference over at least three seeds, and
    Student's one-sided test agrees (p < 0.05: with three seeds 2.9 standard errors; where all
    differences are the same, the sign test, which five can pass); else NOT LEARNED; None with fewer
    fine-tunes, or masks of fewer searches. A deterministic baseline's value is paired with
    every seed.

    Args:
        rows: the rows of a comparison.
        metric: the column to judge by.
        repaired: mean share of free bits that repair flipped; above 10 % nothing was learned.
        unit: of the scores, for the reason.
    """
    measured = [row for row in rows if getattr(row, metric) is not None]
    agent = sorted({row.name for row in measured if is_agent(row)})
    best = best_baseline(measured)
    if not agent or best is None:
        return None, "no verdict: it needs rows of the agent and of a baseline"
    ours, theirs = by_seed(measured, agent[0], metric), by_seed(measured, best, metric)
    differences = np.array(_paired(ours, theirs))
    if len(differences) < MIN_SEEDS:
        few = f"{len(differences)} seed(s)"
        return None, f"no verdict: {few}, a verdict needs at least {MIN_SEEDS}"
    mean = float(differences.mean())
    error = float(differences.std(ddof=1) / math.sqrt(len(differences)))
    error = 0.0 if error < ROUNDING else error
    counted = _counted(measured, agent[0], len(differences))
    reason = (
        f"{agent[0]} minus {best} (best baseline on the search split): "
        f"{unit.difference(mean)} of {unit.key(metric)} over {counted}, "
        f"two standard errors {unit.scale * 2 * error:.2f}, "
    )
    if error:
        chance = float(stats.ttest_1samp(differences, 0.0, alternative="greater").pvalue)
        reason += f"p = {chance:.3f}"
    else:
        chance = 0.5 ** len(differences) if mean > 0 else 1.0
        reason += f"all differences the same, p = {chance:.3f} by their signs"
        if len({row.digest for row in measured if row.name == agent[0]}) == 1:
            return None, f"no verdict: one mask, measured once: {reason}"
    if len({row.seed for row in measured if row.name == agent[0]}) < MIN_SEEDS:
        return None, f"no verdict: it tells of these masks, not of the methods: {reason}"
    if repaired is not None and repaired > MAX_REPAIRED:
        return "NOT LEARNED", f"{reason}; {100 * repaired:.0f} % of the bits were repaired"
    learned = mean > 2 * error and mean > 0 and chance < MAX_CHANCE
    return ("LEARNED" if learned else "NOT LEARNED"), reason


def _counted(rows: Sequence[MethodRow], name: str, count: int) -> str:
    """Return what differences were counted over, in words."""
    own = [row for row in rows if row.name == name]
    searches, masks = len({row.seed for row in own}), len({row.digest for row in own})
    if searches == 1 < len(own):
        return f"{count} fine-tunes of one mask each"
    return f"{count} seeds" + (", which ended at one mask" if masks == 1 else "")


VERDICTS = {
    "LEARNED": "the agent beats the best baseline by more than chance",
    "NOT LEARNED": "the agent is not shown to beat the best baseline; take whichever suits",
}
"""What a verdict of a report means to people."""


def verdict_line(content: Mapping[str, Any]) -> str:
    """Return a report's verdict in words; the reason alone, which says so, if there is none."""
    verdict, reason = content["verdict"], str(content["verdict_reason"])
    return (
        reason
        if verdict is None
        else f"verdict: {VERDICTS.get(verdict, verdict)} ({verdict}: {reason})"
    )


def _paired(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    if len(theirs) == 1:
        value = next(iter(theirs.values()))
        return [ours[seed] - value for seed in sorted(ours)]
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def proxy_correlation(rows: Sequence[MethodRow]) -> float | None:
    """Return Spearman's correlation of search accuracy with test accuracy after fine-tuning.

    Over ``proxy_points``; None under eight of them, or where one side is constant.
    """
    means = proxy_points(rows)
    if len(means) < MIN_ROWS or np.ptp(means[:, 0]) == 0 or np.ptp(means[:, 1]) == 0:
        return None
    return float(stats.spearmanr(means[:, 0], means[:, 1]).statistic)


def each_cell_once(rows: Sequence[MethodRow]) -> list[MethodRow]:
    """Return the rows without those whose fine-tune another one before them shares."""
    cells = {row.cell or f"none {number}": number for number, row in reversed([*enumerate(rows)])}
    return [rows[number] for number in sorted(cells.values())]


def proxy_points(rows: Sequence[MethodRow]) -> Float64Array:
    """Return ``[masks, 2]`` search accuracy and test accuracy after fine-tuning of every mask.

    Means over its fine-tuning seeds; the dense control is left out.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for row in each_cell_once(rows):
        if row.test_accuracy_finetuned is not None and row.name != DENSE:
            pair = (row.search_accuracy, row.test_accuracy_finetuned)
            points.setdefault(row.digest, []).append(pair)
    return np.array([np.mean(pairs, axis=0) for pairs in points.values()])
