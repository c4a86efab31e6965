"""The training loop of fine-tuning and pretraining: one fixed recipe, resumable, bit-equal.

The recipe (``docs/method.md``): batches of 128, SGD with Nesterov momentum 0.9, weight decay 5e-4,
a cosine to zero a step at a time, the split's own augmentation, bfloat16 autocast, the last epoch.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from prunegraph.errors import ArtefactError, ConfigError, DataError, ModelError, PruneGraphError
from prunegraph.files import write_bytes
from prunegraph.graph import evaluation_mode, unwrap
from prunegraph.pruning.evaluation import model_device, place_images, place_model
from prunegraph.pruning.ranks import Ranks, SharedBatchNorm
from prunegraph.pruning.recalibration import recalibrate_bn
from prunegraph.pruning.state import (
    load_state,
    parameter_digest,
    state_tensors,
    to_safetensors,
)
from prunegraph.pruning.subnets import Subnets
from prunegraph.reading import checked, holds_numbers, parse_json, read_safetensors
from prunegraph.types import TrainSplit

LONG_TRAINING = 100
"""From this many epochs on the peak learning rate is that of training from scratch."""

SHORT_PEAK_LR = 0.02
LONG_PEAK_LR = 0.1

NUM_RECALIBRATION = 2048
"""Train images that recalibrate batch norm after slimmable training."""

Progress = Callable[[int, int, float, float], None]
"""Called after every epoch as ``progress(epochs done, epochs, mean loss, seconds so far)``."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How a network is trained.

    Attributes:
        epochs: passes over the split; 0 leaves the network as it is.
        batch_size: images a step.
        peak_lr: highest learning rate; None = 0.02 below 100 epochs, else 0.1.
        warmup_epochs: epochs over which the learning rate rises to its peak.
        momentum: Nesterov momentum.
        weight_decay: weight decay of all parameters.
        autocast: run in bfloat16 where that is safe.
        distill_weight: share of the loss in [0, 1] that is the distance to a teacher's outputs.
        distill_temperature: divides both logits for it (Hinton et al. 2015, section 2).
    """

    epochs: int
    batch_size: int = 128
    peak_lr: float | None = None
    warmup_epochs: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    autocast: bool = True
    distill_weight: float = 0.0
    distill_temperature: float = 4.0

    def __post_init__(self) -> None:
        lowest = {"epochs": 0, "batch_size": 2, "warmup_epochs": 0, "weight_decay": 0}
        for name, least in lowest.items():
            if not getattr(self, name) >= least:
                msg = f"{name}={getattr(self, name)} must be at least {least}"
                raise ConfigError(msg)
        if not (0.0 < self.momentum < 1.0 and 0.0 <= self.distill_weight <= 1.0):
            msg = (
                f"momentum={self.momentum} must lie in (0, 1), "
                f"distill_weight={self.distill_weight} in [0, 1]"
            )
            raise ConfigError(msg)
        positive = {"peak_lr": self.learning_rate, "distill_temperature": self.distill_temperature}
        for name, value in positive.items():
            if not value > 0.0:
                msg = f"{name}={value} must be positive"
                raise ConfigError(msg)

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
    """

    losses: tuple[float, ...]
    seconds: float
    resumed_epochs: int


def finetune(
    model: nn.Module,
    train: TrainSplit,
    config: FinetuneConfig,
    *,
    seed: int,
    teacher: nn.Module | None = None,
    checkpoint: Path | str | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    subnets: Subnets | None = None,
    name: str | None = None,
) -> FinetuneResult:
    """Train a network in place and leave it in eval mode, channels last if it can run so.

    With a checkpoint the state is written after every epoch, and an equal call continues from it;
    on a CPU with the same number of threads the result is bit-equal to an uninterrupted one.

    Args:
        model: the network, on the device where it shall be trained.
        train: the images.
        config: the recipe.
        seed: fixes order, augmentation and dropout.
        teacher: network whose outputs are learned too, with ``config.distill_weight``.
        checkpoint: where the state is kept, or None.
        progress: called after every epoch.
        ranks: processes that train together, each with an equal call on its own device: every batch
            is shared among them, with the order and augmentation of one process. Rank 0 reads and
            writes the checkpoint. Dropout draws anew in each.
        subnets: every step trains another of these parts of the network; at the end the whole
            one's batch norm is recalibrated on ``NUM_RECALIBRATION`` images.
        name: tells the network from others in the checkpoint; default: a digest of its weights,
            which another number of threads may change in their last digits if they were computed.

    Returns:
        Losses and times.

    Raises:
        ArtefactError: the checkpoint is damaged or of another training.
        ConfigError: a teacher without ``distill_weight`` or the reverse.
        DataError: the images are no split.
        PruneGraphError: the loss becomes NaN or infinite.
    """
    given: object = train
    if not isinstance(given, TrainSplit):
        msg = (
            f"{type(given).__name__} is no TrainSplit: see docs/data.md, or train by your own loop"
        )
        raise DataError(msg)
    if (teacher is None) != (config.distill_weight == 0.0):
        msg = f"distill_weight={config.distill_weight} needs a teacher, and a teacher a weight > 0"
        raise ConfigError(msg)
    if config.epochs == 0 and subnets is None:
        model.eval()
        return FinetuneResult(losses=(), seconds=0.0, resumed_epochs=0)
    run = _Training(model, train, config, seed, teacher, ranks, subnets, name)
    writes = ranks is None or ranks.first
    checkpoint = None if checkpoint is None else Path(checkpoint)
    if checkpoint is not None and writes and checkpoint.exists():
        run.restore(checkpoint)
    run.join_ranks()
    resumed_epochs = len(run.losses)
    while len(run.losses) < config.epochs:
        run.train_epoch()
        if checkpoint is not None and writes:
            write_bytes(checkpoint, run.snapshot())
        if progress is not None:
            progress(len(run.losses), config.epochs, run.losses[-1], run.seconds)
    model.eval()
    if subnets is not None:
        run.recalibrate()
    return FinetuneResult(
        losses=tuple(run.losses), seconds=run.seconds, resumed_epochs=resumed_epochs
    )


def learning_rate_at(step: int, *, steps: int, warmup_steps: int, peak: float) -> float:
    """Return the learning rate of one step: a linear rise, then a half cosine towards zero.

    Args:
        step: from 0.
        steps: number of all steps.
        warmup_steps: steps of the rise; the last one reaches the peak.
        peak: the highest learning rate.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * share))


class _Training:
    """One training: network, optimizer, what was done so far.

    The random state of an epoch is derived from (seed, epoch), so a resume needs none of it.
    """

    def __init__(
        self,
        model: nn.Module,
        train: TrainSplit,
        config: FinetuneConfig,
        seed: int,
        teacher: nn.Module | None,
        ranks: Ranks | None,
        subnets: Subnets | None,
        name: str | None,
    ) -> None:
        self.model = model
        self.ranks = ranks
        self.subnets = subnets
        self.train = train
        self.config = config
        self.seed = seed
        self.teacher = teacher
        self.losses: list[float] = []
        self.seconds = 0.0
        trainable = {n: p for n, p in unwrap(model).named_parameters() if p.requires_grad}
        self.trainable = trainable
        if not trainable:
            msg = "no weight of the network requires a gradient: unfreeze those to be trained"
            raise ModelError(msg)
        self.optimizer = torch.optim.SGD(
            trainable.values(),
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=True,
            weight_decay=config.weight_decay,
        )
        full, rest = divmod(len(train), config.batch_size)
        self.steps_per_epoch = full + (rest > 1)  # batch norm cannot train on one image
        if self.steps_per_epoch == 0:
            msg = f"{len(train)} training images are too few: at least 2 are needed"
            raise ConfigError(msg)
        place_model(unwrap(model), model_device(model), next(iter(train.batches(1)))[0])
        self.identity = {
            "config": asdict(config),
            "seed": seed,
            "images": train.fingerprint(),
            "network": name or parameter_digest(unwrap(model)),
            "teacher": None if teacher is None else parameter_digest(teacher),
            "subnets": None if subnets is None else subnets.digest(),
        }

    def join_ranks(self) -> None:
        """Take over what rank 0 has restored, and share the batches from now on."""
        if self.ranks is None:
            return
        names = [name for name, item in self.trainable.items() if self.optimizer.state[item]]
        self.losses, self.seconds, names = self.ranks.agree((self.losses, self.seconds, names))
        for name in names:
            state = self.optimizer.state[self.trainable[name]]
            state.setdefault("momentum_buffer", torch.empty_like(self.trainable[name]))
            distributed.broadcast(state["momentum_buffer"], src=0)
        self.model = self.ranks.wrap(unwrap(self.model))

    def train_epoch(self) -> None:
        """Run the next epoch."""
        start = time.perf_counter()
        epoch = len(self.losses)
        self.model.train()
        total = 0.0
        batches = self.train.batches(
            self.config.batch_size,
            shuffle=self._generator(epoch, "order"),
            augment=self._generator(epoch, "augmentation"),
        )
        shared = nullcontext() if self.ranks is None else SharedBatchNorm()
        with self._seeded(epoch), shared:
            for step, (images, labels) in zip(range(self.steps_per_epoch), batches, strict=False):
                total += self._step(epoch, step, images, labels)
        self.losses.append(total / self.steps_per_epoch)
        self.seconds += time.perf_counter() - start

    def _step(self, epoch: int, step: int, images: Tensor, labels: Tensor) -> float:
        rate = learning_rate_at(
            epoch * self.steps_per_epoch + step,
            steps=self.config.epochs * self.steps_per_epoch,
            warmup_steps=round(self.config.warmup_epochs * self.steps_per_epoch),
            peak=self.config.learning_rate,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        weight = 1.0
        if self.ranks is not None:
            images, labels, weight = self.ranks.share(images, labels)
        network, part = self.model, None
        if self.subnets is not None:
            drawn = self._derived_seed(epoch, f"subnet {step}")
            part = self.subnets.cut(unwrap(self.model), drawn)
            network = part.model
        inputs = place_images(images, network)
        loss = self._loss(network, inputs, labels.to(inputs.device))
        value = float(loss.detach() if self.ranks is None else self.ranks.mean(loss, weight))
        if not math.isfinite(value):
            msg = (
                f"the training loss is {value} in epoch {epoch + 1}, step {step + 1}: lower the "
                f"learning rate, now {self.config.learning_rate:g}, or check the weights"
            )
            raise PruneGraphError(msg)
        self.optimizer.zero_grad(set_to_none=True)
        if self.ranks is not None:
            loss = loss * (weight * self.ranks.size)  # the ranks' gradients are averaged
        loss.backward()
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
        model, images = unwrap(self.model), self.train.take(order)
        batches = (place_images(batch, model) for batch in images.equal_batches(num_batches))
        recalibrate_bn(model, batches, autocast=self.config.autocast)

    def _loss(self, network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return cross-entropy, mixed with the distance to the teacher if there is one."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.config.autocast):
            logits = network(inputs)
            if not isinstance(logits, Tensor):
                msg = (
                    f"the network returns {type(logits).__name__} in training mode, not logits "
                    "[images, classes]: switch its auxiliary outputs off"
                )
                raise ModelError(msg)
            soft = None
            if self.teacher is not None:
                with evaluation_mode(self.teacher):
                    soft = self.teacher(inputs)
        loss = F.cross_entropy(logits.float(), labels)
        if soft is None:
            return loss
        weight, temperature = self.config.distill_weight, self.config.distill_temperature
        distance = F.kl_div(
            (logits.float() / temperature).log_softmax(1),
            (soft.float() / temperature).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        return (1.0 - weight) * loss + weight * temperature**2 * distance

    def _generator(self, epoch: int, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(self._derived_seed(epoch, purpose))

    def _derived_seed(self, epoch: int, purpose: str) -> int:
        digest = hashlib.sha256(f"{purpose}:{self.seed}:{epoch}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    @contextmanager
    def _seeded(self, epoch: int) -> Iterator[None]:
        """Seed torch's global generators for dropout; they are as before afterwards."""
        device = model_device(self.model)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            rank = 0 if self.ranks is None else self.ranks.rank
            torch.manual_seed(self._derived_seed(epoch, "dropout") + rank)
            yield

    def snapshot(self) -> bytes:
        """Return the whole state as a safetensors file."""
        tensors = {f"model.{n}": t for n, t in state_tensors(unwrap(self.model)).items()}
        for name, parameter in self.trainable.items():
            buffer = self.optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                tensors[f"momentum.{name}"] = buffer
        record = {"identity": self.identity, "losses": self.losses, "seconds": self.seconds}
        return to_safetensors(tensors, {"training": json.dumps(record)})

    def restore(self, path: Path) -> None:
        """Continue from a snapshot.

        Raises:
            ArtefactError: it is damaged or of another training.
        """
        tensors, metadata = read_safetensors(path)
        record = self._record(path, metadata)
        own = unwrap(self.model)
        state = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        load_state(own, state, path)
        for name, parameter in self.trainable.items():
            buffer = tensors.get(f"momentum.{name}")
            if buffer is not None:
                if buffer.shape != parameter.shape or not holds_numbers(buffer):
                    msg = (
                        f"{path}: the momentum of {name} is damaged: delete the file to start over"
                    )
                    raise ArtefactError(msg)
                value = torch.empty_like(parameter).copy_(buffer)
                self.optimizer.state[parameter]["momentum_buffer"] = value
        self.losses = record["losses"]
        self.seconds = record["seconds"]

    def _record(self, path: Path, metadata: dict[str, str]) -> dict[str, Any]:
        """Return what the checkpoint says of its training, if it is this one."""
        if "training" not in metadata:
            msg = f"{path} is no training checkpoint of prunegraph: choose another file name"
            raise ArtefactError(msg)
        shape = {"identity": dict[str, Any], "losses": list[float], "seconds": float}
        record: dict[str, Any] = checked(parse_json(metadata["training"], path), shape, str(path))
        theirs = record["identity"]
        differing = [key for key, value in self.identity.items() if theirs.get(key) != value]
        if differing:
            msg = (
                f"{path} is the checkpoint of another training (different {', '.join(differing)}): "
                "delete it, or choose another output folder"
            )
            raise ArtefactError(msg)
        return record
