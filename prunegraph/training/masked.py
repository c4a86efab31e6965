"""Masks of single weights that live while a network trains: one mechanism for any optimizer.

The network always holds zeros where its mask keeps nothing. Hooks clear their gradients as soon as
backward has made them, and after a step what momentum or weight decay have moved. Where weights may
come back, the values that they had wait beside the network.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunegraph.core.checks import check_fields
from prunegraph.core.errors import ConfigError, MaskError
from prunegraph.core.splits import Batch
from prunegraph.core.states import told_as_damage
from prunegraph.core.tensors import all_but_least
from prunegraph.core.weight_mask import GroupedMask, WeightMask
from prunegraph.graph import unwrap
from prunegraph.layerwise.weights import prunable_weights
from prunegraph.training.schedules import Schedule, check_sparsities

ONE = ""
"""Name of the only group of batches, where there is one mask for all."""

GRADIENT_DECAY = 0.95
"""Of the moving average of squared gradients: it spans about twenty batches of a group."""

Masks = WeightMask | Mapping[str, WeightMask]
"""One mask, or one for each group of batches."""

Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer]
"""One optimizer, or several that train parts of a network, as Muon beside AdamW."""

SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers by their bytes."""


class MaskedWeights:
    """The masks of a network that an optimizer trains.

    Making one puts the zeros in place; from then on they hold after every ``optimizer.step()``.
    Removed weights have no gradient after ``backward``; with ``decay`` they keep it until the step.

    Args:
        model: the network; DDP and ``torch.compile`` may wrap it.
        optimizer: any of torch's, or several that together train all masked weights.
        masks: one mask, or one for each group of batches, the first of which is in use; None: all
            prunable weights stay at first.
        returns: weights may come back with the values that they had, which takes a copy of the
            weights; always so with several groups. Otherwise masks can only shrink.
        decay: of a moving average of squared gradients of each weight and group, those of weights
            that are zero too (``rms``); None: none is kept.

    Attributes:
        masks: the mask of each group.
        group: whose mask is in use.
        history: what was noted of the masks: step, then figures.

    Raises:
        MaskError: a mask does not fit the network, or groups have masks of other weights.
        ConfigError: no optimizer trains one of the masked weights that require a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        masks: Masks | None = None,
        *,
        returns: bool = False,
        decay: float | None = None,
    ) -> None:
        model = unwrap(model)
        given = dense_mask(model) if masks is None else masks
        asked: object = given
        own = list(asked.values()) if isinstance(asked, Mapping) else [asked]
        if not own or not all(isinstance(mask, WeightMask) for mask in own):
            what = type(asked).__name__
            msg = f"masks is a {what}: give a WeightMask, or a dict by group of at least one"
            raise MaskError(msg)
        self.masks = {ONE: given} if isinstance(given, WeightMask) else dict(given)
        self.group = next(iter(self.masks))
        self._parameters = self.masks[self.group].parameters_of(model)
        for mask in self.masks.values():
            mask.overlap(self.masks[self.group])  # which checks the names and shapes
        optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else [*optimizer]
        stepped = [self._names_in(each) for each in optimizers]
        self._check_trained(stepped)
        self._values: dict[str, Tensor] | None = None
        if returns or len(self.masks) > 1:
            self._values = {n: p.detach().clone() for n, p in self._parameters.items()}
        self.history: list[tuple[float, ...]] = []
        self._decay = decay
        averaged = {} if decay is None else self._parameters
        self._squares = {
            group: {n: torch.zeros_like(p, dtype=torch.float32) for n, p in averaged.items()}
            for group in self.masks
        }
        self._handles: list[Any] = []
        for each, names in zip(optimizers, stepped, strict=True):
            before = functools.partial(self._before_step, names)
            self._handles.append(each.register_step_pre_hook(before))
            after = functools.partial(self._clear_weights, names)
            self._handles.append(each.register_step_post_hook(after))
        if decay is None:  # else they are averaged first, when those of all batches are added up
            for name, parameter in self._parameters.items():
                if parameter.requires_grad:
                    clear = functools.partial(self._clear_made, name)
                    self._handles.append(parameter.register_post_accumulate_grad_hook(clear))
        self._kept: dict[str, Tensor] = {}
        self._show()

    def _names_in(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Return the masked weights that an optimizer trains."""
        held = {id(item) for group in optimizer.param_groups for item in group["params"]}
        return [name for name, parameter in self._parameters.items() if id(parameter) in held]

    def _check_trained(self, stepped: list[list[str]]) -> None:
        """Raise ConfigError if a masked weight is trained by none of the optimizers."""
        found = {name for own in stepped for name in own}
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and name not in found:
                msg = f"{name} is masked, but no given optimizer trains it: give all, or freeze it"
                raise ConfigError(msg)

    @property
    def mask(self) -> WeightMask:
        """The mask in use."""
        return self.masks[self.group]

    def use(self, group: str) -> None:
        """Put a group's mask in use, before the forward of one of its batches.

        Raises:
            MaskError: there is no such group.
        """
        self._known(group)
        if self.masks[group] is self.mask:
            self.group = group
        elif group != self.group:
            self._hide()
            self.group = group
            self._show()

    def replace(self, mask: WeightMask, group: str | None = None) -> None:
        """Give a group another mask; default: the one in use.

        Raises:
            MaskError: weights would come back that nobody has kept, it is of other weights, or
                there is no such group.
        """
        group = self._known(group)
        self.masks[group].check_shapes(mask.keep)
        if self._values is None and not mask.nested(self.masks[group]):
            msg = "weights would come back whose values are gone: give returns=True"
            raise MaskError(msg)
        if group != self.group:
            self.masks[group] = mask
            return
        self._hide()
        self.masks[group] = mask
        self._show()

    def select(
        self,
        sparsity: float,
        scores: Mapping[str, Tensor] | None = None,
        group: str | None = None,
        *,
        among_all: bool | None = None,
    ) -> None:
        """Choose a group's mask anew: so many weights of least score become zero, exactly.

        Args:
            sparsity: share of the weights that the masks name, compared over all layers.
            scores: of each weight, by parameter; default: absolute values.
            group: default: the one in use.
            among_all: whether weights that are gone compete again; default: if they can come back.

        Raises:
            ConfigError: the sparsity is none.
            MaskError: scores hold NaN or are of other weights, or there is no such group.
        """
        group = self._known(group)
        if scores is None:
            scores = {n: value.abs() for n, value in self.values().items()}
        within = self._values is None if among_all is None else not among_all
        mask = least_mask(scores, sparsity, self.masks[group] if within else None)
        self.replace(mask, group)

    def _known(self, group: str | None) -> str:
        """Return a group that there is; None: the one in use."""
        group = self.group if group is None else group
        if group not in self.masks:
            there = ", ".join(self.masks) or "one of all batches"
            msg = f"no mask for batches of {group!r}; there are: {there}"
            raise MaskError(msg)
        return group

    def values(self) -> dict[str, Tensor]:
        """Return all weights, those too that may come back; copies."""
        shown = {name: p.detach().clone() for name, p in self._parameters.items()}
        if self._values is None:
            return shown
        return {n: torch.where(self._kept[n].bool(), shown[n], self._values[n]) for n in shown}

    def rms(self, group: str) -> dict[str, Tensor]:
        """Return the root of the mean squared gradient of each weight on batches of a group."""
        return {name: square.sqrt() for name, square in self._squares[group].items()}

    def finish(self) -> dict[str, WeightMask]:
        """Let the optimizer go; return the masks.

        The network holds the weights that any group keeps, and zeros elsewhere.
        """
        for handle in self._handles:
            handle.remove()
        self._hide()
        self._show(GroupedMask.of(self.masks))
        return self.masks

    def tensors(self) -> dict[str, Tensor]:
        """Return all that ``restore`` needs beside the network's own state."""
        found = {"group": torch.tensor(list(self.masks).index(self.group))}
        for number, mask in enumerate(self.masks.values()):
            found |= {f"{number}.{name}": bits for name, bits in mask.packed().items()}
        for number, squares in enumerate(self._squares.values()):
            found |= {f"squares.{number}.{name}": square for name, square in squares.items()}
        if self.history:
            found["history"] = torch.tensor(self.history, dtype=torch.float64)
        return found | {f"values.{n}": value for n, value in (self._values or {}).items()}

    def restore(self, tensors: Mapping[str, Tensor], path: Path | str = "the checkpoint") -> None:
        """Go on from ``tensors``; the network has loaded its own state already.

        Raises:
            ArtefactError: they are damaged, or of other masks.
        """
        with told_as_damage(path):
            if (self.tensors().keys() ^ tensors.keys()) - {"history"}:
                raise KeyError  # of other groups, or weights wait where none may come back
            values = {n: self._like(n, tensors[f"values.{n}"]) for n in self._values or {}}
            masks = {
                group: mask.unpacked({n: tensors[f"{number}.{n}"].cpu() for n in mask.keep})
                for number, (group, mask) in enumerate(self.masks.items())
            }
            group = list(masks)[int(tensors["group"])]
            noted = tensors.get("history", torch.empty(0, 4)).reshape(-1, 4)
            history: list[tuple[float, ...]] = [(int(at), *row) for at, *row in noted.tolist()]
            squares = {
                name: {n: self._like(n, tensors[f"squares.{number}.{n}"]) for n in own}
                for number, (name, own) in enumerate(self._squares.items())
            }
        self.masks, self.group, self._values = masks, group, values or None
        self._squares, self.history = squares, history
        self._mark(self.mask)

    def _like(self, name: str, value: Tensor) -> Tensor:
        return torch.empty_like(self._parameters[name], dtype=value.dtype).copy_(value)

    def _mark(self, mask: WeightMask) -> None:
        """Note what a mask keeps, laid out as the weights are: all bits of an int8 set, or none."""
        kept = {name: self._like(name, bits) for name, bits in mask.keep.items()}
        self._kept = {name: bits.view(torch.int8).neg_() for name, bits in kept.items()}

    @torch.no_grad()
    def _hide(self) -> None:
        """Take the weights of the mask in use over into those that wait, if any do."""
        for name, waiting in (self._values or {}).items():
            waiting.copy_(torch.where(self._kept[name].bool(), self._parameters[name], waiting))

    @torch.no_grad()
    def _show(self, mask: WeightMask | None = None) -> None:
        """Write the weights that a mask keeps into the network, and zeros elsewhere."""
        self._mark(self.mask if mask is None else mask)
        for name, parameter in self._parameters.items():
            if self._values is not None:
                parameter.copy_(self._values[name])
            self._clear(name, parameter)

    def _clear(self, name: str, tensor: Tensor) -> None:
        """Write zeros where the mask in use keeps nothing, over what is infinite too."""
        whole = SAME_SIZE.get(tensor.element_size())
        if whole is None or tensor.is_sparse:  # complex128, or the gradient of some embeddings
            tensor.mul_(self._kept[name].bool())
        else:  # three times as fast as a product, twelve times as masked_fill_
            tensor.detach().view(whole).bitwise_and_(self._kept[name])

    def _clear_made(self, name: str, parameter: Tensor) -> None:
        """Clear a gradient that backward has just made."""
        assert parameter.grad is not None  # accumulated
        self._clear(name, parameter.grad)

    def _before_step(
        self, names: list[str], optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Clear gradients before a step, or after its closure has made them."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._clear_gradients(names, optimizer)
            return None

        def clearing() -> Any:
            loss = closure()
            self._clear_gradients(names, optimizer)
            return loss

        return (args[0], clearing, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}

    @torch.no_grad()
    def _clear_gradients(self, names: list[str], optimizer: Any) -> None:
        """Average the squares of gradients, if that is asked for, and clear them."""
        for name in names:
            gradient = self._parameters[name].grad
            if gradient is None:
                continue
            if self._decay is not None:
                average = self._squares[self.group][name]
                average.lerp_(gradient.float().square(), 1.0 - self._decay)
            self._clear(name, gradient)

    @torch.no_grad()
    def _clear_weights(self, names: list[str], *_: Any) -> None:
        """Clear what a step has moved."""
        for name in names:
            self._clear(name, self._parameters[name])


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskPlan:
    """How the masks of a training change; ``finetune(..., masks=MaskPlan(...))``.

    By default the weights of least absolute value go, in all layers together. With ``emphasis``
    those of each group do that count least for it: ``|w| (f / mean f + emphasis)``, f the root of
    the mean squared gradient of the masked weight on batches of the group.

    Attributes:
        masks: what they are at first; see ``MaskedWeights``. Without a schedule they stay.
        schedule: sparsity by step.
        every: masks are chosen anew in every so many steps.
        until: first step from which on they stay; None: never.
        reselect: weights that are gone compete again, and come back with the values they had.
        group_of: returns whose mask a batch is trained with; needed with several masks.
        emphasis: on absolute values beside gradients, at least 0; None: absolute values alone.
        joint: groups have one mask, by the mean of their scores.

    Raises:
        ConfigError: the parts contradict each other.
    """

    masks: Masks | None = None
    schedule: Schedule | None = None
    every: int = 1
    until: int | None = None
    reselect: bool = False
    group_of: Callable[[Batch], str] | None = None
    emphasis: float | None = None
    joint: bool = False

    def __post_init__(self) -> None:
        several = not isinstance(self.masks, WeightMask | None)
        if several != (self.group_of is not None):
            msg = "several masks need group_of, which says whose mask a batch takes; one takes none"
            raise ConfigError(msg)
        check_fields(self, every=1)
        if self.reselect and self.schedule is None:
            msg = "reselect=True needs a schedule: it says how many weights stay"
            raise ConfigError(msg)

    @classmethod
    def holding(cls, mask: WeightMask, task: Any) -> "MaskPlan":
        """Return the plan in which a mask stays as it is; of several groups each its own."""
        if isinstance(mask, GroupedMask):
            return cls(masks=mask.groups, group_of=task.group_of)
        return cls(masks=mask)

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> MaskedWeights:
        """Put the zeros in place."""
        decay = None if self.emphasis is None else GRADIENT_DECAY
        return MaskedWeights(model, optimizer, self.masks, returns=self.reselect, decay=decay)

    def begin(self, masked: MaskedWeights, step: int, batch: Batch) -> None:
        """Choose masks anew if it is time, and put that of a batch in use; before its forward."""
        due = step % self.every == 0 and (self.until is None or step < self.until)
        due = due and (step > 0 or self.masks is None)  # those that were given are used first
        if self.schedule is not None and due:
            self._select(masked, self.schedule(step))
            masked.history.append((step, *agreement(masked.masks)))
        if self.group_of is not None:
            masked.use(self.group_of(batch))

    def resume(self, masked: MaskedWeights, step: int) -> None:
        """Choose the masks of the last choice before a step, where weights alone were kept.

        Zeros are the weights of least absolute value.
        """
        before = step if self.until is None else min(step, self.until)
        last = (before - 1) // self.every * self.every
        if self.schedule is not None and last >= (0 if self.masks is None else self.every):
            self._select(masked, self.schedule(last))

    def _select(self, masked: MaskedWeights, sparsity: float) -> None:
        """Choose the masks of all groups anew."""
        groups = list(masked.masks)
        if not self.reselect and sparsity <= masked.mask.sparsity:
            return
        sizes = {name: value.abs() for name, value in masked.values().items()}
        if not self.joint:
            for group in groups:
                scores = self._scores(sizes, masked, group)
                masked.select(sparsity, scores, group, among_all=self.reselect)
            return
        total = self._scores(sizes, masked, groups[0])
        for group in groups[1:]:
            for name, score in self._scores(sizes, masked, group).items():
                total[name] = total[name] + score
        masked.select(sparsity, total, among_all=self.reselect)
        for group in groups:
            masked.masks[group] = masked.mask

    def _scores(
        self, sizes: Mapping[str, Tensor], masked: MaskedWeights, group: str
    ) -> dict[str, Tensor]:
        """Return how much each weight counts for a group."""
        if self.emphasis is None:
            return dict(sizes)
        rms = masked.rms(group)
        mean = sum(float(f.sum()) for f in rms.values()) / sum(f.numel() for f in rms.values())
        if mean == 0.0:  # before the group's first batch
            return dict(sizes)
        return {name: size * (rms[name] / mean + self.emphasis) for name, size in sizes.items()}

    def record(self) -> dict[str, Any]:
        """Return what tells the plan from others, as JSON values."""
        masks = {ONE: self.masks} if isinstance(self.masks, WeightMask | None) else self.masks
        return {
            "masks": {name: mask and mask.digest() for name, mask in masks.items()},
            "schedule": repr(self.schedule),
            "every": [self.every, self.until],
            "reselect": self.reselect,
            "score": [self.emphasis, self.joint],
        }


def agreement(masks: Mapping[str, WeightMask]) -> tuple[float, float, float]:
    """Return how alike masks of groups are.

    Returns:
        Mean density of a mask, density of their union, and the mean over pairs of the share that
        both keep (``WeightMask.overlap``; 1 of a single mask).
    """
    own = list(masks.values())
    if len({id(mask) for mask in own}) == 1:
        return own[0].density, own[0].density, 1.0
    union = GroupedMask.of(masks)
    shared = [one.overlap(other) for one, other in itertools.combinations(own, 2)]
    return sum(m.density for m in own) / len(own), union.density, sum(shared) / len(shared)


def dense_mask(model: nn.Module) -> WeightMask:
    """Return the mask that keeps all weights which may be pruned."""
    shapes = {name: weight.shape for name, weight in prunable_weights(model).items()}
    return WeightMask({name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()})


def least_mask(
    scores: Mapping[str, Tensor], sparsity: float, within: WeightMask | None = None
) -> WeightMask:
    """Return the mask without the weights of least score, over all layers, exactly so many.

    Args:
        scores: of each weight by parameter.
        sparsity: share of all weights that is gone; in all ``round(sparsity * number)``.
        within: mask whose zeros stay; if it has more than were asked for, it is the result.

    Raises:
        ConfigError: the sparsity does not lie in [0, 1).
        MaskError: scores hold NaN, or are of other weights than the mask.
    """
    check_sparsities(sparsity)
    values = {name: scores[name].detach().float().cpu() for name in sorted(scores)}
    gone = 0
    if within is not None:
        within.check_shapes(values)
        values = {n: v.masked_fill(~within.keep[n], -torch.inf) for n, v in values.items()}
        gone = within.size - within.num_kept
    flat = torch.cat([value.flatten() for value in values.values()])
    if bool(flat.min().isnan()):  # the minimum takes NaN over
        name = next(name for name, value in values.items() if bool(value.isnan().any()))
        msg = f"weights or scores of {name} hold NaN: lower the learning rate, or repair them"
        raise MaskError(msg)
    keep = all_but_least(flat, max(round(sparsity * len(flat)), gone))
    pieces = zip(values.items(), keep.split([v.numel() for v in values.values()]), strict=True)
    return WeightMask({name: bits.reshape(v.shape).clone() for (name, v), bits in pieces})
