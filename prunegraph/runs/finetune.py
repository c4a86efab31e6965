"""From a chosen mask to a fine-tuned network on disk, and back from disk for measuring.

No figure of the test split is measured before every choice is made.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from prunegraph.artefacts.pruned import (
    MASK_FILE,
    WEIGHTS_FILE,
    PrunedInfo,
    load_pruned,
    save_pruned,
)
from prunegraph.core.console import Console
from prunegraph.core.errors import ArtefactError
from prunegraph.core.files import write_json
from prunegraph.core.masks import ChannelMask
from prunegraph.core.reading import checked, read_json
from prunegraph.core.tensors import parameter_digest
from prunegraph.graph import copy_network
from prunegraph.models import build_model
from prunegraph.runs.context import RunContext
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.parallel.jobs import Batch, Jobs, Workplace
from prunegraph.runs.plan import Finetune
from prunegraph.runs.prepare import Target, place
from prunegraph.runs.pretrain import train_network
from prunegraph.runs.report.report import machine

ACCURACY = {"test_accuracy_finetuned": float, "machine": dict[str, Any]}
"""What is kept of a fine-tuned network's accuracy."""


def run_finetunes(jobs: Jobs, plans: Sequence[Sequence[Finetune]]) -> None:
    """Make every network's fine-tunes; a mask and seed that two methods share once."""
    planned: dict[tuple[int, str], tuple[Any, ...]] = {}
    for number, (context, cells) in enumerate(zip(jobs.place.contexts, plans, strict=True)):
        graph = context.target.graph
        for cell in cells:
            mask = graph.dense_mask() if cell.candidate is None else cell.candidate.mask
            label = f"fine-tune {cell.name} of {context.target.arch}, seed {cell.seed}"
            planned[number, cell.folder] = (number, mask, cell.folder, label, cell.seed)
    folders, contexts = jobs.place.folders, jobs.place.contexts
    missing = [
        values for values in planned.values() if not _is_done(folders[values[0]].file(values[2]))
    ]
    trained = contexts[0].recipe().epochs > 0

    def measure(values: tuple[Any, ...], _: None) -> None:
        number, mask, directory = values[:3]
        if trained:
            finetuned_accuracy(contexts[number], folders[number].file(directory), mask)

    finetunes = Batch(
        label="fine-tunes",
        job=finetune_job,
        arguments=missing,
        keep=measure,
        planned=len(planned),
        trains=True,
        quick=not trained,
    )
    jobs.run(finetunes)


def _is_done(directory: Path) -> bool:
    """Return whether a network can be measured or was; one that has lost its weights is not."""
    mask = directory / MASK_FILE
    known = any((directory / name).is_file() for name in (WEIGHTS_FILE, RunFolder.ACCURACY))
    if mask.is_file() and not known:
        mask.unlink()
    return mask.is_file()


def finetuned_accuracy(context: RunContext, directory: Path, mask: ChannelMask) -> float:
    """Return the test accuracy of a fine-tuned network; no choice is left to make by then.

    Measured once on each machine; another machine's figure stands where the weights are not.

    Raises:
        ArtefactError: the folder holds another mask's network.
    """
    path = directory / RunFolder.ACCURACY
    record = read_accuracy(path) if path.is_file() else {}
    here = {**machine(), "device": str(context.target.device)}
    if record.get("machine") != here and (directory / WEIGHTS_FILE).is_file():
        model = load_as_chosen(context.target, directory, mask)
        record = {"test_accuracy_finetuned": context.test_accuracy(model), "machine": here}
        write_json(path, record)
    accuracy: float = record["test_accuracy_finetuned"]
    return accuracy


def read_accuracy(path: Path) -> dict[str, Any]:
    """Return the test accuracy of a fine-tuned network, and the machine that measured it.

    Raises:
        ArtefactError: the file is damaged.
    """
    return dict(checked(read_json(path), ACCURACY, str(path)))


def load_as_chosen(target: Target, directory: Path, mask: ChannelMask) -> nn.Module:
    """Return a saved network whose mask is the one that was chosen.

    Raises:
        ArtefactError: it is another one's.
    """
    model, saved = load_finetuned(target, directory)
    if saved != mask:
        msg = (
            f"{directory} holds the network of another mask than the one that is best here: give "
            "the command with the threads and on the machine that made it, or a new --out"
        )
        raise ArtefactError(msg)
    return model


def finetune_job(
    place: Workplace, number: int, mask: ChannelMask, directory: str, label: str, seed: int
) -> None:
    """Fine-tune a mask of network ``number`` into a folder of its run folder: a job."""
    folder = place.folders[number]
    finetune_mask(
        place.contexts[number],
        mask,
        folder.file(directory),
        label=label,
        seed=seed,
        checkpoint=folder.finetune(directory),
        console=place.console,
        events=folder.events(label),
    )


def finetune_mask(
    context: RunContext,
    mask: ChannelMask,
    directory: Path,
    *,
    label: str,
    seed: int,
    checkpoint: Path,
    console: Console,
    events: Path | None = None,
) -> None:
    """Prune, recalibrate, fine-tune and save a mask's network, unless it is saved already.

    The dense mask gives the control: the dense network itself with the same fine-tune.

    Args:
        context: the network.
        mask: what stays.
        directory: where the network goes.
        label: what to call it in the progress.
        seed: seed of the fine-tune.
        checkpoint: where an interrupted fine-tune is kept.
        console: where progress goes.
        events: folder for TensorBoard's curve of the loss, or None.
    """
    if (directory / MASK_FILE).is_file():  # written last
        return
    target = context.target
    if mask == target.graph.dense_mask():
        model = copy_network(target.model)
    else:
        model = context.final_evaluator.prune(mask)
    train_network(
        label,
        model,
        context.finetune_images,
        context.recipe(),
        seed=seed,
        checkpoint=checkpoint,
        console=console,
        teacher=context.teacher,
        events=events,
        name=f"{parameter_digest(target.model)} {mask.digest()}",
    )
    save_pruned(directory, model=model, mask=mask, graph=target.graph, info=pruned_info(target))
    checkpoint.unlink(missing_ok=True)


def pruned_info(target: Target) -> PrunedInfo:
    """Return what is written beside a pruned network: how its dense one is built."""
    return PrunedInfo(
        arch=target.arch,
        num_classes=target.dataset.num_classes,
        example_shape=tuple(target.example_inputs.shape),
        mean=target.dataset.mean,
        std=target.dataset.std,
        extra={"dataset": target.dataset.name, "classes": list(target.dataset.class_names)},
    )


def load_finetuned(target: Target, directory: Path) -> tuple[nn.Module, ChannelMask]:
    """Return a saved network, ready to be measured, and its mask.

    Raises:
        ArtefactError: a file is missing, damaged or of another network.
    """
    dataset = target.dataset
    saved = load_pruned(
        directory,
        lambda: build_model(
            target.arch, num_classes=dataset.num_classes, image_shape=dataset.image_shape
        ),
        graph=target.graph,
    )
    return place(saved.model, target.device, target.example_inputs), saved.mask
