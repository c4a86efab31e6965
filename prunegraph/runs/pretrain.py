"""``prunegraph pretrain``: train a network on the train split, from scratch or further."""

import dataclasses
import hashlib
import time
from collections.abc import Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.tensorboard import SummaryWriter

from prunegraph.core.console import Console, seconds_in_words
from prunegraph.core.errors import ConfigError
from prunegraph.core.files import locked, remove_temporaries, temporaries_of
from prunegraph.core.splits import Dataset, TrainSplit
from prunegraph.core.task import Task
from prunegraph.core.tensors import parameter_digest
from prunegraph.core.user_code import is_factory
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import analyse, copy_network
from prunegraph.graph.features import prior_scores
from prunegraph.methods.criteria.taylor import measure
from prunegraph.models import (
    WeightsInfo,
    check_weights_file,
    load_weights,
    save_weights,
    weights_info,
)
from prunegraph.runs.folder import RUNS, slug
from prunegraph.runs.options.config import DataConfig, PretrainConfig
from prunegraph.runs.parallel.machine import resolve_device
from prunegraph.runs.parallel.torchrun import (
    TrainingOrder,
    share_training,
    told_if_rank_ends,
)
from prunegraph.runs.prepare import (
    DEFAULT_DATASET,
    DIGITS_EPOCHS,
    build_network,
    check_network,
    check_outputs,
    check_training,
    load_images,
    named_dataset,
    never_flipped,
    resolve_arch,
    trained_size,
)
from prunegraph.runs.target import PRETRAIN_LR, pretrain_recipe
from prunegraph.tasks.classification import evaluate, model_device
from prunegraph.tasks.image_classification import training_task
from prunegraph.training.distributed import current_ranks
from prunegraph.training.loop import FinetuneConfig, FinetuneResult, finetune
from prunegraph.training.masked import MaskPlan
from prunegraph.training.slimmable import Subnets

TRAIN_IMAGES = "train_images"
"""What the JSON beside weights calls the fingerprint of the images that they were trained on."""

DEFAULT_EPOCHS = 60

MORE_EPOCHS = 10
MORE_LR = 0.05
"""Recipe of a network that has weights already."""


def run_pretrain(config: PretrainConfig, console: Console) -> dict[str, Any]:
    """Train a network, write its weights, print its accuracy and return the figures."""
    device = resolve_device(config.device)
    info = None
    if config.weights is not None:
        check_weights_file(config.weights)
        info = weights_info(config.weights)
    arch = resolve_arch(config.arch, config.weights, info)
    name = named_dataset(config.dataset, config.weights, info) or DEFAULT_DATASET
    config = dataclasses.replace(  # what the weights were trained with belongs to the new ones too
        config,
        image_size=trained_size(config, info),
        no_flip=config.no_flip or (not is_factory(name) and never_flipped(config, info)),
    )
    dataset = load_images(config, info)
    out = _weights_path(config.out, arch, dataset)
    if config.weights is not None and out.resolve() == config.weights.resolve():
        msg = f"{out} would take the place of --weights: give another --out"
        raise ConfigError(msg)
    done = _finished(config, arch, dataset, out)
    if done is not None:
        console.say(f"{out} is finished: test accuracy {100 * done['test_accuracy']:.2f} %")
        return done
    _check_new(out)
    model = build_network(arch, dataset, config.seed)
    if config.weights is not None:
        load_weights(model, config.weights)
    model = model.to(device).eval()
    images, _ = next(iter(dataset.train.batches(1)))
    check_outputs(arch, model, images.to(device), dataset.num_classes)
    with locked(out.with_name(f"{out.name}.lock"), str(out)):
        _check_new(out)
        result = _pretrain(config, arch, model, dataset, out, console)
    _checkpoint_path(out).unlink(missing_ok=True)  # the last step of all: it says that all is done
    return result


def _pretrain(
    config: PretrainConfig,
    arch: str,
    model: nn.Module,
    dataset: Dataset,
    out: Path,
    console: Console,
) -> dict[str, Any]:
    """Train, write and measure a network; nobody else writes the same file."""
    checkpoint = _checkpoint_path(out)
    written = (out, out.with_suffix(".json"), checkpoint)
    remove_temporaries(found for path in written for found in temporaries_of(path))
    asked = _asked(config, dataset)
    recipe = pretrain_recipe(asked["epochs"], lr=asked["peak_lr"], batch_size=config.batch_size)
    recipe = dataclasses.replace(recipe, distill_weight=config.distill)
    teacher = copy_network(model) if config.distill else None
    subnets = None
    if config.slimmable is not None:
        subnets = make_subnets(arch, model, dataset.train, config.slimmable, seed=config.seed)
    started = time.monotonic()
    trained = train_network(
        f"train {arch}",
        model,
        training_task(model, dataset.train),
        recipe,
        seed=config.seed,
        checkpoint=checkpoint,
        console=console,
        teacher=teacher,
        subnets=subnets,
        name=f"{parameter_digest(model)}, never mirrored" if config.no_flip else None,
    )
    figures: dict[str, Any] = {
        **_known_images(config, dataset),
        **asked,
        "losses": [round(loss, 4) for loss in trained.losses],
        "search_accuracy": evaluate(model, dataset.search).accuracy,
        "test_accuracy": evaluate(model, dataset.test).accuracy,
    }
    save_weights(model, out, weights_record(arch, dataset, config, figures))
    seconds = time.monotonic() - started
    console.say(
        f"{arch} on {dataset.name}: test accuracy {100 * figures['test_accuracy']:.2f} % "
        f"after {asked['epochs']} epochs in {seconds_in_words(seconds)}; written to {out}"
    )
    return _result(config, arch, dataset, out, figures, seconds)


def _result(
    config: PretrainConfig,
    arch: str,
    dataset: Dataset,
    out: Path,
    figures: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    return {
        "command": config.command,
        "arch": arch,
        "dataset": dataset.name,
        "weights": str(out),
        "seconds": round(seconds, 2),
        **figures,
    }


def _asked(config: PretrainConfig, dataset: Dataset) -> dict[str, Any]:
    """Return the options that decide what is trained, but for network and images."""
    epochs, peak_lr, more = DEFAULT_EPOCHS, PRETRAIN_LR, {}
    if config.weights is not None:
        epochs, peak_lr = MORE_EPOCHS, MORE_LR
        digest = hashlib.sha256(config.weights.read_bytes()).hexdigest()[:16]
        more = {"weights_before": digest, "slimmable": config.slimmable}
        more |= {"distill": config.distill} if config.distill else {}
    if dataset.name == DEFAULT_DATASET:
        epochs = DIGITS_EPOCHS
    return {
        "epochs": config.epochs or epochs,
        "seed": config.seed,
        "peak_lr": peak_lr if config.lr is None else config.lr,
        "batch_size": config.batch_size,
        **more,
    }


def _known_images(config: PretrainConfig, dataset: Dataset) -> dict[str, str]:
    """Return which images a network has seen, and their fingerprint: of the first, if others."""
    split, own = "the train split", dataset.train.fingerprint()
    if config.weights is None:
        return {"trained_on": f"{split}; the search split is unseen", TRAIN_IMAGES: own}
    info = weights_info(config.weights)
    before = {} if info is None else info.extra
    untold = f"{split}; before that, images that nothing tells of"
    found = {"trained_on": before.get("trained_on") or untold}
    found[TRAIN_IMAGES] = before.get(TRAIN_IMAGES) or own
    return {name: str(value) for name, value in found.items()}


def make_subnets(
    arch: str, model: nn.Module, train: TrainSplit, least_macs: float, *, seed: int
) -> Subnets:
    """Return the parts of a network that slimmable training trains.

    Raises:
        BudgetError: the smallest are out of reach.
        ModelError: nothing can leave the network.
    """
    device = model_device(model)
    images, _ = next(iter(train.batches(1)))
    example_inputs = images.to(device)
    graph = analyse(model, example_inputs)
    check_network(arch, graph)
    task = dataclasses.replace(training_task(model, train), name=arch)
    check_training(task, graph, "no --slimmable")
    statistics = measure(task, graph, seed=seed, device=device)
    return Subnets(graph=graph, least_macs=least_macs, scores=prior_scores(graph, statistics))


def _finished(
    config: PretrainConfig, arch: str, dataset: Dataset, out: Path
) -> dict[str, Any] | None:
    """Return the result of this very command, if it has been given before and is done."""
    if _checkpoint_path(out).exists() or not out.is_file():
        return None
    info, asked = weights_info(out), weights_record(arch, dataset, config, _asked(config, dataset))
    if info is None or dataclasses.replace(info, extra={}) != dataclasses.replace(asked, extra={}):
        return None
    names = {*asked.extra, "no_flip", "image_size", "weights_before", "slimmable", "distill"}
    images = _known_images(config, dataset)[TRAIN_IMAGES]
    same = all(info.extra.get(name) == asked.extra.get(name) for name in names)
    same = same and info.extra.get(TRAIN_IMAGES) == images
    if not same or not isinstance(info.extra.get("test_accuracy"), float):
        return None
    figures = {key: value for key, value in info.extra.items() if key != "schema"}
    return _result(config, arch, dataset, out, figures, 0.0)


def _weights_path(out: Path | None, arch: str, dataset: Dataset) -> Path:
    """Return the file to write."""
    path = RUNS / f"{slug(arch)}-{slug(dataset.name)}" if out is None else out
    if path.suffix != ".safetensors":
        path = path.with_name(f"{path.name}.safetensors")
    return path


def _checkpoint_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.checkpoint")


def _check_new(out: Path) -> None:
    """Raise ConfigError if the file is there, unless a run was killed when it had written it."""
    for path in (out, out.with_suffix(".json")):
        if path.exists() and not _checkpoint_path(out).exists():
            msg = f"{path} exists: delete it to train again, or give another --out"
            raise ConfigError(msg)


def train_network(
    label: str,
    model: nn.Module,
    task: Task,
    recipe: FinetuneConfig,
    *,
    seed: int,
    checkpoint: Path | None,
    console: Console,
    teacher: nn.Module | None = None,
    subnets: Subnets | None = None,
    events: Path | None = None,
    name: str | None = None,
    mask: WeightMask | None = None,
) -> FinetuneResult:
    """Train or fine-tune a network in place, with progress; an interrupted one resumes.

    Args:
        label: what to call it in the progress.
        model: the network.
        task: the loss, and what to train on.
        recipe: how it is trained.
        seed: of the training.
        checkpoint: where an interrupted training is kept, or None.
        console: where progress goes.
        teacher: network whose outputs are learned too.
        subnets: parts of the network of which every step trains one.
        events: folder for TensorBoard's curve of the loss, or None.
        name: tells the network from others in the checkpoint (``finetune``).
        mask: what it removes stays zero.
    """
    ranks = current_ranks()
    if ranks is not None:
        order = TrainingOrder(
            model=model,
            task=task,
            config=recipe,
            seed=seed,
            teacher=teacher,
            subnets=subnets,
            mask=mask,
        )
        share_training(ranks, order)
    curve = None if events is None else SummaryWriter(events)

    def tell(done: int, loss: float) -> None:
        report(done, f"loss {loss:.3f}")
        if curve is not None:
            curve.add_scalar("train/loss", loss, done)

    with (
        console.progress(label, recipe.epochs) as report,
        told_if_rank_ends(),
        nullcontext() if curve is None else closing(curve),
    ):
        return finetune(
            model,
            task,
            recipe,
            seed=seed,
            teacher=teacher,
            checkpoint=checkpoint,
            progress=lambda done, _, loss, __: tell(done, loss),
            watch=lambda done, loss: report(done, f"loss {loss:.3f}"),
            ranks=ranks,
            subnets=subnets,
            name=name,
            masks=None if mask is None else MaskPlan.holding(mask, task),
        )


def weights_record(
    arch: str, dataset: Dataset | None, config: DataConfig, figures: dict[str, Any]
) -> WeightsInfo:
    """Return what is written beside weights: enough to load them, and not to leak search images."""
    size = {} if config.image_size is None else {"image_size": config.image_size}
    return WeightsInfo(
        arch=arch,
        dataset=None if dataset is None else dataset.name,
        mean=None if dataset is None else dataset.mean,
        std=None if dataset is None else dataset.std,
        extra={
            "search_share": config.search_share,
            "split_seed": config.split_seed,
            **({"no_flip": True} if config.no_flip else {}),
            **figures,
            **size,
        },
    )
