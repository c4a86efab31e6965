"""From a chosen mask to a fine-tuned network on disk, and back from disk for measuring."""

from pathlib import Path

from torch import nn

from prunegraph.artefacts.pruned import MASK_FILE, PrunedInfo, load_pruned, save_pruned
from prunegraph.core.console import Console
from prunegraph.core.masks import ChannelMask
from prunegraph.core.tensors import parameter_digest
from prunegraph.graph import copy_network
from prunegraph.models import build_model
from prunegraph.runs.bench import Bench
from prunegraph.runs.jobs import Workplace
from prunegraph.runs.prepare import Target, place
from prunegraph.runs.pretrain import train_network


def finetune_job(
    place: Workplace, number: int, mask: ChannelMask, directory: str, label: str, seed: int
) -> None:
    """Fine-tune a mask of network ``number`` into a folder of its run folder: a job."""
    folder = place.folders[number]
    finetune_mask(
        place.benches[number],
        mask,
        folder.file(directory),
        label=label,
        seed=seed,
        checkpoint=folder.finetune(directory),
        console=place.console,
        events=folder.events(label),
    )


def finetune_mask(
    bench: Bench,
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
        bench: the network.
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
    target = bench.target
    if mask == target.graph.dense_mask():
        model = copy_network(target.model)
    else:
        model = bench.final_evaluator.prune(mask)
    train_network(
        label,
        model,
        bench.finetune_images,
        bench.recipe(),
        seed=seed,
        checkpoint=checkpoint,
        console=console,
        teacher=bench.teacher,
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
