"""Under ``torchrun`` rank 0 runs the command; the others share each of its trainings.

Rank 0 sends them the network, the images and the recipe, so they need no files, and every decision
is made once. They trust what it sends, as any process of one ``torchrun`` trusts the others.
"""

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map

from prunegraph.core.console import Console
from prunegraph.core.errors import ConfigError, PruneGraphError
from prunegraph.core.splits import SearchSplit
from prunegraph.core.task import Task
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import copy_network
from prunegraph.runs.options.config import CommonConfig
from prunegraph.runs.parallel.machine import (
    default_threads,
    keep_freed_memory,
    resolve_device,
)
from prunegraph.runs.parallel.ranks import num_ranks
from prunegraph.training.distributed import Ranks, current_ranks
from prunegraph.training.loop import FinetuneConfig, finetune
from prunegraph.training.masked import MaskPlan
from prunegraph.training.slimmable import Subnets

PATIENCE = timedelta(days=30)
"""How long the others wait for the next training while rank 0 searches."""


@contextmanager
def joined(device: str) -> Iterator[Ranks | None]:
    """Join the processes that ``torchrun`` started, if it did.

    Args:
        device: what ``--device`` says.

    Raises:
        ConfigError: it names one GPU for all.
    """
    if num_ranks() == 1:
        yield None
        return
    on_gpu = resolve_device(device).type == "cuda"
    if on_gpu and ":" in device:
        msg = f"device={device!r} puts all ranks of torchrun on one GPU: give --device cuda"
        raise ConfigError(msg)
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    ranks = current_ranks()
    assert ranks is not None
    yield ranks  # after an error the others cannot be told: torchrun ends them
    if ranks.first:
        ranks.agree(None)
    distributed.destroy_process_group()


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingOrder:
    """A training that all ranks share; see ``train_network``."""

    model: nn.Module
    task: Task
    config: FinetuneConfig
    seed: int
    teacher: nn.Module | None = None
    subnets: Subnets | None = None
    mask: WeightMask | None = None


def share_training(ranks: Ranks, order: TrainingOrder) -> None:
    """Let the other ranks join the ``finetune`` that rank 0 calls next."""
    model, train = copy_network(order.model).cpu(), order.task.train
    nothing = None
    if order.task.search is not None:
        nothing = SearchSplit(train.source, train.index[:0])
    sent = replace(
        order,
        model=model,
        task=replace(
            cast(Any, order.task),
            model=model,
            example_inputs=tree_map(_on_cpu, order.task.example_inputs),
            search=nothing,
            test=None,
        ),
        teacher=None if order.teacher is None else copy_network(order.teacher).cpu(),
    )
    try:
        ranks.agree(sent)
    except (AttributeError, TypeError, ValueError, pickle.PicklingError) as error:
        msg = f"the network cannot be sent to the other ranks ({error}): leave torchrun away"
        raise PruneGraphError(msg) from error


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def help_rank_0(ranks: Ranks, device: str) -> None:
    """Share rank 0's trainings until it has no more."""
    place = resolve_device(device)
    nothing: TrainingOrder | None = None
    with told_if_rank_ends():
        while (order := ranks.agree(nothing)) is not None:
            model = order.model.to(place)
            finetune(
                model,
                order.task,
                order.config,
                seed=order.seed,
                teacher=None if order.teacher is None else order.teacher.to(place),
                ranks=ranks,
                subnets=order.subnets,
                masks=None if order.mask is None else MaskPlan.holding(order.mask, order.task),
            )


@contextmanager
def told_if_rank_ends() -> Iterator[None]:
    """Raise PruneGraphError where another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        msg = "another rank has ended: see what it says, and give the same command again to go on"
        raise PruneGraphError(msg) from error


def run_job(job: Callable[[Any, Console], dict[str, Any]], config: CommonConfig) -> None:
    """Do what a command says, or help the rank that does, and print the result."""
    keep_freed_memory()
    torch.set_num_threads(config.threads or default_threads())
    with joined(config.device) as ranks:
        if ranks is not None and not ranks.first:
            help_rank_0(ranks, config.device)
            return
        console = Console(json_only=config.json)
        # what the user's own code prints
        with redirect_stdout(sys.stderr if config.json else sys.stdout):
            result = job(config, console)
        console.result(result)
