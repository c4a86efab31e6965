"""Train the embedded language model on the embedded text: 145 seconds of a core."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from prunegraph.models.embedded_language import WINDOW, build_embedded, byte_tokenizer
from prunegraph.tasks.causal_lm import CausalLM, causal_lm
from prunegraph.training.loop import FinetuneConfig, FinetuneResult, Progress, Watch, finetune

EMBEDDED_EPOCHS = 12

RECIPE = FinetuneConfig(
    epochs=EMBEDDED_EPOCHS,
    batch_size=16,
    optimizer="adamw",
    peak_lr=4e-3,
    warmup_epochs=0.2,
    autocast=False,
)
"""bfloat16 takes longer on matrices as small as these."""


def embedded_task(
    model: nn.Module | None = None, *, seed: int = 0, whole: bool = False
) -> CausalLM:
    """Return the task of the embedded language model on the embedded text.

    Args:
        model: the network; None = one with fresh weights.
        seed: of the fresh weights, and of the draw of calibration windows.
        whole: all of the train text, to train on, in place of 16,384 tokens to calibrate on.

    Raises:
        ConfigError: transformers is not installed.
    """
    return causal_lm(
        build_embedded(seed) if model is None else model,
        byte_tokenizer(),
        window=WINDOW,
        calibration_tokens=None if whole else 16_384,
        seed=seed,
        name="embedded",
    )


def train_embedded(
    *,
    seed: int = 0,
    epochs: int = EMBEDDED_EPOCHS,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> tuple[nn.Module, FinetuneResult]:
    """Train the embedded language model from scratch; nothing is read or kept but the checkpoint.

    Save it with ``save_pretrained_layout(model, byte_tokenizer(), folder)``.

    Args:
        seed: of weights and order.
        epochs: passes over the train text.
        checkpoint: where an interrupted training is kept, and goes on from (``finetune``).
        progress: see ``finetune``.
        watch: see ``finetune``.

    Returns:
        The network in eval mode, losses and times.

    Raises:
        ConfigError: transformers is not installed.
        ArtefactError: the checkpoint is damaged or of another training.
    """
    task = embedded_task(seed=seed, whole=True)
    trained = finetune(
        task.model,
        task,
        replace(RECIPE, epochs=epochs),
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
        watch=watch,
    )
    return task.model, trained
