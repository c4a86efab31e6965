"""The trial that ends an analysis: prune parts of every group, in rounds, and compare.

Sizes written as numbers in the user's forward (``F.pad(.., 16, 16)``, ``view(b, 512)``) cannot be
told from computed ones in one run. A slim network that raises, or whose output differs from the
zero-masked one, names the groups that must stay whole.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from prunegraph.core.errors import first_line
from prunegraph.core.masks import BoolArray, IntArray
from prunegraph.graph.graph import FrozenOp, Group, StructureGraph
from prunegraph.graph.late_weights import SMALL, cast_network
from prunegraph.graph.proof.outputs import as_finite, difference_of
from prunegraph.graph.proof.subjects import ERRORS, Subject, run_in_training
from prunegraph.graph.surgery import Factors, apply_mask, zero_mask
from prunegraph.graph.trace.calls import tensors_in

SUSPICIOUS = 1e-5
"""From this difference on, relative to the largest values of the output, float64 decides."""

SHALLOW, DEEP = 50, 10
"""Of more operations rounding makes a larger difference, as many times, but for at most these."""

EXACT, ROUGH = 1e-8, 1e-3
"""Largest accepted difference in float64, and where the forward cannot run in float64."""

HALF = {torch.float16, torch.bfloat16}
"""Types with too few digits to compare by: networks of these are tried in float32."""

ILL_CONDITIONED = 1e-2
"""Where float32 and float64 differ by more, the last digits decide the first: ROUGH is exact."""

NUDGE = 1 + 2**-46
"""What the small parameters of a network in float64 are multiplied by, to change last digits."""

DIFFERS = "the pruned forward computes something else than the masked one"

BOLD_ROUND, LEAST_ROUND = 1, 3
"""In which weights are those, and in which each group keeps its minimum alone, see ``_parts``."""

NARROW = 8
"""Of so few channels, rounds leave one or two, of which a norm over them makes constants or signs:
errors in what comes before may not show. One more round keeps such channels whole.
"""

Parts = list[tuple[Group, IntArray]]
"""Groups, each with the units of it to remove."""


def _next_numbers(
    own: list[int], removable: int, seen: Counter[tuple[int, int]], kind: tuple[int, int]
) -> tuple[int, int]:
    """Return how many units the next group of a kind loses in the first and the third round."""
    while True:
        later, now = divmod(seen[kind], len(own))
        seen[kind] += 1
        first, third = min(removable, own[now]), min(removable, own[later % len(own)])
        if first % 2 or third % 2 or kind[0] % 2 or not removable:
            return first, third


def _parts(groups: list[Group], rng: np.random.Generator) -> list[tuple[IntArray, ...]]:
    """Return what each group loses in each round: its minimum always stays.

    1. A random part. Groups of one size lose numbers that differ here or in the third round, so
       that no two sizes agree by chance: the index among them, written to the base of how many
       numbers there are, gives both. Where but one can go, that is one or none. An odd number
       goes in some round, since a forward may ask for an even width.
    2. The others, because a channel that the forward names (``x[:, -1]``) shows only where it is
       removed. With the first round, each unit is removed once.
    3. The first channels: where the forward treats a share of them otherwise (``x[:, : c // 4]``),
       random parts leave the border right by chance.
    4. All but the minimum, as no other mask does: ``squeeze()`` takes an axis of one away, and
       sizes of different groups that agreed by chance differ.
    5. All but as many of each, where the minima are not: a forward may compare widths.
    """
    most = max((group.min_keep for group in groups), default=0)
    numbers: dict[tuple[int, int], list[int]] = {}
    seen: Counter[tuple[int, int]] = Counter()
    parts: list[tuple[IntArray, ...]] = []
    for group in groups:
        size = len(group.units)
        removable = max(size - group.min_keep, 0)
        kind = size, removable
        if kind not in numbers:
            choices = np.arange(max(1, round(0.2 * size)), max(1, round(0.7 * size)) + 1)
            numbers[kind] = [1, 0] if removable == 1 else rng.permutation(choices).tolist()
        own = numbers[kind]
        first, third = _next_numbers(own, removable, seen, kind)
        in_order = np.sort(group.units)
        units = rng.permutation(group.units) if first else in_order
        last, same = in_order[size - removable :], in_order[most:]
        parts.append((units[:first], units[first:][:removable], in_order[:third], last, same))
    return parts


def _narrow_units(model: nn.Module, graph: StructureGraph) -> IntArray:
    """Return the units of the axes of ``NARROW`` or fewer channels that are normalised."""
    axes = [units for means in graph.means.values() for units, _ in means]
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
            axes += graph.param_units.get(f"{path}.weight", {}).values()
    return np.concatenate([*(axis.ravel() for axis in axes if axis.size <= NARROW), []])


def _is_narrow(graph: StructureGraph, group: Group, units: IntArray) -> bool:
    """Return whether a group has some of these units, and no layer gives it more channels."""
    return bool(np.isin(group.units, units).any()) and all(
        np.isin(op.out_units, group.units).sum() <= NARROW for op in graph.ops
    )


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a forward cannot follow a mask.

    Attributes:
        reason: in words.
        module: path of the module in whose forward it fails; None if it runs, but wrongly.
    """

    reason: str
    module: str | None = None


def failing_frame(
    model: nn.Module, error: BaseException
) -> tuple[str, traceback.FrameSummary] | None:
    """Return the path of the innermost module that an error comes from, and the line there."""
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if id(owner) in names and code.co_name not in {"_wrapped_call_impl", "_call_impl"}:
            found = names[id(owner)], traceback.FrameSummary(code.co_filename, line, code.co_name)
    return found


def _failed(network: nn.Module, error: BaseException, when: str = "") -> Failure:
    """Return that a pruned network's forward raised an error, and where."""
    frame = failing_frame(network, error)
    reason = f"{when}the forward needs its full width: {first_line(error)}"
    if frame is None:
        return Failure(reason=reason)
    path, line = frame
    where = f"{path or type(network).__name__}, line {line.lineno} of {Path(line.filename).name}"
    return Failure(reason=f"{reason} ({where}: {line.line})", module=path)


class _Outputs:
    """What a network gives with channels removed, or silenced; one copy of it lives at a time.

    Args:
        subject: the network.
        graph: its structure.
        keep: which units stay.
        factors: what its values are multiplied by.
    """

    def __init__(
        self, subject: Subject, graph: StructureGraph, keep: BoolArray, factors: Factors | None
    ) -> None:
        self._subject, self._graph, self._mask = subject, graph, graph.mask(keep)
        self._factors = factors
        half = any(parameter.dtype in HALF for parameter in subject.model.parameters())
        self._dtype = torch.float32 if half else None
        self._network = subject.model

    def copied(self, surgery: Callable[..., nn.Module]) -> nn.Module:
        """Return a new copy; the last one goes before."""
        model, lately = self._subject.model, self._subject.lately
        self._network = model
        self._network = surgery(
            model, self._graph, self._mask, lately=lately, factors=self._factors
        )
        return self._network

    def _of(self, surgery: Callable[..., nn.Module], dtype: torch.dtype | None) -> list[Tensor]:
        network = self.copied(surgery)
        if dtype is not None:
            cast_network(network, dtype, lately=self._subject.lately)
        return [tensor.clone() for tensor in tensors_in(self._subject.run(network, dtype))]

    def pruned(self) -> list[Tensor] | Failure:
        """Return the outputs of the pruned network, in float32 or its own precision."""
        try:
            return self._of(apply_mask, self._dtype)
        except ERRORS as error:
            if self._dtype is None:
                return _failed(self._network, error)
            self._dtype = None
        return self.pruned()

    def masked(self) -> list[Tensor] | Failure:
        """Return those of the network with silent channels, in the same precision."""
        try:
            return self._of(zero_mask, self._dtype)
        except ERRORS as error:
            return Failure(reason=f"the forward fails on channels of zeros: {first_line(error)}")

    def are_chance(self) -> bool:
        """Return whether last digits decide what the masked network gives, even in float64.

        A forward that takes the largest scores chooses among equal ones so: where each group keeps
        its minimum, a norm over one channel makes all positions alike.
        """
        try:
            given = self._of(zero_mask, torch.float64)
            for parameter in self._network.parameters():
                if parameter.is_floating_point() and parameter.numel() <= SMALL:
                    parameter.data.mul_(NUDGE)
            nudged = tensors_in(self._subject.run(self._network, torch.float64))
        except ERRORS:
            return False
        return difference_of(nudged, given) > ROUGH

    def agree(self, slim: list[Tensor], zero: list[Tensor]) -> bool:
        """Return whether the two are equal, in float64 if need be."""
        limit = SUSPICIOUS * min(max(1.0, len(self._graph.ops) / SHALLOW), DEEP)
        difference = difference_of(slim, zero)
        if difference > limit:
            try:
                double = [self._of(surgery, torch.float64) for surgery in (apply_mask, zero_mask)]
                chaotic = difference_of(slim, double[0]) > ILL_CONDITIONED
                difference, limit = difference_of(*double), ROUGH if chaotic else EXACT
            except ERRORS:  # a forward that casts to float32 itself
                limit = ROUGH
        return difference <= limit


def failure_of(
    subject: Subject,
    graph: StructureGraph,
    keep: BoolArray,
    *,
    least: bool = False,
    training: bool = False,
    bold: bool = False,
) -> Failure | None:
    """Return why the forward cannot follow a mask, or None if it can.

    Args:
        subject: the network.
        graph: its structure.
        keep: which units stay.
        least: a masked network says nothing whose outputs are finite elsewhere than the whole
            one's, or by chance as they are.
        training: the pruned network must run in training mode, if the whole one does.
        bold: weights are larger, if the whole network gives finite outputs with these.
    """
    factors = subject.factors if bold else None
    outputs = _Outputs(subject, graph, keep, factors)
    failure, is_finite = _compared(outputs, subject, least=least)
    if factors and (failure or not is_finite) and not subject.is_sound_if_bold:
        return failure_of(subject, graph, keep, least=least, training=training)
    if failure is None and training:
        slim = outputs.copied(apply_mask)
        try:
            run_in_training(slim, subject.run)
        except ERRORS as error:
            return _failed(slim, error, "in training mode ") if subject.can_train else None
    if failure is not None and failure.reason == DIFFERS:
        drawn = difference_of(*(subject.outputs(seed) for seed in (0, 1)))
        if drawn > SUSPICIOUS:
            reason = "the forward draws random numbers in eval mode, other ones if pruned"
            return Failure(reason=reason)
    return failure


def _compared(outputs: _Outputs, subject: Subject, *, least: bool) -> tuple[Failure | None, bool]:
    """Return how a pruned network differs from the masked one, and whether both are finite."""
    slim = outputs.pruned()
    if isinstance(slim, Failure):
        return slim, True
    zero = outputs.masked()
    if isinstance(zero, Failure):
        return zero, True
    is_finite = all(bool(torch.isfinite(t).all()) for t in (*slim, *zero))
    if [t.shape for t in slim] != [t.shape for t in zero]:
        return Failure(reason="the forward's output changes its shape"), is_finite
    if least and not is_finite:
        whole = subject.outputs()
        if not as_finite(slim, whole):
            reason = "the forward needs more than one channel for finite outputs"
            return Failure(reason=reason), is_finite
        if not as_finite(zero, whole):
            return None, is_finite
    follows = outputs.agree(slim, zero) or (least and outputs.are_chance())
    return None if follows else Failure(reason=DIFFERS), is_finite


class Trial:
    """Removes parts of every group of a network, in rounds; finds what cannot be removed.

    Args:
        subject: the network.
        graph: its structure.

    Attributes:
        failure: why a round could not be followed; None if all could.
    """

    def __init__(self, subject: Subject, graph: StructureGraph) -> None:
        rng = np.random.default_rng(0)
        self._subject, self._graph = subject, graph
        self._found: list[tuple[Group, Failure]] = []
        self.failure: Failure | None = None
        groups = [group for group in graph.groups if group.frozen is None]
        rounds: list[Parts] = [
            [*zip(groups, lost, strict=True)] for lost in zip(*_parts(groups, rng), strict=True)
        ]
        if len({group.min_keep for group in groups}) == 1:
            del rounds[LEAST_ROUND + 1 :]  # the last would be like the one before
        narrow = _narrow_units(subject.model, graph)
        first = rounds[0] if groups else []
        others = [part for part in first if not _is_narrow(graph, part[0], narrow)]
        if 0 < len(others) < len(groups):
            rounds.append(others)
        for self._number, self._parts in enumerate(rounds):
            self._keep = np.ones(graph.num_units, dtype=bool)
            self.failure = self._try(self._parts)
            if self.failure is not None:
                break

    @property
    def least(self) -> bool:
        """Whether it was the one in which each group keeps its minimum alone."""
        return self._number == LEAST_ROUND

    def literal_sizes(self, failure: Failure) -> list[tuple[Group, FrozenOp]]:
        """Return the groups that the forward cannot lose, with the reason; by bisection.

        Where some fail in modules of the unit in which ``failure`` happened, those alone: others
        may have fixes.
        """
        self._bisect(self._parts, failure)
        same = [item for item in self._found if self._kind(item[1]) is self._kind(failure)]
        return [
            (group, FrozenOp(op="trial", module=group.name, reason=found.reason))
            for group, found in same or self._found
        ]

    def _kind(self, failure: Failure) -> type | None:
        """Return the class of the module that a failure came from."""
        path = failure.module
        return None if path is None else type(self._subject.model.get_submodule(path))

    def _try(self, parts: Parts) -> Failure | None:
        """Remove parts of groups on top of what is removed already, if the forward can follow."""
        trial = self._keep.copy()
        for _, removed in parts:
            trial[removed] = False
        failure = failure_of(
            self._subject,
            self._graph,
            trial,
            least=self.least,
            training=self._number == 0,
            bold=self._number == BOLD_ROUND,
        )
        if failure is None:
            self._keep = trial
        return failure

    def _bisect(self, parts: Parts, failure: Failure) -> None:
        """Remove what can go of ``parts``, which together cannot."""
        if len(parts) == 1:
            self._found.append((parts[0][0], failure))
            return
        middle = len(parts) // 2
        first = self._try(parts[:middle])
        if first is not None:
            self._bisect(parts[:middle], first)
        # with the first half gone as a whole, all of ``parts`` is what failed before
        second = failure if first is None else self._try(parts[middle:])
        if second is not None:
            self._bisect(parts[middle:], second)
