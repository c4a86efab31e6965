"""What each command does, once its options are read: this loads what help and mistakes need not."""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from prunegraph.experiment.apply import run_apply
from prunegraph.experiment.comparisons import run_comparisons
from prunegraph.experiment.config import CommonConfig
from prunegraph.experiment.console import Console
from prunegraph.experiment.export import run_export
from prunegraph.experiment.inspect import run_inspect
from prunegraph.experiment.machine import default_threads, keep_freed_memory
from prunegraph.experiment.pretrain import run_pretrain
from prunegraph.experiment.ranks import help_rank_0, joined
from prunegraph.experiment.train import run_train
from prunegraph.experiment.verify_all import run_verify

JOBS: dict[str, Callable[[Any, Console], dict[str, Any]]] = {
    "pretrain": run_pretrain,
    "train": run_train,
    "apply": run_apply,
    "compare": run_comparisons,
    "inspect": run_inspect,
    "export": run_export,
    "verify": run_verify,
}
"""By the name of the command."""


def work(config: CommonConfig) -> None:
    """Do what a command says, or help the rank that does, and print the result."""
    keep_freed_memory()
    torch.set_num_threads(config.threads or default_threads())
    with joined(config.device) as ranks:
        if ranks is None or ranks.first:
            console = Console(json_only=config.json)
            aside = contextlib.redirect_stdout(sys.stderr if config.json else sys.stdout)
            with aside:  # what the user's own code prints
                result = JOBS[config.command](config, console)
            console.result(result)
        else:
            help_rank_0(ranks, config.device)
