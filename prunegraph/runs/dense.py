"""The dense network of a run: its weights in the folder, and what is likely wrong with it."""

from collections.abc import Iterator
from pathlib import Path

import torch

from prunegraph.core.console import Console
from prunegraph.core.errors import ConfigError
from prunegraph.core.tensors import parameter_digest
from prunegraph.data.speech import PROXY
from prunegraph.graph import unwrap
from prunegraph.layerwise.room import too_few, widest
from prunegraph.layerwise.weights import few_reached
from prunegraph.models import load_weights, save_weights, weights_info
from prunegraph.runs.context import RunContext
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.config import NetworkConfig
from prunegraph.runs.pretrain import (
    TRAIN_IMAGES,
    train_network,
    weights_record,
)
from prunegraph.runs.target import Target
from prunegraph.tasks.batches import num_tokens
from prunegraph.tasks.classification import compute_logits, evaluate

RUN_IMAGES = "images_of_the_run"
"""What the JSON beside the dense network calls the fingerprint of the run's train data."""

RUN_WEIGHTS = "weights_of_the_run"
"""What it calls the digest of the weights that were given, before any training."""

CHANCE_IMAGES, BARELY_TRAINED = 512, 1.5
"""Search images on which a network must beat chance by this factor, else a warning is due."""


def warn_of_network(context: RunContext, console: Console) -> None:
    """Say so if a network may know the search images, or seems not to have its weights."""
    target = context.target
    dataset, info = target.dataset, target.info
    if dataset is None:
        return
    known = None if info is None or info.dataset != dataset.name else info.extra.get(TRAIN_IMAGES)
    size = None if info is None else info.extra.get("image_size")
    sides = dataset.train.images.image_shape[1:]
    of_one_size = size is None or sides == (size, size)  # else the fingerprints differ by it
    if of_one_size and known not in (None, dataset.train.fingerprint()):
        console.say(
            f"warning: the weights of {target.arch} were trained on other images of {dataset.name} "
            "than the train split here: search images may be among them, and accuracies too high; "
            "give the same --data-dir and options of the images, or train anew"
        )
    images = dataset.search.sample(CHANCE_IMAGES, context.seed)
    accuracy = evaluate(target.model, images).accuracy
    if accuracy * dataset.num_classes < BARELY_TRAINED:
        console.say(
            f"warning: {target.arch} has {100 * accuracy:.1f} % accuracy on search images, about "
            "that of chance: are its weights those of a trained network?"
        )


def _check_begun(target: Target, config: NetworkConfig, path: Path, given: str) -> None:
    """Raise ConfigError if a run that goes on began with other weights or images.

    Args:
        target: the network, with the weights that the run began with.
        config: which network, weights and images were asked for.
        path: of these weights.
        given: digest of the weights that are there now.
    """
    info = weights_info(path)
    begun = {} if info is None else info.extra
    images = target.task.train.fingerprint()
    what = None
    if info is not None and begun.get(RUN_IMAGES) != images:
        what = f"other data of {target.data_name}"
    elif config.weights is not None and given != begun.get(RUN_WEIGHTS):
        what = f"other weights than {config.weights} holds now"
    if what is not None:
        msg = f"{path.parent} was begun with {what}: restore them, or give a new --out"
        raise ConfigError(msg)


FEW = 100
"""Search images among which a mask leads by chance."""


def _doubts(target: Target) -> Iterator[str]:
    """Yield what is likely wrong with a network or its data."""
    if target.data_name == PROXY:
        yield (
            f"{PROXY} is no speech: rows of digits, read in four directions, stand for languages; "
            "give recordings with --data-dir"
        )
    if target.structure is None and (told := few_reached(unwrap(target.model))):
        yield told
    if target.structure is not None and target.num_calibration is not None:
        windows = min(target.num_calibration, len(target.task.train))
        tokens = windows * num_tokens(target.task.example_inputs)
        if told := too_few(tokens, widest(target.structure)):
            yield told
    dataset = target.dataset
    if dataset is None:
        return
    if len(dataset.search) < FEW:
        yield (
            f"there are {len(dataset.search)} images to search on, by which masks differ by "
            "chance: give more, or a larger --search-share"
        )
    image = dataset.train.take(torch.arange(1))
    outputs = compute_logits(target.model, image, autocast=False)
    if outputs.min() >= 0.0 and abs(float(outputs.sum()) - 1.0) < 1e-4:
        yield (
            f"{target.arch} seems to end in a softmax: fine-tunes take its outputs for logits; "
            "leave it to the loss"
        )


def ensure_dense(
    target: Target, config: NetworkConfig, folder: RunFolder, console: Console
) -> Path:
    """Make the dense network's weights final, and write them into the run folder.

    They come from an earlier start of the same run, from training now, or are there already.

    Returns:
        The weights file in the folder.

    Raises:
        ConfigError: the run was begun with other weights or images.
    """
    path = folder.file(RunFolder.DENSE)
    given = parameter_digest(target.model)
    if path.is_file():
        load_weights(target.model, path)
        _check_begun(target, config, path, given)
        return path
    for doubt in _doubts(target):
        console.say(f"warning: {doubt}")
    if target.pretraining is not None:
        train_network(
            f"train {target.arch} on {target.data_name} first, epoch",
            target.model,
            target.task,
            target.pretraining,
            seed=config.seed,
            checkpoint=folder.checkpoint(folder.PRETRAINING),
            console=console,
        )
    figures = dict(target.info.extra) if target.info else {}
    if target.info and target.info.dataset != target.data_name:
        for of_other_images in (TRAIN_IMAGES, "image_size", "no_flip"):
            figures.pop(of_other_images, None)
    images = target.task.train.fingerprint()
    figures |= {RUN_IMAGES: images, RUN_WEIGHTS: given}
    if target.pretraining is not None:
        figures |= {"epochs": target.pretraining.epochs, TRAIN_IMAGES: images}
    save_weights(target.model, path, weights_record(target.arch, target.dataset, config, figures))
    return path
