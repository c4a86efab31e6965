"""Masks of single weights that live while a network trains: one mechanism for any optimizer.

The network always holds zeros where its mask keeps nothing. Gradients and steps do not reach them:
hooks of the optimizer clear the gradients before a step, and what momentum or weight decay have
moved after it. Where weights may come back, the values that they had wait beside the network.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunegraph.core.errors import ArtefactError, ConfigError, MaskError
from prunegraph.core.masks import from_bytes, to_bytes
from prunegraph.core.splits import Batch
from prunegraph.core.tensors import all_but_least
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import unwrap
from prunegraph.layerwise.weights import prunable_weights
from prunegraph.training.schedules import Schedule

ONE = ""
"""Name of the only group of batches, where there is one mask for all."""

Masks = WeightMask | Mapping[str, WeightMask]
"""One mask, or one for each group of batches."""


class MaskedWeights:
    """The masks of a network that an optimizer trains.

    Making one puts the zeros in place; from then on they hold after every ``optimizer.step()``.

    Args:
        model: the network; DDP and ``torch.compile`` may wrap it.
        optimizer: any of torch's.
        masks: one mask, or one for each group of batches, the first of which is in use; None: all
            prunable weights stay at first.
        returns: weights may come back with the values that they had, which takes a copy of the
            weights; always so with several groups. Otherwise masks can only shrink.

    Attributes:
        masks: the mask of each group.
        group: whose mask is in use.

    Raises:
        MaskError: a mask does not fit the network, or groups have masks of other weights.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        masks: Masks | None = None,
        *,
        returns: bool = False,
    ) -> None:
        model = unwrap(model)
        given = dense_mask(model) if masks is None else masks
        self.masks = {ONE: given} if isinstance(given, WeightMask) else dict(given)
        self.group = next(iter(self.masks))
        self._parameters = self.masks[self.group].parameters_of(model)
        for mask in self.masks.values():
            mask.overlap(self.masks[self.group])  # which checks the names and shapes
        self._values: dict[str, Tensor] | None = None
        if returns or len(self.masks) > 1:
            self._values = {n: p.detach().clone() for n, p in self._parameters.items()}
        self._handles = [
            optimizer.register_step_pre_hook(self._clear_gradients),
            optimizer.register_step_post_hook(self._clear_weights),
        ]
        self._gone: dict[str, Tensor] = {}
        self._show()

    @property
    def mask(self) -> WeightMask:
        """The mask in use."""
        return self.masks[self.group]

    def use(self, group: str) -> None:
        """Put a group's mask in use, before the forward of one of its batches.

        Raises:
            MaskError: there is no such group.
        """
        if group not in self.masks:
            msg = f"no mask for batches of {group!r}; there are: {', '.join(self.masks)}"
            raise MaskError(msg)
        if group != self.group:
            self._hide()
            self.group = group
            self._show()

    def replace(self, mask: WeightMask, group: str | None = None) -> None:
        """Give a group another mask; default: the one in use.

        Raises:
            MaskError: weights would come back that nobody has kept, or it is of other weights.
        """
        group = self.group if group is None else group
        if not mask.nested(self.masks[group]) and self._values is None:
            msg = "weights would come back whose values are gone: give returns=True"
            raise MaskError(msg)
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
        """
        group = self.group if group is None else group
        scores = (
            {n: value.abs() for n, value in self.values().items()} if scores is None else scores
        )
        within = self._values is None if among_all is None else not among_all
        mask = least_mask(scores, sparsity, self.masks[group] if within else None)
        self.replace(mask, group)

    def values(self) -> dict[str, Tensor]:
        """Return all weights, those too that may come back; copies."""
        shown = {name: p.detach().clone() for name, p in self._parameters.items()}
        if self._values is None:
            return shown
        return {n: torch.where(self._gone[n], self._values[n], shown[n]) for n in shown}

    def finish(self) -> dict[str, WeightMask]:
        """Let the optimizer go; return the masks.

        The network holds the weights that any group keeps, and zeros elsewhere.
        """
        for handle in self._handles:
            handle.remove()
        if len(self.masks) > 1:
            names = self._parameters
            keep = {n: torch.stack([m.keep[n] for m in self.masks.values()]).any(0) for n in names}
            self._hide()
            self._show(WeightMask(keep))
        return self.masks

    def tensors(self) -> dict[str, Tensor]:
        """Return all that ``restore`` needs beside the network's own state."""
        found = {"group": torch.tensor(list(self.masks).index(self.group))}
        for number, mask in enumerate(self.masks.values()):
            for name, bits in mask.keep.items():
                found[f"{number}.{name}"] = torch.from_numpy(to_bytes(bits.flatten().numpy()))
        return found | {f"values.{n}": value for n, value in (self._values or {}).items()}

    def restore(self, tensors: Mapping[str, Tensor], path: Path | str = "the checkpoint") -> None:
        """Go on from ``tensors``; the network has loaded its own state already.

        Raises:
            ArtefactError: they are damaged, or of other masks.
        """
        try:
            masks = {}
            values = {n: self._like(n, tensors[f"values.{n}"]) for n in self._values or {}}
            for number, (group, mask) in enumerate(self.masks.items()):
                packed = {n: tensors[f"{number}.{n}"].cpu().numpy() for n in mask.keep}
                sizes = {n: bits.shape for n, bits in mask.keep.items()}
                keep = {n: from_bytes(packed[n], sizes[n].numel()) for n in packed}
                bits = {n: torch.from_numpy(keep[n]).reshape(sizes[n]) for n in keep}
                masks[group] = WeightMask(bits, mask.pattern)
            group = list(masks)[int(tensors["group"])]
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            msg = f"{path}: its masks are damaged or others: delete the file to start over"
            raise ArtefactError(msg) from error
        self.masks, self.group, self._values = masks, group, values or None
        self._mark(self.mask)

    def _like(self, name: str, value: Tensor) -> Tensor:
        return torch.empty_like(self._parameters[name], dtype=value.dtype).copy_(value)

    def _mark(self, mask: WeightMask) -> None:
        """Note where a mask keeps nothing, laid out as the weights are."""
        self._gone = {name: self._like(name, ~bits) for name, bits in mask.keep.items()}

    @torch.no_grad()
    def _hide(self) -> None:
        """Take the weights of the mask in use over into those that wait, if any do."""
        for name, waiting in (self._values or {}).items():
            waiting.copy_(torch.where(self._gone[name], waiting, self._parameters[name]))

    @torch.no_grad()
    def _show(self, mask: WeightMask | None = None) -> None:
        """Write the weights that a mask keeps into the network, and zeros elsewhere."""
        self._mark(self.mask if mask is None else mask)
        for name, parameter in self._parameters.items():
            if self._values is not None:
                parameter.copy_(self._values[name])
            parameter.masked_fill_(self._gone[name], 0.0)

    @torch.no_grad()
    def _clear_gradients(self, *_: Any) -> None:
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(self._gone[name], 0.0)

    @torch.no_grad()
    def _clear_weights(self, *_: Any) -> None:
        for name, parameter in self._parameters.items():
            parameter.masked_fill_(self._gone[name], 0.0)


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskPlan:
    """How the masks of a training change; ``finetune(..., masks=MaskPlan(...))``.

    Attributes:
        masks: what they are at first; see ``MaskedWeights``. Without a schedule they stay.
        schedule: sparsity by step; the weights of least absolute value go, in all layers together.
        every: masks are chosen anew in every so many steps.
        until: first step from which on they stay; None: never.
        reselect: weights that are gone compete again, and come back with the values they had.
        group_of: returns whose mask a batch is trained with; needed with several masks.

    Raises:
        ConfigError: the parts contradict each other.
    """

    masks: Masks | None = None
    schedule: Schedule | None = None
    every: int = 1
    until: int | None = None
    reselect: bool = False
    group_of: Callable[[Batch], str] | None = None

    def __post_init__(self) -> None:
        several = not isinstance(self.masks, WeightMask | None)
        if several != (self.group_of is not None):
            msg = "several masks need group_of, which says whose mask a batch takes; one takes none"
            raise ConfigError(msg)
        if self.every < 1:
            msg = f"every={self.every} must be at least 1 step"
            raise ConfigError(msg)
        if self.reselect and self.schedule is None:
            msg = "reselect=True needs a schedule: it says how many weights stay"
            raise ConfigError(msg)

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> MaskedWeights:
        """Put the zeros in place."""
        return MaskedWeights(model, optimizer, self.masks, returns=self.reselect)

    def begin(self, masked: MaskedWeights, step: int, batch: Batch) -> None:
        """Choose masks anew if it is time, and put that of a batch in use; before its forward."""
        due = step % self.every == 0 and (self.until is None or step < self.until)
        if self.schedule is not None and due:
            sparsity = self.schedule(step)
            for group, mask in masked.masks.items():
                if self.reselect or sparsity > mask.sparsity:
                    masked.select(sparsity, group=group, among_all=self.reselect)
        if self.group_of is not None:
            masked.use(self.group_of(batch))

    def record(self) -> dict[str, Any]:
        """Return what tells the plan from others, as JSON values."""
        masks = {ONE: self.masks} if isinstance(self.masks, WeightMask | None) else self.masks
        return {
            "masks": {name: mask and mask.digest() for name, mask in masks.items()},
            "schedule": repr(self.schedule),
            "every": [self.every, self.until],
            "reselect": self.reselect,
        }


def dense_mask(model: nn.Module) -> WeightMask:
    """Return the mask that keeps all weights which may be pruned."""
    shapes = {name: weight.shape for name, weight in prunable_weights(model).items()}
    return WeightMask({name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()})


def least_mask(
    scores: Mapping[str, Tensor], sparsity: float, within: WeightMask | None = None
) -> WeightMask:
    """Return the mask without the weights of least score, over all layers, exactly so many.

    Args:
        scores: of each weight by parameter, not negative.
        sparsity: share of all weights that is gone; in all ``round(sparsity * number)``.
        within: mask whose zeros stay; if it has more than were asked for, it is the result.
    """
    alive = {} if within is None else within.keep
    parts = []
    for name in sorted(scores):
        score = scores[name].detach().float().cpu()
        parts.append((score if within is None else score.masked_fill(~alive[name], -1.0)).flatten())
    flat = torch.cat(parts)
    gone = 0 if within is None else within.size - within.num_kept
    keep = all_but_least(flat, max(round(sparsity * len(flat)), gone))
    pieces = keep.split([len(part) for part in parts])
    shaped = zip(sorted(scores), pieces, strict=True)
    return WeightMask({name: bits.reshape(scores[name].shape).clone() for name, bits in shaped})
