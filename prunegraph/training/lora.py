"""LoRA in a training: small matrices learn beside weights that stand still, and are merged."""

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from prunegraph.core.errors import ModelError
from prunegraph.core.extras import library
from prunegraph.core.seeding import seeded

SCALE = 2.0
"""Of the product of the small matrices, as LLM-Pruner recovers networks (Ma et al. 2023, arXiv
2305.11627: rank 8, alpha 16)."""


@contextmanager
def adapters(model: nn.Module, rank: int, seed: int) -> Iterator[None]:
    """Let ``W + SCALE * B A`` take the place of weights W while the block runs, and of W after it.

    Hu et al. 2022, "LoRA", arXiv 2106.09685, equation 3. Those of linear layers, and of
    convolutions without groups, unless two modules share the weight or it requires no gradient.
    Nothing else is trained.

    Args:
        model: the network, changed in place; no module of it is of peft afterwards.
        rank: rows of A ``[rank, in]`` and columns of B ``[out, rank]``.
        seed: draws A; B begins with zeros.

    Raises:
        ConfigError: peft is not installed.
        ModelError: the network has no such layer whose weight may be trained.
    """
    peft = peft_library()
    trained = [item for item in model.parameters() if item.requires_grad]
    names = _layers(model)
    if not names:
        msg = (
            "the network has no linear layer or convolution that LoRA serves and that requires a "
            "gradient: leave lora_rank out, or unfreeze those to be trained"
        )
        raise ModelError(msg)
    config = peft.LoraConfig(
        r=rank, lora_alpha=SCALE * rank, target_modules="|".join(map(re.escape, names))
    )
    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that store weights the other way round
        tuner = peft.LoraModel(model, config, "default")
    try:
        yield
    finally:
        tuner.merge_and_unload()
        for item in trained:
            item.requires_grad_()


def _layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that get small matrices."""
    from transformers.pytorch_utils import Conv1D  # peft depends on it

    uses = Counter(map(id, _weights(model)))
    return [
        name
        for name, module in model.named_modules()
        if name
        and type(module) in (nn.Linear, nn.Conv2d, Conv1D)
        and getattr(module, "groups", 1) == 1
        and uses[id(module.weight)] == 1
        and module.weight.requires_grad
    ]


def _weights(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        yield from module.parameters(recurse=False)


def peft_library() -> Any:
    """Return the library peft, which is loaded when it is first needed.

    Raises:
        ConfigError: it is not installed.
    """
    return library("LoRA needs", "peft", "lora", otherwise=", or train all weights")
