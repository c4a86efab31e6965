"""Classifiers of sentences on the command line."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from prunegraph.artefacts.pruned import PrunedInfo
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from prunegraph.data.sentences import find_table
from prunegraph.graph import copy_network
from prunegraph.models import load_encoder
from prunegraph.runs.options.config import NetworkConfig
from prunegraph.runs.options.tasks import TaskOptions
from prunegraph.runs.parallel.machine import resolve_device
from prunegraph.runs.prepare import structure_of
from prunegraph.runs.target import Target
from prunegraph.runs.tasks.kind import TaskKind, folder_name, token_numbers
from prunegraph.tasks.text_classification import text_classification
from prunegraph.training.loop import FinetuneConfig

RECIPE = FinetuneConfig(epochs=0, batch_size=32, peak_lr=1e-4, optimizer="adamw")
"""Of a fine-tune: none, unless epochs are asked for."""

ENCODER_EPOCHS, ENCODER_WARMUP = 3, 0.1
"""Of the training of a head with fresh weights and its encoder, before anything is pruned."""

NUM_CALIBRATION = 256
"""Rows of sentences by which weights are chosen and changed."""


def load(config: NetworkConfig, budget: Budget | None = None) -> Target:
    """Load a classifier of sentences, or an encoder, of transformers with a table of sentences.

    An encoder alone gets a head, and is trained on the table before anything is pruned.
    """
    assert isinstance(config, TaskOptions)
    if config.weights is None or config.data_dir is None or config.dataset is None:
        msg = (
            "text_classification needs --weights FOLDER of an encoder (save_pretrained of "
            "transformers), and --data-dir FOLDER with the table of --dataset NAME, NAME.tsv.gz"
        )
        raise ConfigError(msg)
    task = text_classification(
        config.weights,
        find_table(config.data_dir, config.dataset),
        test=config.report_on,
        seed=config.seed,
    )
    task.place_model(task.model, resolve_device(config.device))
    epochs = config.pretrain_epochs
    if epochs is None:
        epochs = ENCODER_EPOCHS if task.untrained else 0
    pretraining = dataclasses.replace(
        RECIPE, epochs=epochs, warmup_epochs=min(ENCODER_WARMUP, epochs / 2)
    )
    inputs: Any = task.example_inputs
    return Target(
        task=task,
        data_name=config.dataset,
        saved=PrunedInfo(
            arch=task.name,
            num_classes=task.num_outputs,
            example_shape=tuple(inputs["input_ids"].shape),
            extra={"task": task.kind},
        ),
        build=lambda: copy_network(task.model).cpu(),
        structure=structure_of(task.name, task.model, task.example_inputs, config, budget),
        tokenizer=config.weights,
        pretraining=pretraining if epochs else None,
        num_calibration=NUM_CALIBRATION,
        recipe=RECIPE,
    )


def build(folder: Path | None, info: PrunedInfo) -> nn.Module:
    """Return the classifier of sequences of a folder of transformers."""
    assert folder is not None  # there is no embedded one
    return load_encoder(folder, info.num_classes, 0)[0]


KIND = TaskKind(
    load=load,
    arch=folder_name,
    options=frozenset({"dataset", "data_dir", "pretrain_epochs", "report_on"}),
    build=build,
    example=token_numbers,
)
"""The task's entry."""
