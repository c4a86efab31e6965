"""Masks in the training loops of others: callbacks for transformers and for Lightning."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from prunegraph.core.errors import ConfigError
from prunegraph.core.extras import library
from prunegraph.core.weight_mask import WeightMask
from prunegraph.models.pretrained import transformers
from prunegraph.training.masked import MaskedWeights, MaskPlan

Log = Callable[[int, Mapping[str, float]], object]
"""Called with the number of a step and figures by name: what any tracker takes."""

KEPT = "prunegraph.masks"
"""Where the state of an optimizer holds the masks, beside that of its parameters."""


class LoopMasks:
    """The masks of a plan in the training loop of someone else.

    They are a part of the optimizer's state dict, so whoever keeps and loads that one goes on with
    the same masks, averages of gradients and removed weights that wait.

    Args:
        plan: one mask, or none and a schedule of the sparsity (``Levels([(500, 0.5)])`` prunes at
            step 500).
        log: see ``Log``; None = nothing is told.

    Attributes:
        masked: the masks while the network trains; None before.
    """

    def __init__(self, plan: MaskPlan, log: Log | None = None) -> None:
        if plan.group_of is not None:
            msg = "these loops hide their batches, and masks of groups go by them: use pg.finetune"
            raise ConfigError(msg)
        self.plan, self.tracker = plan, log  # Lightning sets an attribute log
        self.masked: MaskedWeights | None = None
        self._step: int | None = None
        self._loaded = False

    def attach(self, model: nn.Module, optimizer: Any) -> None:
        """Put the zeros in place, or go on with those that the optimizer has loaded.

        Raises:
            ConfigError: it has loaded the masks of another plan.
        """
        while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # what wraps it, as accelerate does, is taken off
        state: dict[Any, Any] = optimizer.state
        plan, loaded = self.plan, state.pop(KEPT, None)
        if loaded is not None:
            if loaded["plan"] != self._identity():
                msg = "the masks in the checkpoint are of another plan: give the plan they had"
                raise ConfigError(msg)
            if plan.masks is not None:  # the network holds what later masks have kept
                assert isinstance(plan.masks, WeightMask)  # of no groups
                bits = {n: torch.ones_like(keep) for n, keep in plan.masks.keep.items()}
                plan = replace(plan, masks=WeightMask(bits))
        self.masked, self._step = plan.attach(model, optimizer), None
        self._loaded = loaded is not None
        if loaded is not None:
            self.masked.restore(loaded["masks"])
        self._keeping = optimizer.register_state_dict_post_hook(self._keep)

    def _identity(self) -> str:
        """Return what tells the masks of the plan from those of others."""
        record = self.plan.record()
        return repr([record[part] for part in ("masks", "reselect", "score")])

    def _keep(self, _optimizer: Any, state: dict[str, Any]) -> None:
        """Add the masks to a state dict of the optimizer."""
        assert self.masked is not None  # attached
        state["state"][KEPT] = {"plan": self._identity(), "masks": self.masked.tensors()}

    def begin(self, step: int) -> None:
        """Choose the mask anew if it is time; before the forward of each batch of a step."""
        assert self.masked is not None  # attached
        if step == self._step:  # another batch whose gradients are added up
            return
        if self._step is None and not self._loaded:
            self._go_on(self.masked, step)
        self._step = step
        self.plan.begin(self.masked, step, None)

    def _go_on(self, masked: MaskedWeights, step: int) -> None:
        """Find the masks before a step in the weights, of which nothing else was kept."""
        if step > 0 and (self.plan.reselect or self.plan.emphasis is not None):
            msg = (
                "the checkpoint holds no masks, as its optimizer was not saved: removed weights "
                "and averages of gradients start anew"
            )
            warnings.warn(msg, stacklevel=2)
        self.plan.resume(masked, step)

    def tell(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Tell a tracker the figures of a step that are numbers, and the sparsity."""
        if self.tracker is not None and self.masked is not None:
            figures = {name: float(v) for name, v in metrics.items() if isinstance(v, int | float)}
            self.tracker(step, figures | {"sparsity": self.masked.mask.sparsity})

    def finish(self) -> None:
        """Let the optimizer go; the network keeps its zeros."""
        if self.masked is not None:
            self._keeping.remove()
            self.masked.finish()


def trainer_callback(plan: MaskPlan, *, log: Log | None = None) -> Any:
    """Return a callback for the ``Trainer`` of transformers.

    Zeros hold after every step. The masks are a part of the trainer's checkpoints, with the
    optimizer: a training that goes on from one ends with the same weights.

    Args:
        plan: of the masks; see ``LoopMasks``.
        log: called whenever the trainer logs, with its figures and the sparsity.

    Returns:
        A ``TrainerCallback``; its ``masked`` are the masks.

    Raises:
        ConfigError: transformers is not installed, or the plan has masks of groups.
    """

    class PruneCallback(transformers().TrainerCallback, LoopMasks):  # type: ignore[misc]  # Any
        def on_train_begin(self, _args: Any, _state: Any, _control: Any, **given: Any) -> None:
            self.attach(given["model"], given["optimizer"])

        def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            self.begin(state.global_step)

        def on_log(self, _args: Any, state: Any, _control: Any, **given: Any) -> None:
            self.tell(state.global_step, given["logs"])

        def on_train_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
            self.finish()

    return PruneCallback(plan, log)


def lightning_callback(plan: MaskPlan, *, log: Log | None = None) -> Any:
    """Return a callback for the ``Trainer`` of Lightning, with one optimizer.

    Args:
        plan: of the masks; see ``LoopMasks``.
        log: called after every batch, with the figures that the module has logged and the sparsity.

    Returns:
        A ``Callback``; its ``masked`` are the masks.

    Raises:
        ConfigError: Lightning is not installed, or the plan has masks of groups.
    """

    class PruneCallback(_lightning().Callback, LoopMasks):  # type: ignore[misc]  # Any
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.attach(module, trainer.optimizers[0])

        def on_train_batch_start(self, trainer: Any, _module: Any, _batch: Any, _at: int) -> None:
            self.begin(trainer.global_step)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            figures = {name: value.item() for name, value in trainer.callback_metrics.items()}
            self.tell(trainer.global_step, figures)

        def on_train_end(self, _trainer: Any, _module: Any) -> None:
            self.finish()

    return PruneCallback(plan, log)


def _lightning() -> Any:
    return library("this needs", "pytorch-lightning", "lightning")
