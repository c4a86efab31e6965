"""Classifiers of images on the command line."""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from prunegraph.artefacts.pruned import PrunedInfo
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from prunegraph.core.splits import Dataset
from prunegraph.core.user_code import HF_PREFIX, LIBRARIES, is_factory
from prunegraph.models import (
    build_model,
    check_arch,
    load_weights,
    pretrained_folder,
    published_info,
    published_weights,
    weights_info,
)
from prunegraph.runs.options.config import NetworkConfig
from prunegraph.runs.parallel.machine import resolve_device
from prunegraph.runs.prepare import (
    DEFAULT_DATASET,
    DIGITS_EPOCHS,
    build_network,
    check_outputs,
    load_images,
    resolve_arch,
    structure_of,
)
from prunegraph.runs.target import IMAGES_RECIPE, Target, pretrain_recipe
from prunegraph.runs.tasks.kind import TaskKind, pretraining_of, random_numbers
from prunegraph.tasks.classification import layout_of
from prunegraph.tasks.image_classification import ImageClassification
from prunegraph.training.loop import FinetuneConfig


def with_published_weights(config: NetworkConfig) -> NetworkConfig:
    """Return the options with the weights that a library publishes for its network.

    Those are of ImageNet, but for a folder of transformers; a network of other images, or one that
    is to be trained, gets none.

    Raises:
        ModelError: there is no such network, or its weights are not there.
    """
    if (
        config.weights is not None
        or config.pretrain_epochs is not None
        or config.arch is None
        or not config.arch.startswith(LIBRARIES if config.dataset == "imagenet" else HF_PREFIX)
    ):
        return config
    check_arch(config.arch)
    return dataclasses.replace(config, weights=published_weights(config.arch))


def build(_folder: Path | None, info: PrunedInfo) -> nn.Module:
    """Build the dense network that a saved pruned one was cut from.

    Raises:
        ModelError: it cannot be built.
    """
    sizes = info.example_shape[1:]
    is_image = len(sizes) == 3  # factories, whose networks may eat anything, take no shape
    image_shape = (sizes[0], sizes[1], sizes[2]) if is_image else (1, 1, 1)
    return build_model(info.arch, num_classes=info.num_classes, image_shape=image_shape)


def load(
    config: NetworkConfig, budget: Budget | None = None, dataset: Dataset | None = None
) -> Target:
    """Load everything that a classifier of images needs, and check it before anything long starts.

    Args:
        config: which network, weights and images.
        budget: if given, checked to be within reach.
        dataset: its images, where they are loaded.

    Raises:
        PruneGraphError: something is missing, damaged, contradictory, or cannot be met.
    """
    device = resolve_device(config.device)
    given, config = config, with_published_weights(config)
    info = weights_info(given.weights) if given.weights else None
    arch = resolve_arch(given.arch, given.weights, info)
    if config is not given:
        info = published_info(arch, config.dataset)
    check_arch(arch)  # before images are downloaded
    dataset = dataset or load_images(config, info)
    pretraining = _pretraining(config, arch, dataset)
    model = build_network(arch, dataset, config.seed)
    if config.weights is not None:
        load_weights(model, config.weights)
    model = model.to(device).eval()
    images, _ = next(iter(dataset.train.batches(1)))
    example_inputs = images.to(device)
    # before the layout changes: files are read without it
    structure = structure_of(arch, model, example_inputs, config, budget)
    layout = layout_of(model)
    task = ImageClassification(
        model=model,
        example_inputs=example_inputs,
        train=dataset.train,
        search=dataset.search,
        test=dataset.test,
        name=arch,
    )
    task.place_model(model, device).eval()
    check_outputs(arch, model, example_inputs, dataset.num_classes)
    if structure is not None and budget is not None:
        structure.project(torch.zeros(structure.num_units).numpy(), budget.without_latency())
    saved = PrunedInfo(
        arch=arch,
        num_classes=dataset.num_classes,
        example_shape=tuple(example_inputs.shape),
        mean=dataset.mean,
        std=dataset.std,
        extra={"dataset": dataset.name, "classes": list(dataset.class_names)},
    )
    return Target(
        task=task,
        data_name=dataset.name,
        saved=saved,
        build=lambda: build(None, saved),
        structure=structure,
        tokenizer=pretrained_folder(arch) if arch.startswith(HF_PREFIX) else None,
        dataset=dataset,
        layout=layout,
        info=info,
        pretraining=pretraining,
        recipe=dataclasses.replace(IMAGES_RECIPE, epochs=DIGITS_EPOCHS)
        if dataset.name == DEFAULT_DATASET
        else IMAGES_RECIPE,
    )


def _pretraining(config: NetworkConfig, arch: str, dataset: Dataset) -> FinetuneConfig | None:
    asked = config.weights is not None or config.pretrain_epochs is not None
    if not asked and is_factory(arch):
        return None  # the user's factory returns a trained network
    if asked or dataset.name == DEFAULT_DATASET:
        return pretraining_of(config, pretrain_recipe(DIGITS_EPOCHS))
    msg = (
        f"{arch} on {dataset.name} has no weights: give --weights (made by `prunegraph pretrain`), "
        "or --pretrain-epochs to train it first"
    )
    raise ConfigError(msg)


def _arch(config: NetworkConfig) -> str:
    info = weights_info(config.weights) if config.weights else None
    return resolve_arch(config.arch, config.weights, info)


KIND = TaskKind(
    load=load,
    arch=_arch,
    options=frozenset(
        {
            *("arch", "dataset", "data_dir", "image_size", "search_share", "split_seed"),
            *("no_flip", "pretrain_epochs"),
        }
    ),
    build=build,
    example=random_numbers,
)
"""The task's entry."""
