"""A network of a run, whatever its task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunegraph.artefacts.pruned import PrunedInfo
from prunegraph.core.budget import Cost
from prunegraph.core.masks import ChannelMask
from prunegraph.core.splits import Dataset, Split
from prunegraph.core.task import ExampleInputs, Task
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import StructureGraph, copy_network, unwrap
from prunegraph.layerwise.weights import prunable_weights
from prunegraph.methods.method import OfNetwork
from prunegraph.models import WeightsInfo
from prunegraph.tasks.classification import lay_out, model_device
from prunegraph.training.loop import FinetuneConfig

IMAGES_RECIPE = FinetuneConfig(epochs=10, peak_lr=0.05)
"""Of a fine-tune of a classifier of images."""

LANGUAGE_RECIPE = FinetuneConfig(epochs=0, batch_size=8, peak_lr=1e-4, optimizer="adamw")
"""Of a fine-tune of a language model: none, unless epochs are asked for."""

PRETRAIN_LR = 0.1
WARMUP_EPOCHS = 2


@dataclass(frozen=True, eq=False, kw_only=True)
class Target(OfNetwork):
    """A network to prune: its task, its structure, and how files name and rebuild it.

    Attributes:
        task: the dense network, in eval mode on the device, its data, and what counts as good.
        data_name: name of its data in reports.
        saved: what is written beside a pruned network: how the dense one is built.
        build: makes the dense network anew; its weights do not matter.
        structure: its structure graph; None where single weights become zero.
        tokenizer: of a network of transformers, whose pruned networks are ``from_pretrained``
            folders: the folder that holds it, or its image processor, or itself, or False if it has
            none.
        dataset: its images; None where they are none.
        layout: of its weights where they are read from a file; the task's are in the fastest one.
        info: what the JSON beside its weights says.
        pretraining: how it still has to be trained; None if it has weights.
        num_calibration: train samples by which weights are chosen and changed; None: an option.
        recipe: of a fine-tune, where options do not say otherwise.
    """

    task: Task
    data_name: str
    saved: PrunedInfo
    build: Callable[[], nn.Module]
    structure: StructureGraph | None = None
    tokenizer: Any = None
    dataset: Dataset | None = None
    layout: torch.memory_format = torch.contiguous_format
    info: WeightsInfo | None = None
    pretraining: FinetuneConfig | None = None
    num_calibration: int | None = None
    recipe: FinetuneConfig = IMAGES_RECIPE

    @property
    def arch(self) -> str:
        """The network's name."""
        return self.saved.arch

    @property
    def model(self) -> nn.Module:
        """The dense network."""
        return self.task.model

    @property
    def example_inputs(self) -> ExampleInputs:
        """What the network's forward takes."""
        return self.task.example_inputs

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return model_device(self.model)

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that there are, by name."""
        found = {"train": self.task.train, "search": self.task.search, "test": self.task.test}
        return {name: split for name, split in found.items() if split is not None}

    @cached_property
    def cost(self) -> Cost:
        """What the dense network costs on its example inputs."""
        if self.structure is not None:
            return self.structure.dense_cost
        return measure_cost(self.model, self.example_inputs)

    @cached_property
    def whole(self) -> ChannelMask | WeightMask:
        """The mask that keeps everything."""
        if self.structure is not None:
            return self.structure.dense_mask()
        weights = prunable_weights(unwrap(self.model))
        return WeightMask(
            {name: torch.ones(each.shape, dtype=torch.bool) for name, each in weights.items()}
        )

    def as_loaded(self) -> nn.Module:
        """Return a copy in the layout in which files load: what is timed."""
        model = copy_network(self.model)
        lay_out(model, self.layout)
        return model


@torch.no_grad()
def measure_cost(model: nn.Module, example_inputs: ExampleInputs) -> Cost:
    """Return what a network costs, its multiply-adds counted in one forward."""
    params = sum(parameter.numel() for parameter in model.parameters())
    # of a fused attention on a CPU the counter knows nothing
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if isinstance(example_inputs, Mapping):
            model(**example_inputs)
        else:
            model(*(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)))
    return Cost(macs=counter.get_total_flops() // 2, params=params)


def pretrain_recipe(
    epochs: int, *, lr: float = PRETRAIN_LR, batch_size: int = 128
) -> FinetuneConfig:
    """Return how a classifier of images is trained from scratch."""
    warmup = min(WARMUP_EPOCHS, epochs / 2)
    return FinetuneConfig(epochs=epochs, peak_lr=lr, batch_size=batch_size, warmup_epochs=warmup)
