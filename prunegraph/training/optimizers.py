"""The optimizers of the training loop."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

Optimizer = Literal["sgd", "adamw"]

ADAMW_BETA2 = 0.99
"""For some hundred steps: the usual 0.999 averages over a thousand."""


def make_optimizer(
    kind: Optimizer,
    parameters: Iterable[nn.Parameter],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Return a new optimizer.

    Args:
        kind: ``"sgd"`` with Nesterov momentum, or ``"adamw"`` (Loshchilov and Hutter 2019, arXiv
            1711.05101).
        parameters: what it trains.
        lr: learning rate.
        momentum: of SGD; of AdamW the decay of its first average.
        weight_decay: of all parameters.
    """
    if kind == "adamw":
        betas = (momentum, ADAMW_BETA2)
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
    return torch.optim.SGD(
        parameters, lr=lr, momentum=momentum, nesterov=True, weight_decay=weight_decay
    )
