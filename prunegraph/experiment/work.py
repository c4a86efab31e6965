"""What each command does, once its options are read: this loads what help and mistakes need not."""

import contextlib
import sys

import torch

from prunegraph.experiment.config import CommonConfig
from prunegraph.experiment.console import Console
from prunegraph.experiment.loading import load
from prunegraph.experiment.machine import default_threads, keep_freed_memory
from prunegraph.experiment.ranks import help_rank_0, joined

JOBS = {
    "pretrain": "pretrain.run_pretrain",
    "train": "train.run_train",
    "apply": "apply.run_apply",
    "compare": "comparisons.run_comparisons",
    "inspect": "inspect.run_inspect",
    "export": "export.run_export",
    "verify": "verify_all.run_verify",
}
"""By the name of the command: module of this package and function."""


def work(config: CommonConfig) -> None:
    """Do what a command says, or help the rank that does, and print the result."""
    module, name = JOBS[config.command].split(".")
    job = getattr(load(f"prunegraph.experiment.{module}"), name)
    keep_freed_memory()
    torch.set_num_threads(config.threads or default_threads())
    with joined(config.device) as ranks:
        if ranks is None or ranks.first:
            console = Console(json_only=config.json)
            aside = contextlib.redirect_stdout(sys.stderr if config.json else sys.stdout)
            with aside:  # what the user's own code prints
                result = job(config, console)
            console.result(result)
        else:
            help_rank_0(ranks, config.device)
