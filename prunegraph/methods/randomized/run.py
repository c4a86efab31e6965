"""A run over levels: trains, judges, keeps what is done, and tells of it."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunegraph.core.extras import Late
from prunegraph.core.seeding import derived_seed
from prunegraph.core.splits import ReadyBatches, SearchSplit, TrainSplit
from prunegraph.core.states import part_of, read_state, told_as_damage, write_state
from prunegraph.core.task import with_parts
from prunegraph.core.tensors import load_state, state_tensors
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import copy_network, unwrap
from prunegraph.layerwise.recalibrate import recalibrate_on
from prunegraph.methods.method import Problem, Result
from prunegraph.methods.randomized.draw import selection_gain
from prunegraph.training.loop import FinetuneConfig, finetune
from prunegraph.training.masked import MaskPlan

stats = Late("scipy.stats")

JUDGED = (0.8, 0.9)
"""Shares of a short training after which a candidate is judged, beside its end; the mean counts."""

MOST_ROWS = 512
"""Samples that candidates are judged on, at most."""

FEW = 3
"""Candidates below which a rank correlation says nothing."""


@dataclass
class Done:
    """What a run has done.

    Attributes:
        level: levels that are finished.
        early: losses of each level's candidates after the short training.
        final: losses of the last level's candidates after the whole training, by number.
    """

    level: int = 0
    early: list[list[float]] = field(default_factory=list)
    final: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a report tells of a method's candidates.

    Attributes:
        levels: sparsities.
        early: their losses after the short training, in each level.
        final: losses of the last level's candidates after the whole training, by number.
        rank_correlation: Spearman's, of early and final loss in the last level; None: too few.
        gain: mean final loss of the best of 1, 2, ... candidates by early loss.
    """

    levels: list[float]
    early: list[list[float]]
    final: list[float]
    rank_correlation: float | None
    gain: list[float]


@dataclass(kw_only=True)
class Selection:
    """One run; ``result`` does it.

    Attributes:
        problem: the dense network, its data, seed and folder.
        config: of each training, which is one pass over samples drawn for it.
        candidates: masks that are tried in each level.
        early: steps after which each is judged; 0: as it is.
        steps: of the whole training of a level.
        name: of the method, and of its file.
        identity: what tells the run from others.
        model: the network, changed in place.
        mask: what stays in it.
        levels: sparsities in order.
        candidate: returns what draws the masks of a level of such a sparsity.
    """

    problem: Problem
    config: FinetuneConfig
    candidates: int
    early: int
    steps: int
    name: str
    identity: dict[str, Any]
    model: nn.Module
    mask: WeightMask
    levels: tuple[float, ...]
    candidate: Callable[[float], Callable[[np.random.Generator], WeightMask]]
    done: Done = field(default_factory=Done)

    def result(self) -> Result:
        """Do what is left of the run; return the network and what there is to tell of it."""
        self._restore()
        while self.done.level < len(self.levels):
            self._run_level(self.done.level)
        self.model.eval()
        return Result(
            mask=self.mask,
            model=self.model,
            networks=sum(map(len, self.done.early)),
            details={"selection": self._record()} if self.candidates > 1 else {},
        )

    def _run_level(self, level: int) -> None:
        """Judge the candidates of a level, and train the best; in the last one all of them."""
        draw, last = self.candidate(self.levels[level]), level == len(self.levels) - 1
        masks = [draw(self._generator(level, n)) for n in range(self.candidates)]
        chosen = 0
        if len(masks) > 1:
            chosen = self._judge(level, masks)
        for number in [n for n in range(len(masks)) if n != chosen] if last else []:
            if str(number) not in self.done.final:  # the others' are compared with their early ones
                trained = self._train(level, masks[number], f"{level} final {number}")
                self.done.final[str(number)] = self._loss(trained, self._split[1])
                self._save()
        trained = self._train(level, masks[chosen], f"{level} final {chosen}")
        if last:
            self.done.final[str(chosen)] = self._loss(trained, self._split[1])
        load_state(self.model, state_tensors(trained), Path(self.name))
        self.mask = masks[chosen]
        self.done.level += 1
        self._save()

    def _judge(self, level: int, masks: list[WeightMask]) -> int:
        """Return the number of the mask of least loss after the short training."""
        if len(self.done.early) <= level:
            self.done.early.append([])
        early = self.done.early[level]
        for number in range(len(early), len(masks)):
            early.append(self._early_loss(level, masks[number]))
            self._save()
        return int(np.argmin(early))

    def _early_loss(self, level: int, mask: WeightMask) -> float:
        """Return the mean loss of a candidate at the end of the short training."""
        rows, steps = self._split[0], self.early
        model = mask.apply(self.model)
        if steps == 0:
            recalibrate_on(model, self.problem.task, self.problem.calibration)
            return self._loss(model, rows)
        losses, due = [], {max(round(share * steps), 1) for share in JUDGED} - {steps}

        def watch(epochs: float, _: float) -> None:
            if round(epochs * steps) in due:
                losses.append(self._loss(model, rows))

        self._fit(level, model, mask, steps, "early", watch=watch)
        return float(np.mean([*losses, self._loss(model, rows)]))

    def _train(self, level: int, mask: WeightMask, name: str) -> nn.Module:
        """Return the network of a mask after the whole training of a level."""
        model = copy_network(self.model)
        path = self.problem.file(f"{self.name}-training")
        name = f"{json.dumps(self.identity, sort_keys=True)} {name}"
        self._fit(level, model, mask, self.steps, "final", checkpoint=path, name=name)
        if path is not None:
            path.unlink(missing_ok=True)
        return model

    def _fit(
        self, level: int, model: nn.Module, mask: WeightMask, steps: int, what: str, **given: Any
    ) -> None:
        task, config = self.problem.task, self.config
        train = samples(task.train, steps, config.batch_size, self._seed(what, level))
        finetune(
            model,
            with_parts(task, train=train),
            config,
            seed=self._seed("order", level),
            teacher=unwrap(task.model) if config.distill_weight else None,
            masks=MaskPlan(masks=mask),
            **given,
        )

    def _loss(self, model: nn.Module, rows: SearchSplit | None) -> float:
        task = self.problem.task
        batches = [] if rows is None else task.batches(rows, 64)
        return task.measure(model, batches, autocast=task.autocast).loss

    @cached_property
    def _split(self) -> tuple[SearchSplit | None, SearchSplit | None]:
        """Search rows that candidates are judged on, and others that the whole training is."""
        search = self.problem.task.search
        if search is None or len(search) < 2:
            return search, search
        rows = search.sample(min(2 * MOST_ROWS, len(search)), self.problem.seed)
        places = torch.arange(len(rows))  # which may be in the order of the classes
        return rows.take(places[::2]), rows.take(places[1::2])

    def _seed(self, what: str, *numbers: int) -> int:
        return derived_seed(f"levels:{what}:{self.problem.seed}:{numbers}")

    def _generator(self, level: int, number: int) -> np.random.Generator:
        return np.random.default_rng(self._seed("candidate", level, number))

    def _record(self) -> dict[str, Any]:
        done, early = self.done, self.done.early[-1]
        final = [done.final[str(number)] for number in range(len(early))]
        told = len(early) >= FEW and np.ptp(early) > 0.0 and np.ptp(final) > 0.0
        record = Record(
            levels=[*self.levels],
            early=done.early,
            final=final,
            rank_correlation=float(stats.spearmanr(early, final).statistic) if told else None,
            gain=selection_gain(np.array(early), np.array(final)),
        )
        return asdict(record)

    def _save(self) -> None:
        """Write what is done, and say how far that is."""
        path = self.problem.file(self.name)
        if path is not None:
            parts = {"model": state_tensors(self.model), "mask": self.mask.packed()}
            write_state(path, "run", self.identity, asdict(self.done), parts)
        levels, others = len(self.levels), self.candidates - 1
        early = levels * self.candidates if others else 0
        done = sum(map(len, self.done.early)) + self.done.level
        done += max(len(self.done.final) - (self.done.level == levels), 0)
        percent = 100 * done // (early + levels + others)
        self.problem.tell(percent, f"level {min(self.done.level + 1, levels)} of {levels}")

    def _restore(self) -> None:
        """Go on from the file, if there is one.

        Raises:
            ArtefactError: it is damaged, or of another run.
        """
        path = self.problem.file(self.name)
        if path is None or not path.exists():
            return
        done: Done
        done, tensors = read_state(path, "run", self.identity, Done)
        begun = (done.level, done.level + 1) if self.candidates > 1 else (0,)
        with told_as_damage(path):
            mask = self.mask.unpacked(part_of(tensors, "mask"))
            if not 0 <= done.level <= len(self.levels) or len(done.early) not in begun:
                raise ValueError
        load_state(self.model, part_of(tensors, "model"), path)
        self.mask, self.done = mask, done


def samples(train: TrainSplit, steps: int, batch_size: int, seed: int) -> TrainSplit:
    """Return samples for exactly so many steps, in passes over all, each in an order of its own."""
    size = 1 if isinstance(train.source, ReadyBatches) else batch_size
    generator = torch.Generator().manual_seed(seed)
    passes = -(-steps * size // len(train))
    order = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(passes)])
    return train.take(order[: steps * size])
