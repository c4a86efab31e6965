"""The optimizers of the training loop."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

Optimizer = Literal["sgd", "adamw"]

MOMENTUM, ADAMW_BETA2 = 0.9, 0.99
"""Of both optimizers; of AdamW. For some hundred steps: the usual 0.999 averages over a thousand."""

SGD_DECAY, ADAMW_DECAY = 5e-4, 0.01
"""Weight decay of all parameters."""


def make_optimizer(
    kind: Optimizer, parameters: Iterable[nn.Parameter], lr: float
) -> torch.optim.Optimizer:
    """Return a new optimizer.

    Args:
        kind: ``"sgd"`` with Nesterov momentum, or ``"adamw"`` (Loshchilov and Hutter 2019, arXiv
            1711.05101).
        parameters: what it trains.
        lr: learning rate.
    """
    if kind == "adamw":
        betas = (MOMENTUM, ADAMW_BETA2)
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=ADAMW_DECAY)
    return torch.optim.SGD(
        parameters, lr=lr, momentum=MOMENTUM, nesterov=True, weight_decay=SGD_DECAY
    )
