"""What every command starts from: the network, its weights, its images, its structure graph."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError, DataError, ModelError, one_line
from prunegraph.core.masks import ChannelMask
from prunegraph.core.seeding import seeded
from prunegraph.core.splits import Dataset
from prunegraph.core.task import ExampleInputs, Task
from prunegraph.core.user_code import (
    as_one_line,
    find_factory,
    is_factory,
)
from prunegraph.data import EMBEDDED, RESIZED, Images, from_images, load_dataset
from prunegraph.graph import AttentionUnit, StructureGraph, analyse, copy_network, unwrap
from prunegraph.graph.apply import apply_mask
from prunegraph.graph.depth import with_depth
from prunegraph.graph.narrowing import narrow
from prunegraph.models import (
    WeightsInfo,
    build_model,
    check_weights_file,
    settled,
    within_config,
)
from prunegraph.runs.options.checks import check_trusted
from prunegraph.runs.options.config import (
    DataConfig,
    NetworkConfig,
    PretrainConfig,
    PruningOptions,
    StructureConfig,
)
from prunegraph.runs.parallel.machine import is_out_of_memory
from prunegraph.runs.target import Target
from prunegraph.tasks.outputs import logits_in
from prunegraph.training.lora import peft_library

DEFAULT_ARCH = "digits_resnet"
DEFAULT_DATASET = "digits"
DIGITS_EPOCHS = 40


def resolve_arch(arch: str | None, weights: Path | None, info: WeightsInfo | None) -> str:
    """Return the network's name from the options and the JSON beside the weights.

    Raises:
        ConfigError: they contradict each other, or weights come without a name.
        ArtefactError: there are no such weights.
    """
    arch = None if arch is None else settled(arch)
    if weights is None:
        return arch or DEFAULT_ARCH
    check_weights_file(weights)
    if info is None:
        if arch is None:
            msg = f"{weights} has no JSON beside it that names the network; add --arch"
            raise ConfigError(msg)
        return arch
    if arch is not None and arch != info.arch:
        msg = f"{weights} holds {info.arch}, not {arch}: drop --arch, or give other --weights"
        raise ConfigError(msg)
    check_trusted(info.arch, arch, weights.with_suffix(".json"))
    return info.arch


def trained_size(config: DataConfig, info: WeightsInfo | None) -> int | None:
    """Return ``--image-size``, or that which the weights were trained with on the same data set."""
    if config.image_size is not None:
        return config.image_size
    size = _told_of_images(config, info).get("image_size")
    return size if isinstance(size, int) else None


def never_flipped(config: DataConfig, info: WeightsInfo | None) -> bool:
    """Return ``--no-flip``, or whether the weights were trained so on the same data set."""
    return config.no_flip or _told_of_images(config, info).get("no_flip") is True


def _told_of_images(config: DataConfig, info: WeightsInfo | None) -> Mapping[str, Any]:
    """Return what weights tell of their images; nothing if the options name another data set."""
    return info.extra if info is not None and config.dataset in (None, info.dataset) else {}


def named_dataset(given: str | None, weights: Path | None, info: WeightsInfo | None) -> str | None:
    """Return the data set that the options or the JSON beside the weights name.

    Raises:
        ConfigError: the JSON alone names it, and it is code.
    """
    if given is None and weights is not None and info is not None and info.dataset is not None:
        check_trusted(info.dataset, None, weights.with_suffix(".json"), "dataset")
        return info.dataset
    return given


def load_images(config: NetworkConfig | PretrainConfig, info: WeightsInfo | None) -> Dataset:
    """Load the data set, normalised and scaled as the weights' JSON says.

    Raises:
        ConfigError: the weights were trained on images that this cut sets aside for the search.
        DataError: the data set cannot be used.
    """
    for key in ("search_share", "split_seed"):
        if info is not None and info.extra.get(key, getattr(config, key)) != getattr(config, key):
            flag = f"--{key.replace('_', '-')} {info.extra[key]}"
            msg = f"the weights were trained on another cut of the train images: give {flag}"
            raise ConfigError(msg)
    name = named_dataset(config.dataset, config.weights, info) or DEFAULT_DATASET
    if is_factory(name):
        return custom_dataset(name, config, info)
    if name in EMBEDDED and config.threads is None:
        torch.set_num_threads(1)  # sharing such small work among threads only slows it down
    return load_dataset(
        name,
        data_dir=config.data_dir,
        image_size=trained_size(config, info) if name in RESIZED else config.image_size,
        search_share=config.search_share,
        seed=config.split_seed,
        mean=info.mean if info else None,
        std=info.std if info else None,
        flip=not never_flipped(config, info),
    )


def custom_dataset(name: str, config: DataConfig, info: WeightsInfo | None) -> Dataset:
    """Return the data set that the user's own function makes.

    Args:
        name: ``package.module:function``, which is run.
        config: how it is cut.
        info: what the JSON beside the weights says.

    Raises:
        PruneGraphError: there is no such function, or what it makes cannot be used.
    """
    given = {
        "data_dir": config.data_dir,
        "image_size": config.image_size,
        "no_flip": config.no_flip,
    }
    useless = [option for option, value in given.items() if value]
    if useless:
        msg = f"{name} reads and augments its images itself: leave {useless[0]} away"
        raise ConfigError(msg)
    factory = find_factory(name)
    with as_one_line(name):
        images = factory()
        if not isinstance(images, Images):
            msg = f"it returned {type(images).__name__}, not prunegraph.data.Images"
            raise DataError(msg)
        return from_images(
            name,
            images,
            search_share=config.search_share,
            seed=config.split_seed,
            mean=info.mean if info else None,
            std=info.std if info else None,
        )


def build_network(arch: str, dataset: Dataset, seed: int) -> nn.Module:
    """Build a network for a data set's images, its initial weights fixed by ``seed``."""
    with seeded(seed):
        model = build_model(arch, num_classes=dataset.num_classes, image_shape=dataset.image_shape)
    return unwrap(model)  # a factory may wrap it: its weights are named without


def structure_of(
    arch: str,
    model: nn.Module,
    example_inputs: ExampleInputs,
    config: StructureConfig,
    budget: Budget | None = None,
) -> StructureGraph | None:
    """Return the structure of a network where channels are chosen, else None: that takes long.

    What the options exclude, or a config of ``uniform`` widths cannot hold, is frozen in it.

    Raises:
        ConfigError: the options ask for channels that stay, and the budget is of single weights;
            or they name modules that there are not.
        ModelError: no channel of the network can be removed.
    """
    if budget is not None and budget.kind == "weights":
        if config.exclude or config.keep_at_least:
            msg = "--exclude and --keep-at-least are of channels, and single weights go: drop them"
            raise ConfigError(msg)
        return None
    graph = prunable_structure(
        model,
        example_inputs,
        budget,
        attention=config.attention,
        exclude=config.exclude,
        keep_at_least=config.least_shares(),
    )
    check_network(arch, graph)
    return graph


def prunable_structure(
    model: nn.Module,
    example_inputs: ExampleInputs,
    budget: Budget | None,
    *,
    attention: AttentionUnit,
    exclude: Sequence[str] = (),
    keep_at_least: Mapping[str, float] | None = None,
) -> StructureGraph:
    """Return the structure of a network, with what a budget and a user leave to prune.

    Args:
        model: the dense network.
        example_inputs: what its forward takes.
        budget: what may remain; None = nothing is asked.
        attention: what can leave it.
        exclude: see ``narrow``.
        keep_at_least: see ``narrow``.
    """
    graph = analyse(model, example_inputs, attention=attention)
    graph = narrow(graph, exclude, keep_at_least)
    if budget is not None and budget.uniform:
        graph = within_config(model, graph)
    if budget is not None and budget.depth:
        graph = narrow(with_depth(model, graph, example_inputs), (), keep_at_least)
    return graph


def check_network(arch: str, graph: StructureGraph) -> None:
    """Raise ModelError if no channel of the network can be removed."""
    if not graph.free.any():
        reasons = sorted({group.frozen for group in graph.groups if group.frozen})
        msg = f"{arch} has nothing to prune: {'; '.join(reasons) or 'no prunable units'}"
        raise ModelError(msg)


def check_outputs(arch: str, model: nn.Module, example_inputs: Tensor, num_classes: int) -> None:
    """Raise ModelError if the network fails, or does not give one logit a class."""
    try:
        with torch.no_grad():
            outputs = logits_in(model(example_inputs))
    except Exception as error:  # a forward may fail in any way
        if is_out_of_memory(error):
            raise
        msg = (
            f"{arch} does not take an image of the data set, {list(example_inputs.shape)}: "
            f"{one_line(error)}: build it for such images, or give others (--image-size, --dataset)"
        )
        raise ModelError(msg) from error
    if not isinstance(outputs, Tensor) or outputs.shape != (1, num_classes):
        shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        msg = (
            f"{arch} returns {shape} for one image; it must return logits of shape "
            f"[images, classes], here [1, {num_classes}]"
        )
        raise ModelError(msg)


def check_trainable(target: Target, options: PruningOptions) -> None:
    """Raise an error if the network or a pruned one cannot be trained: before a long search.

    A forward may return more in training mode, or use layers that the analysis, which runs in eval
    mode, has not seen. LoRA without its library is a ConfigError.
    """
    if options.finetune_lora is not None:
        peft_library()
    epochs = options.finetune_epochs
    if target.recipe.epochs if epochs is None else epochs:
        check_training(target.task, target.structure, "--finetune-epochs 0")


def check_training(task: Task, graph: StructureGraph | None, otherwise: str) -> None:
    """Raise ModelError if a network or a pruned one fails in training mode: see above.

    ``otherwise``: what to do where it shall stay as it is.
    """
    arch, model = task.name, task.model
    if not any(parameter.requires_grad for parameter in model.parameters()):
        msg = f"{arch} has no weights that require a gradient: unfreeze them, or {otherwise}"
        raise ModelError(msg)
    networks = [(copy_network(model), "")]
    if graph is not None:
        networks.append((apply_mask(model, graph, _nearly_whole(graph)), ", pruned,"))
    batch = next(task.batches(task.train, 2))  # batch norm cannot train on one
    for network, what in networks:
        problem = ""
        try:
            with torch.no_grad():
                task.loss(network.train(), batch)
        except ModelError as error:
            problem = f"fails ({error})"
        except Exception as error:
            if is_out_of_memory(error):
                raise
            problem = f"fails ({type(error).__name__}: {error})"
        if problem:
            msg = (
                f"{arch}{what} {problem} in training mode, in eval mode it does not: give a "
                "network whose forward is the same in both, without auxiliary outputs, or "
                f"{otherwise}"
            )
            raise ModelError(msg)


def _nearly_whole(graph: StructureGraph) -> ChannelMask:
    """Return a mask by which every group loses a unit that can."""
    keep = np.ones(graph.num_units, dtype=bool)
    for group in graph.groups:
        free = group.units[graph.free[group.units]]
        if free.size and len(group.units) > group.min_keep:
            keep[free[-1]] = False
    return graph.mask(keep)
