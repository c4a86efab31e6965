"""The training loop of fine-tuning and pretraining: one fixed recipe, resumable, bit-equal.

The recipe (``docs/method.md``): batches of 128, SGD with Nesterov momentum 0.9, weight decay 5e-4,
a cosine to zero a step at a time, the split's own augmentation, bfloat16 autocast, the last epoch.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, distributed, nn

from prunegraph.core.checks import check_choice, check_fields, check_positive, check_range
from prunegraph.core.errors import ConfigError, DataError, ModelError, PruneGraphError
from prunegraph.core.precision import autocasting
from prunegraph.core.seeding import derived_seed, seeded
from prunegraph.core.splits import Batch, ReadyBatches, TrainSplit
from prunegraph.core.task import Task
from prunegraph.core.tensors import parameter_digest
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import evaluation_mode, unwrap
from prunegraph.layerwise.recalibrate import recalibrate_bn
from prunegraph.tasks.batches import check_finite
from prunegraph.tasks.classification import model_device
from prunegraph.tasks.outputs import loss_and_outputs
from prunegraph.training.checkpoint import Done, TrainingState
from prunegraph.training.distributed import Ranks, SharedBatchNorm
from prunegraph.training.kernels import SoundConvolutions
from prunegraph.training.lora import adapters
from prunegraph.training.masked import MaskPlan
from prunegraph.training.optimizers import Optimizer, make_optimizer
from prunegraph.training.schedules import learning_rate_at
from prunegraph.training.slimmable import Subnets

LONG_TRAINING = 100
"""From this many epochs on the peak learning rate is that of training from scratch."""

SHORT_PEAK_LR = 0.02
LONG_PEAK_LR = 0.1

DISTILL_TEMPERATURE = 4.0
"""Divides both logits where a teacher's are learned (Hinton et al. 2015, section 2)."""

NUM_RECALIBRATION = 2048
"""Train images that recalibrate batch norm after slimmable training."""

CHECKPOINT_SECONDS = 300.0
"""Within a longer epoch a checkpoint is written as often as this."""

Progress = Callable[[int, int, float, float], None]
"""Called after every epoch as ``progress(epochs done, epochs, mean loss, seconds so far)``."""

Watch = Callable[[float, float], None]
"""Called after every other step as ``watch(epochs done, mean loss of the epoch so far)``."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How a network is trained.

    Attributes:
        epochs: passes over the split; 0 leaves the network as it is.
        batch_size: samples a step; batches of a user's loader stay as they are.
        peak_lr: highest learning rate; None = 0.02 below 100 epochs, else 0.1.
        warmup_epochs: epochs over which the learning rate rises to its peak.
        optimizer: ``"sgd"``, or ``"adamw"`` (arXiv 1711.05101), without which language models learn
            little.
        autocast: run in bfloat16 where that is safe and the device computes it.
        distill_weight: share of the loss in [0, 1] that is the distance to a teacher's outputs.
        lora_rank: of matrices that train in the weights' place (``adapters``); 0 = none.
    """

    epochs: int
    batch_size: int = 128
    peak_lr: float | None = None
    warmup_epochs: float = 0.0
    optimizer: Optimizer = "sgd"
    autocast: bool = True
    distill_weight: float = 0.0
    lora_rank: int = 0

    def __post_init__(self) -> None:
        check_fields(self, epochs=0, batch_size=2, warmup_epochs=0, lora_rank=0)
        check_range("distill_weight", self.distill_weight, 0.0, 1.0)
        check_positive("peak_lr", self.learning_rate)
        check_choice("optimizer", self.optimizer, get_args(Optimizer))

    @property
    def learning_rate(self) -> float:
        """The peak learning rate in effect."""
        if self.peak_lr is not None:
            return self.peak_lr
        return LONG_PEAK_LR if self.epochs >= LONG_TRAINING else SHORT_PEAK_LR


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a training did.

    Attributes:
        losses: mean training loss of every epoch.
        seconds: training time, that before a resume included.
        resumed_epochs: epochs that were read from a checkpoint.
        masks: the masks that it ended with, by group of batches (``MaskedWeights.finish``).
        history: of each choice of masks its step, and how alike they were (``agreement``).
    """

    losses: tuple[float, ...]
    seconds: float
    resumed_epochs: int
    masks: Mapping[str, WeightMask] = field(default_factory=dict)
    history: Sequence[tuple[float, ...]] = ()


def finetune(
    model: nn.Module,
    task: Task,
    config: FinetuneConfig,
    *,
    seed: int,
    teacher: nn.Module | None = None,
    checkpoint: Path | str | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
    ranks: Ranks | None = None,
    subnets: Subnets | None = None,
    name: str | None = None,
    masks: MaskPlan | None = None,
) -> FinetuneResult:
    """Train a network in place on a task's train split and leave it in eval mode.

    It lies as the task lays networks out: channels last for images if it can run so.

    With a checkpoint the state is written after every epoch and every ``CHECKPOINT_SECONDS`` in
    between, and an equal call continues from it; on a CPU with the same number of threads the
    result is bit-equal to an uninterrupted one.

    Args:
        model: the network, the task's own or a part of it, on the device where it shall be trained.
        task: gives train split, loss and, with a teacher, the distance of outputs.
        config: the recipe.
        seed: fixes order, augmentation and dropout.
        teacher: network whose outputs are learned too, with ``config.distill_weight``.
        checkpoint: where the state is kept, or None.
        progress: called after every epoch.
        watch: called after every other step; it must leave network and torch's generator alone.
        ranks: processes that train together, each with an equal call on its own device: every batch
            is shared among them, with the order and augmentation of one process. Rank 0 reads and
            writes the checkpoint. Dropout draws anew in each.
        subnets: every step trains another of these parts of the network; at the end the whole
            one's batch norm is recalibrated on ``NUM_RECALIBRATION`` images.
        name: tells the network from others in the checkpoint; default: a digest of its weights,
            which another number of threads may change in their last digits if they were computed.
        masks: which single weights are zero, and how that changes.

    Returns:
        Losses and times.

    Raises:
        ArtefactError: the checkpoint is damaged or of another training.
        ConfigError: a teacher without ``distill_weight`` or the reverse; LoRA without peft; two of
            subnets, masks and LoRA.
        PruneGraphError: the task is none; the loss becomes NaN or infinite.
    """
    if not isinstance(getattr(task, "train", None), TrainSplit):
        msg = f"{type(task).__name__} is no task: make one with prunegraph.tasks"
        raise DataError(msg)
    if (teacher is None) != (config.distill_weight == 0.0):
        msg = f"distill_weight={config.distill_weight} needs a teacher, and a teacher a weight > 0"
        raise ConfigError(msg)
    if config.epochs == 0 and subnets is None:
        model.eval()
        return FinetuneResult(losses=(), seconds=0.0, resumed_epochs=0)
    if (subnets is not None) + (masks is not None) + (config.lora_rank > 0) > 1:
        msg = "subnets, masks of weights and lora_rank exclude one another: give one of them"
        raise ConfigError(msg)
    plan: object = masks
    if not isinstance(plan, MaskPlan | None):
        msg = f"masks is a {type(plan).__name__}: give MaskPlan(masks=...) of it"
        raise ConfigError(msg)
    if ranks is not None and not ranks.first:
        checkpoint = None
    rank = config.lora_rank
    with adapters(unwrap(model), rank, seed) if rank else nullcontext():
        run = _Training(model, task, config, seed, teacher, ranks, subnets, name, masks)
        resumed_epochs = run.begin(None if checkpoint is None else Path(checkpoint))
        run.train_epochs(progress, watch)
    model.eval()
    if subnets is not None:
        run.recalibrate()
    return FinetuneResult(
        losses=tuple(run.done.losses),
        seconds=run.done.seconds,
        resumed_epochs=resumed_epochs,
        masks={} if run.masked is None else run.masked.finish(),
        history=() if run.masked is None else run.masked.history,
    )


@dataclass(eq=False)
class _Training:
    """One training: network, optimizer, what was done so far."""

    model: nn.Module
    task: Task
    config: FinetuneConfig
    seed: int
    teacher: nn.Module | None
    ranks: Ranks | None
    subnets: Subnets | None
    name: str | None
    masks: MaskPlan | None

    def __post_init__(self) -> None:
        model, config = self.model, self.config
        self.train = train = self.task.train
        trainable = {n: p for n, p in unwrap(model).named_parameters() if p.requires_grad}
        self.trainable = trainable
        if not trainable:
            msg = "no weight of the network requires a gradient: unfreeze those to be trained"
            raise ModelError(msg)
        self.optimizer = make_optimizer(config.optimizer, trainable.values(), config.learning_rate)
        size = 1 if isinstance(train.source, ReadyBatches) else config.batch_size
        full, rest = divmod(len(train), size)
        self.steps_per_epoch = full + (rest > 1)  # batch norm cannot train on one image
        if self.steps_per_epoch == 0:
            msg = f"{len(train)} training samples are too few: at least 2 are needed"
            raise ConfigError(msg)
        self.task.place_model(unwrap(model), model_device(model))
        identity = {
            "config": asdict(config),
            "seed": self.seed,
            "images": train.fingerprint(),
            "network": self.name or parameter_digest(unwrap(model)),
            "teacher": None if self.teacher is None else parameter_digest(self.teacher),
            "subnets": None if self.subnets is None else self.subnets.digest(),
            "masks": None if self.masks is None else self.masks.record(),
        }
        self.masked = None if self.masks is None else self.masks.attach(model, self.optimizer)
        self.state = TrainingState(
            model=unwrap(model),
            trainable=trainable,
            optimizer=self.optimizer,
            identity=identity,
            steps_per_epoch=self.steps_per_epoch,
            masked=self.masked,
        )

    @property
    def done(self) -> Done:
        """What was done so far."""
        return self.state.done

    def begin(self, checkpoint: Path | None) -> int:
        """Continue from a checkpoint if there is one, and return the epochs that it had done."""
        self.checkpoint = checkpoint
        if checkpoint is not None and checkpoint.exists():
            self.state.restore(checkpoint)
        self._join_ranks()
        self.saved = time.monotonic()
        return len(self.done.losses)

    def train_epochs(self, progress: Progress | None, watch: Watch | None) -> None:
        """Run the epochs that are left."""

        def after_step(loss: float) -> None:
            if time.monotonic() - self.saved >= CHECKPOINT_SECONDS:
                self.save()
            if watch is not None:
                watch(len(losses) + self.done.step / self.steps_per_epoch, loss)

        losses = self.done.losses
        while len(losses) < self.config.epochs:
            self.train_epoch(after_step)
            self.save()
            if progress is not None:
                progress(len(losses), self.config.epochs, losses[-1], self.done.seconds)

    def save(self) -> None:
        """Write the checkpoint, if one is kept."""
        if self.checkpoint is not None:
            generators = self._generator_states() if self.done.step > 0 else {}
            self.state.write(self.checkpoint, generators)
        self.saved = time.monotonic()

    def _join_ranks(self) -> None:
        """Take over what rank 0 has restored, and share the batches from now on."""
        if self.ranks is None:
            return
        states = [self.optimizer.state[item] for item in self.trainable.values()]
        counts = [{k: v if k == "step" else None for k, v in state.items()} for state in states]
        begun = self.ranks.agree((self.done, self.state.generators, counts))
        self.state.done, self.state.generators, counts = begun
        for item, state, known in zip(self.trainable.values(), states, counts, strict=True):
            for key, count in known.items():
                state.setdefault(key, torch.empty_like(item) if count is None else count)
                if count is None:
                    distributed.broadcast(state[key], src=0)
        if self.masked is not None:
            self.masked.restore(self.ranks.agree(self.masked.tensors()))
        self.model = self.ranks.wrap(unwrap(self.model))

    def train_epoch(self, after_step: Callable[[float], None]) -> None:
        """Run the next epoch, or the rest of one, and call a function after all steps but the last.

        Args:
            after_step: called with the mean loss of the epoch so far.
        """
        done = self.done
        begun = time.perf_counter() - done.seconds
        epoch = len(done.losses)
        self.model.train()
        self.augmentation = self._generator(epoch, "augmentation")
        batches = self.train.batches(
            self.config.batch_size,
            shuffle=self._generator(epoch, "order"),
            augment=self.augmentation,
            skip=done.step,
        )
        shared = nullcontext() if self.ranks is None else SharedBatchNorm()
        with self._seeded(epoch), shared:
            self._restore_generators()
            for batch in islice(batches, self.steps_per_epoch - done.step):
                done.total += self._step(epoch, done.step, batch)
                done.step += 1
                done.seconds = time.perf_counter() - begun
                if done.step < self.steps_per_epoch:
                    after_step(done.total / done.step)
        done.losses.append(done.total / self.steps_per_epoch)
        done.step, done.total = 0, 0.0

    def _step(self, epoch: int, step: int, batch: Batch) -> float:
        number = epoch * self.steps_per_epoch + step
        if self.masks is not None and self.masked is not None:
            self.masks.begin(self.masked, number, batch)
        rate = learning_rate_at(
            number,
            steps=self.config.epochs * self.steps_per_epoch,
            warmup_steps=round(self.config.warmup_epochs * self.steps_per_epoch),
            peak=self.config.learning_rate,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        weight = 1.0
        if self.ranks is not None:
            batch, weight = self.ranks.share(batch)
        network, part = self.model, None
        if self.subnets is not None:
            drawn = self._derived_seed(epoch, f"subnet {step}")
            part = self.subnets.cut(unwrap(self.model), drawn)
            network = part.model
        with SoundConvolutions():
            loss = self._loss(network, self.task.place(batch, network))
            value = float(loss.detach() if self.ranks is None else self.ranks.mean(loss, weight))
            if not math.isfinite(value):
                check_finite(batch, "the train data")
                msg = (
                    f"the training loss is {value} in epoch {epoch + 1}, step {step + 1}: lower "
                    f"the learning rate, now {self.config.learning_rate:g}, or check the weights"
                )
                raise PruneGraphError(msg)
            self.optimizer.zero_grad(set_to_none=True)
            if self.ranks is not None:
                loss = loss * (weight * self.ranks.size)  # the ranks' gradients are averaged
            loss.backward()  # here as well, for layers that are computed anew
        if part is not None:
            part.hand_back()
            if self.ranks is not None:  # parts are not wrapped
                self.ranks.average_gradients(self.trainable.values())
        self.optimizer.step()
        return value

    def recalibrate(self) -> None:
        """Measure the batch norm of the whole network, which no step has run."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self.seed))
        order = order[:NUM_RECALIBRATION]  # a split's own order may be that of the classes
        num_batches = max(1, len(order) // self.config.batch_size)  # none of a single image
        model, taken = unwrap(self.model), self.train.take(order)
        recalibrate_bn(
            model,
            taken.equal_batches(num_batches),
            forward=self.task.forward,
            autocast=self._autocast,
        )

    @property
    def _autocast(self) -> bool:
        return self.config.autocast and self.task.autocast

    def _loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the task's loss, mixed with the distance to the teacher if there is one."""
        with autocasting(model_device(network), wanted=self._autocast):
            if self.teacher is None:
                return self.task.loss(network, batch)
            loss, outputs = loss_and_outputs(self.task.loss, network, batch)
            with evaluation_mode(self.teacher):
                wanted = self.task.forward(self.teacher, batch)
        weight = self.config.distill_weight
        distance = self.task.divergence(outputs, wanted, DISTILL_TEMPERATURE)
        return (1.0 - weight) * loss + weight * distance

    def _generator(self, epoch: int, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(self._derived_seed(epoch, purpose))

    def _derived_seed(self, epoch: int, purpose: str) -> int:
        return derived_seed(f"{purpose}:{self.seed}:{epoch}")

    @contextmanager
    def _seeded(self, epoch: int) -> Iterator[None]:
        """Seed torch's global generators for dropout; they are as before afterwards."""
        device, rank = model_device(self.model), 0 if self.ranks is None else self.ranks.rank
        devices = [device.index] if device.type == "cuda" else []
        with seeded(self._derived_seed(epoch, "dropout") + rank, devices):
            yield

    def _generator_states(self) -> dict[str, Tensor]:
        """Return where the random generators are within the epoch, by name."""
        device = model_device(self.model)
        states = {"augmentation": self.augmentation.get_state(), "cpu": torch.get_rng_state()}
        if device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
        return states

    def _restore_generators(self) -> None:
        """Set the generators to where they were, if a resume began within the epoch."""
        states, self.state.generators = self.state.generators, {}
        if states:
            self.augmentation.set_state(states["augmentation"])
            torch.set_rng_state(states["cpu"])
        device = model_device(self.model)
        if "cuda" in states and device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], device)
