"""Which samples each client of a federation has: the same for all, or each its own classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prunegraph.core.errors import ConfigError
from prunegraph.core.splits import ReadyBatches, SearchSplit, Split, TrainSplit
from prunegraph.core.task import Task

TRIES = 100
"""Draws of shares until every client has samples."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ClientData:
    """What one client has.

    Attributes:
        train: what it trains on.
        search: samples of the same classes that it does not; None: the task has none.
    """

    train: TrainSplit
    search: SearchSplit | None


def client_data(
    task: Task, clients: int, dirichlet: float | None, seed: int
) -> tuple[ClientData, ...]:
    """Return what each client has; together they have every sample once.

    Args:
        task: whose train split is divided, and its search split alike.
        clients: how many.
        dirichlet: concentration of each class's shares (Hsu et al. 2019, arXiv 1909.06335): small =
            few classes a client; None: samples at random.
        seed: of the draw.

    Raises:
        ConfigError: more clients than samples, one without data, or classes that are not known.
    """
    train, search = task.train, task.search
    least = 1 if isinstance(train.source, ReadyBatches) else 2  # of one, no norm can be trained
    if clients * least > len(train):
        what = "batches" if least == 1 else "train samples"
        msg = f"clients={clients} is too many for {len(train)} {what}: each needs at least {least}"
        raise ConfigError(msg)
    rng = np.random.default_rng(seed)
    if dirichlet is None:
        parts = _at_random(len(train), clients, rng)
        others = [] if search is None else _at_random(len(search), clients, rng)
    else:
        labels = _labels(task, train)
        classes = int(labels.max()) + 1
        for _ in range(TRIES):
            shares = rng.dirichlet([dirichlet] * clients, size=classes)  # [classes, clients]
            parts = _by_class(labels, shares, rng)
            if min(map(len, parts)) >= least:
                break
        else:
            msg = (
                f"dirichlet={dirichlet:g} leaves one of {clients} clients without data, in "
                f"{TRIES} draws of {len(train)} samples: give a larger one, or fewer clients"
            )
            raise ConfigError(msg)
        others = [] if search is None else _by_class(_labels(task, search), shares, rng)
    held: list[SearchSplit | None] = [None] * clients
    if search is not None:
        held = [search.take(part) for part in others]
    return tuple(
        ClientData(train=train.take(part), search=own)
        for part, own in zip(parts, held, strict=True)
    )


def _labels(task: Task, split: Split) -> Tensor:
    labels = getattr(split.source, "labels", None)
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        msg = f"{task.name} has no class for each sample, which dirichlet divides by: leave it out"
        raise ConfigError(msg)
    return labels[split.index]


def _at_random(count: int, clients: int, rng: np.random.Generator) -> Sequence[Tensor]:
    return torch.from_numpy(rng.permutation(count)).tensor_split(clients)


def _by_class(labels: Tensor, shares: np.ndarray, rng: np.random.Generator) -> list[Tensor]:
    """Return each client's positions, of each class by its shares."""
    parts: list[list[Tensor]] = [[] for _ in range(shares.shape[1])]
    for number, share in enumerate(shares):
        own = (labels == number).nonzero().flatten()
        own = own[torch.from_numpy(rng.permutation(len(own)))]
        ends = np.rint(np.cumsum(share)[:-1] * len(own)).astype(int)
        for part, piece in zip(parts, own.tensor_split(ends.tolist()), strict=True):
            part.append(piece)
    return [torch.cat(part).sort().values for part in parts]
