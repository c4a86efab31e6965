"""Causal language models on the command line."""

import dataclasses
from pathlib import Path
from typing import Any, cast

from torch import nn

from prunegraph.artefacts.pruned import PrunedInfo
from prunegraph.core.budget import Budget
from prunegraph.core.errors import DataError
from prunegraph.graph import copy_network
from prunegraph.models import load_pretrained
from prunegraph.models.embedded_language import build_embedded, byte_tokenizer
from prunegraph.runs.options.config import NetworkConfig
from prunegraph.runs.options.tasks import TaskOptions
from prunegraph.runs.parallel.machine import resolve_device
from prunegraph.runs.prepare import structure_of
from prunegraph.runs.target import LANGUAGE_RECIPE, Target
from prunegraph.runs.tasks.kind import (
    TaskKind,
    folder_name,
    pretraining_of,
    token_numbers,
)
from prunegraph.tasks.causal_lm import causal_lm
from prunegraph.training.embedded import RECIPE as EMBEDDED_RECIPE

CALIBRATION_TOKENS = 16_384
"""Without ``--calibration-tokens``, so many are drawn of the calibration text, by each seed."""


def load(config: NetworkConfig, budget: Budget | None = None) -> Target:
    """Load a causal language model of transformers with its texts."""
    assert isinstance(config, TaskOptions)
    device = resolve_device(config.device)
    task = causal_lm(
        build_embedded(config.seed) if config.weights is None else config.weights,
        byte_tokenizer() if config.weights is None else None,
        calibration=config.calibration_text,
        test=config.test_text,
        window=config.window,
        bos=None if config.bos else False,
        seed=config.seed,
        calibration_tokens=None,
        name=folder_name(config),
    )
    window = task.train.source.load(task.train.index[:1])["input_ids"]
    num_windows = max((config.calibration_tokens or CALIBRATION_TOKENS) // window.shape[1], 1)
    if config.calibration_tokens is not None and num_windows > len(task.train):
        msg = (
            f"--calibration-tokens {config.calibration_tokens} asks for {num_windows} windows of "
            f"{window.shape[1]} tokens, the calibration text has {len(task.train)}: give more text"
        )
        raise DataError(msg)
    task = dataclasses.replace(task, search=task.search.sample(num_windows, config.seed))
    task.place_model(task.model, device)
    return Target(
        task=task,
        data_name="text" if config.test_text is None else config.test_text.name,
        saved=PrunedInfo(
            arch=task.name, example_shape=tuple(window.shape), extra={"task": task.kind}
        ),
        build=lambda: copy_network(task.model).cpu(),
        structure=structure_of(task.name, task.model, task.example_inputs, config, budget),
        tokenizer=task.tokenizer_folder or task.tokenizer or False,
        pretraining=pretraining_of(config, EMBEDDED_RECIPE),
        num_calibration=num_windows,
        recipe=LANGUAGE_RECIPE,
    )


def build(folder: Path | None, _info: PrunedInfo) -> nn.Module:
    """Return a causal language model, which keeps nothing between two calls."""
    model = build_embedded() if folder is None else load_pretrained(folder)
    cast(Any, model).config.use_cache = False
    return model


KIND = TaskKind(
    load=load,
    arch=folder_name,
    options=frozenset(
        {"calibration_text", "test_text", "calibration_tokens", "window", "bos", "pretrain_epochs"}
    ),
    build=build,
    example=token_numbers,
)
"""The task's entry."""
