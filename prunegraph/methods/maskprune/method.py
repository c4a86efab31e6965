"""MaskPrune: gates under a minimax penalty, layers of a kind with one width, weights refitted.

After Qin et al. 2025 (arXiv 2502.14008, "MaskPrune: Mask-based LLM Pruning for Layer-wise Uniform
Structures"), of which the abstract alone was at hand. Gates ``m`` on what layers read and target
shares ``s``, one for all layers of a kind, solve

    min over m, s   max over y, z >= 0   KL(dense || masked) + sum_l y_l B(m_l, s) + z gap(s)

where ``B`` is the mean square of the gates beyond the ``ceil(s n)`` first of a layer, and ``gap``
is how far the cost at ``s`` is above its target. Everything beyond this line is reconstruction.
Plain dual ascent winds up. So the target falls from 1 to its value over ``RAMP`` of the steps, and
``z`` stands beside a quadratic term (the two multipliers of Xia et al. 2024, "Sheared LLaMA",
arXiv 2310.06694, section 2.1). Gates alone close units whose work least squares cannot take over:
they are ranked by the gate and by what a unit's removal costs after least squares (``Refit``). From
``FIXED`` of the steps on the mask that meets the budget stands, weights make up for what has left,
and the weights that gates multiply, which are trained from the start, go on.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from prunegraph.core.checks import check_fields, check_range
from prunegraph.core.errors import BudgetError, PruneGraphError
from prunegraph.core.masks import BoolArray, Float64Array, FloatArray, IntArray
from prunegraph.core.precision import autocasting
from prunegraph.core.splits import Batch
from prunegraph.core.states import part_of, read_state, told_as_damage, write_state
from prunegraph.graph import StructureGraph, copy_network, evaluation_mode, unwrap
from prunegraph.graph.apply import apply_mask
from prunegraph.graph.features import rank_in_group
from prunegraph.layerwise.recalibrate import recalibrate_on
from prunegraph.layerwise.room import warn_of_few, widest
from prunegraph.methods.criteria.obs import BATCH_SIZE
from prunegraph.methods.maskprune.gates import Gates, Shares, readers_of
from prunegraph.methods.maskprune.refit import Refit
from prunegraph.methods.method import ChannelMethod, Problem, Result, check_reach
from prunegraph.tasks.batches import check_finite, num_tokens
from prunegraph.training.schedules import learning_rate_at

WHAT = "pruning"

RAMP, FIXED = 0.15, 0.2
"""Shares of the steps after which the target is reached, and the mask stands."""

GATE_STEP, MOMENTUM, MOST = 0.01, 0.9, 2.0
"""Root mean square of a step of the gates of a kind, share of the last one in it, largest gate."""

SHRINKAGE = 0.1
"""The gates beyond the target are divided by 1 + this times 1 + y in each step."""

SHARE_STEP, PULL = 0.02, 0.05
"""Step of the shares, and weight of the gates that stand at the border of the target."""

LINEAR, QUADRATIC, LAYER = 2.0, 20.0, 0.3
"""Steps of z and y, and weight of the quadratic term of the gap."""

READ = 1000
"""Values that a weight reads whose learning rate is ``lr``."""

WARMUP = 0.1
"""Share of the steps in which the learning rate of the weights rises."""

NUM_CHECKPOINTS = 10
"""How often a pruning is written to disk."""


@dataclass
class State:
    """Where a pruning stands.

    Attributes:
        shares: target share of each kind.
        layers: multiplier y of each layer.
        cost: multiplier z of the gap.
        step: steps done.
        losses: divergence from the dense network in each of them.
    """

    shares: list[float]
    layers: list[float]
    cost: float = 0.0
    step: int = 0
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class MaskPrune(ChannelMethod):
    """Learns gates together with the weights that they multiply, by the dense network's outputs.

    With ``Budget(uniform=True)`` layers of a kind get one width; else units of a kind compete over
    all layers. No label is read.

    Attributes:
        minimax: gates, shares and multipliers play the minimax game; else the shares fall evenly
            to the target, and gates beyond it shrink at a fixed rate.
        steps: batches that are trained on.
        batch_size: samples a step.
        lr: largest learning rate (AdamW) of gated weights that read 1,000 values, of others in
            inverse proportion (Yang et al. 2021, arXiv 2203.03466, table 8); 0: gates alone learn.
        refit: gates compete with what a unit's removal costs by least squares (``Refit``), and when
            the mask stands, weights make up for what left; else neither.
    """

    name: ClassVar[str] = "maskprune"
    changes_weights: ClassVar[bool] = True

    minimax: bool = True
    steps: int = 200
    batch_size: int = 4
    lr: float = 5e-4
    refit: bool = True

    def __post_init__(self) -> None:
        check_fields(self, steps=10, batch_size=1)
        check_range("lr", self.lr, 0.0, 1.0)

    def check(self, problem: Problem) -> None:
        """Say before any work what it cannot serve.

        Raises:
            BudgetError: it limits neither multiply-adds nor parameters, or gates cannot meet it.
        """
        super().check(problem)
        budget = problem.budget
        if budget.keep_macs is None and budget.keep_params is None:
            msg = f"maskprune needs keep_macs or keep_params, the budget is {budget}: give one"
            raise BudgetError(msg)
        _, groups = readers_of(unwrap(problem.task.model), problem.graph)
        check_reach(problem, groups, "maskprune has no gates for them")

    def prune(self, problem: Problem) -> Result:
        """Train gates and weights; an interrupted training goes on after its last checkpoint.

        Raises:
            PruneGraphError: the divergence from the dense network becomes NaN or infinite.
        """
        self.check(problem)
        return _Training(self, problem).run()


def _scores(graph: StructureGraph, units: IntArray, values: Float64Array) -> FloatArray:
    """Return ``[N]`` scores: those of gated units, at most 1, below all others."""
    scores = np.full(graph.num_units, 2.0, dtype=np.float32)
    scores[units] = values
    return scores


class _Training:
    """One pruning.

    Args:
        method: its options.
        problem: the network, its data and its budget.
    """

    def __init__(self, method: MaskPrune, problem: Problem) -> None:
        self.method, self.problem, self.graph = method, problem, problem.graph
        self.task, budget = problem.task, problem.budget
        self.dense = unwrap(self.task.model)
        self.model = copy_network(self.dense).eval()
        self.gates = Gates(self.model, self.graph)
        budgeted = np.array([budget.keep_macs is not None, budget.keep_params is not None])
        limits = self.graph.limits(budget)[:2]
        self.shares = Shares(self.graph, self.gates.units, limits, budgeted)
        self.pools = [
            (
                int(np.searchsorted(self.shares.kinds, kind)),
                torch.from_numpy(places).to(self.gates.values.device),
            )
            for kind, places in self.gates.of_kinds(self.graph, apart=budget.uniform)
        ]
        groups = [
            {"params": [weight], "reads": len(self.gates.places[name]) * weight[0, 0].numel()}
            for name, weight in self.gates.weights.items()
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)
        self.state = State(shares=[1.0] * len(self.shares.kinds), layers=[0.0] * len(self.pools))
        self.momentum = torch.zeros_like(self.gates.values)
        self.refit: Refit | None = None
        self.worth = torch.zeros_like(self.gates.values)
        self.path = problem.file(method.name)
        self.identity = problem.identity(
            method,
            structure=self.graph.fingerprint(),
            calibration=problem.calibration.fingerprint(),
        )
        self.standing: BoolArray | None = None

    def run(self) -> Result:
        """Train from where it stands to the end."""
        if self.path is not None and self.path.exists():
            self._read(self.path)
        method, state = self.method, self.state
        if method.refit and self.standing is None:
            self._look()
        every = max(method.steps // NUM_CHECKPOINTS, 1)
        for batch in islice(self._batches(), state.step, method.steps):
            if state.step >= FIXED * method.steps and self.standing is None:
                self._fix()
            self._step(batch)
            state.step += 1
            if self.path is not None and state.step % every == 0:
                self._write(self.path)
            told = f"step {state.step} of {method.steps}, divergence {state.losses[-1]:.3f}"
            self.problem.tell(100 * state.step // method.steps, told)
        keep = self._fix()
        mask = self.graph.mask(keep)
        details = {
            "shares": [round(share, 4) for share in state.shares],
            "beyond": float(np.mean([self._beyond(*pool)[1] for pool in self.pools])),
            "losses": [round(loss, 5) for loss in state.losses],
        }
        self.gates.fold()
        model = apply_mask(self.model, self.graph, mask)
        recalibrate_on(model, self.task, self.problem.calibration)
        return Result(mask=mask, model=model.eval(), details=details)

    def _look(self) -> None:
        """See what gated weights read in the dense network, and rank the units of each group."""
        calibration = self.problem.calibration
        tokens = len(calibration) * num_tokens(self.task.example_inputs)
        warn_of_few(tokens, widest(self.graph))
        batches = list(calibration.batches(BATCH_SIZE))
        dense = copy_network(self.dense).eval()
        self.refit = Refit(dense, self.gates.weights, batches, self.task.forward)
        errors = np.zeros(self.graph.num_units)
        errors[self.gates.units] = self.refit.errors(self.gates)
        ranks = rank_in_group(self.graph, errors)[self.gates.units]
        self.worth = torch.from_numpy(ranks).to(self.gates.values)

    def _batches(self) -> Iterator[Batch]:
        """Yield all batches from the first step on, shuffled anew in each pass."""
        split, seed, size = self.problem.calibration, self.problem.seed, self.method.batch_size
        number = 0
        while True:
            yield from self.task.batches(split, size, seed=seed + number)
            number += 1

    def _step(self, batch: Batch) -> None:
        """Move weights, gates, shares and multipliers."""
        method, state, gates = self.method, self.state, self.gates.values
        warmup = round(WARMUP * method.steps)
        rate = learning_rate_at(state.step, steps=method.steps, warmup_steps=warmup, peak=method.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * READ / group["reads"]
        batch = self.task.place(batch, self.dense)
        with autocasting(gates.device, wanted=self.task.autocast):
            with evaluation_mode(self.dense):
                wanted = self.task.forward(self.dense, batch)
            loss = self.task.divergence(self.task.forward(self.model, batch), wanted)
        if not bool(loss.isfinite()):
            check_finite(batch, "the calibration data")
            msg = (
                f"the divergence from the dense network is {float(loss.detach())} in step "
                f"{state.step + 1}: lower lr, now {method.lr:g}, or give float32 weights"
            )
            raise PruneGraphError(msg)
        self.optimizer.zero_grad()
        gates.grad = None
        loss.backward()
        if method.lr > 0.0:
            self.optimizer.step()
        state.losses.append(float(loss.detach()))
        self._move_gates()
        if self.standing is None:
            self._move_shares()

    @torch.no_grad()
    def _move_gates(self) -> None:
        """Take a step against the gradient, and shrink what lies beyond the target."""
        state, gates = self.state, self.gates.values
        assert gates.grad is not None  # the loss depends on all
        self.momentum.mul_(MOMENTUM).add_(gates.grad)
        for column in range(len(state.shares)):
            places = torch.cat([own for kind, own in self.pools if kind == column])
            moved = self.momentum[places]
            size = moved.square().mean().sqrt().clamp_min(torch.finfo(moved.dtype).tiny)
            gates[places] -= GATE_STEP * moved / size
        gates.clamp_(0.0, MOST)
        if self.standing is not None:
            gates *= self._open(self.standing)
            return
        for number, pool in enumerate(self.pools):
            beyond, _, _ = self._beyond(*pool)
            gates[beyond] /= 1.0 + SHRINKAGE * (1.0 + state.layers[number])

    def _move_shares(self) -> None:
        """Move shares and multipliers of the minimax game, or let the shares fall evenly."""
        state, method = self.state, self.method
        done = min((state.step + 1) / (RAMP * method.steps), 1.0)
        if not method.minimax:
            state.shares = self.shares.even(done).tolist()
            return
        pull, count = np.zeros(len(state.shares)), np.zeros(len(state.shares))
        for number, (kind, places) in enumerate(self.pools):
            _, beyond, border = self._beyond(kind, places)
            state.layers[number] += LAYER * beyond
            pull[kind] += state.layers[number] * border**2
            count[kind] += 1
        shares = np.array(state.shares)
        above, slopes = self.shares.gap(shares, done)
        state.cost = max(state.cost + LINEAR * above, 0.0)
        change = (state.cost + QUADRATIC * above) * slopes - PULL * pull / count
        moved = np.clip(shares - SHARE_STEP * change, self.shares.least, 1.0)
        state.shares = moved.tolist()

    def _beyond(self, kind: int, places: Tensor) -> tuple[Tensor, float, float]:
        """Return the places of a pool's gates beyond its target, their mean square, the largest."""
        count = int(np.ceil(self.state.shares[kind] * len(places) - 1e-9))
        beyond = self._ranked(places)[count:]
        if not len(beyond):
            return beyond, 0.0, 0.0
        last = self.gates.values.detach()[beyond]
        return beyond, float(last.square().mean()), float(last.max())

    def _ranked(self, places: Tensor) -> Tensor:
        """Return places of gates in the order in which they stay."""
        values = (self.gates.values.detach() + self.worth)[places]
        return places[values.argsort(descending=True, stable=True)]

    @torch.no_grad()
    def _fix(self) -> BoolArray:
        """Return the keep bits that meet the budget; from now on no other gate is open."""
        if self.standing is None:
            margin = np.zeros(len(self.gates.units))
            for kind, places in self.pools:
                rank = np.arange(len(places)) / len(places)
                margin[self._ranked(places).cpu().numpy()] = self.state.shares[kind] - rank
            scores = _scores(self.graph, self.gates.units, margin)
            self.standing = self.problem.project(scores).keep
            is_open = self._open(self.standing)
            if self.refit is None:
                self.gates.values *= is_open
            else:
                self.refit.close(self.gates, is_open)
                self.refit = None
        return self.standing

    def _open(self, keep: BoolArray) -> Tensor:
        """Return ``[K]`` 1 where the unit of a gate stays."""
        return torch.from_numpy(keep[self.gates.units]).to(self.gates.values)

    def _tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds, by name: the very tensors that training changes."""
        found = {"gates": self.gates.values, "momentum": self.momentum}
        for name, weight in self.gates.weights.items():
            found[f"weight.{name}"] = weight
            for key, value in self.optimizer.state[weight].items():
                found[f"{key}.{name}"] = value
        return found

    def _write(self, path: Path) -> None:
        standing = None if self.standing is None else torch.from_numpy(self.standing.copy())
        parts = {"own": self._tensors(), "mask": {} if standing is None else {"keep": standing}}
        write_state(path, WHAT, self.identity, dataclasses.asdict(self.state), parts)

    @torch.no_grad()
    def _read(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ArtefactError: it is damaged, or of another pruning.
        """
        told, tensors = read_state(path, WHAT, self.identity, State)
        with told_as_damage(path):
            if self.method.lr > 0.0:  # makes the averages
                for weight in self.gates.weights.values():
                    weight.grad = torch.zeros_like(weight)
                self.optimizer.step()
            saved = part_of(tensors, "own")
            for name, own in self._tensors().items():
                own.copy_(saved[name])
            standing = part_of(tensors, "mask").get("keep")
            sizes = [len(told.shares), len(told.layers), len(told.losses)]
            whole = [len(self.state.shares), len(self.state.layers), told.step]
            if sizes != whole or (standing is not None and len(standing) != self.graph.num_units):
                raise ValueError
        self.standing = None if standing is None else standing.numpy()
        self.state = told
