"""From a chosen mask to a fine-tuned network on disk, and back from disk for measuring.

No figure of the test split is measured before every choice is made.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from prunegraph.artefacts.masked import MaskedNetwork, StoredMask, load_masked, save_masked
from prunegraph.artefacts.pruned import (
    MASK_FILE,
    PrunedNetwork,
    StoredChannels,
    artefact_paths,
    load_pruned,
    save_pruned,
)
from prunegraph.core.errors import ArtefactError
from prunegraph.core.files import write_json
from prunegraph.core.masks import ChannelMask
from prunegraph.core.reading import checked, read_json
from prunegraph.core.tensors import parameter_digest
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import copy_network
from prunegraph.models import resized_network
from prunegraph.runs.context import Mask, RunContext
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.parallel.jobs import Batch, Jobs, Workplace
from prunegraph.runs.plan import Finetune
from prunegraph.runs.pretrain import train_network
from prunegraph.runs.report.report import machine
from prunegraph.runs.target import Target

ACCURACY = RunFolder.ACCURACY

RECORD = {"test_accuracy_finetuned": float, "machine": dict[str, Any]}
"""What is kept of a fine-tuned network's accuracy."""


def run_finetunes(jobs: Jobs, plans: Sequence[Sequence[Finetune]]) -> None:
    """Make every network's fine-tunes; a mask and seed that two methods share once."""
    planned: dict[tuple[int, str], tuple[Any, ...]] = {}
    for number, (context, cells) in enumerate(zip(jobs.place.contexts, plans, strict=True)):
        for cell in cells:
            if cell.folder is None:
                continue
            label = f"fine-tune {cell.name} of {context.target.arch}, seed {cell.seed}"
            planned[number, cell.folder] = (number, cell.mask, cell.folder, label, cell.seed)
    folders, contexts = jobs.place.folders, jobs.place.contexts
    missing = [
        values for values in planned.values() if not _is_done(folders[values[0]].file(values[2]))
    ]
    trained = contexts[0].trains

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
    known = any(path.is_file() for path in (*artefact_paths(directory)[1:], directory / ACCURACY))
    if mask.is_file() and not known:
        mask.unlink()
    return mask.is_file()


def finetuned_accuracy(
    context: RunContext, directory: Path, mask: Mask | None, *, fresh: bool = False
) -> float:
    """Return the test utility of a fine-tuned network; no choice is left to make by then.

    Measured once on each machine; another machine's figure stands where the weights are not.

    Args:
        context: the network.
        directory: where the fine-tuned one lies.
        mask: what stays in it; None = everything.
        fresh: measure it where its weights are, whatever is known of it, and keep nothing.

    Raises:
        ArtefactError: the folder holds another mask's network.
    """
    path = directory / ACCURACY
    here = {**machine(), "device": str(context.target.device)}
    there = artefact_paths(directory)[1].is_file()
    record = read_accuracy(path) if path.is_file() and not (fresh and there) else {}
    if record.get("machine") != here and there:
        model = load_as_chosen(context, directory, mask)
        record = {"test_accuracy_finetuned": context.test_accuracy(model), "machine": here}
        if not fresh:
            write_json(path, record)
    accuracy: float = record["test_accuracy_finetuned"]
    return accuracy


def read_accuracy(path: Path) -> dict[str, Any]:
    """Return the test accuracy of a fine-tuned network, and the machine that measured it.

    Raises:
        ArtefactError: the file is damaged.
    """
    return dict(checked(read_json(path), RECORD, str(path)))


def load_as_chosen(context: RunContext, directory: Path, mask: Mask | None) -> nn.Module:
    """Return a saved network whose mask is the one that was chosen; None = everything stays.

    Raises:
        ArtefactError: it is another one's.
    """
    model, digest = load_finetuned(context, directory)
    wanted = context.target.whole if mask is None else mask
    known = wanted.name if isinstance(wanted, StoredMask | StoredChannels) else wanted.digest()
    if digest != known:
        msg = (
            f"{directory} holds the network of another mask than the one that is best here: give "
            "the command with the threads and on the machine that made it, or a new --out"
        )
        raise ArtefactError(msg)
    return model


def finetune_job(
    place: Workplace, number: int, mask: Mask | None, directory: str, label: str, seed: int
) -> None:
    """Prune and fine-tune network ``number`` into a folder of its run folder: a job.

    Args:
        place: the run's.
        number: of the network.
        mask: what stays; None gives the control: the dense network itself with the same fine-tune.
        directory: where the network goes; one that is saved already stays.
        label: what to call it in the progress.
        seed: seed of the fine-tune.
    """
    context, folder = place.contexts[number], place.folders[number]
    where = folder.file(directory)
    if (where / MASK_FILE).is_file():  # written last
        return
    model = copy_network(context.target.model) if mask is None else context.network(mask)
    bits = context.target.whole if mask is None else mask
    zeros = bits.load() if isinstance(bits, StoredMask) else None
    if context.trains:
        train_network(
            label,
            model,
            context.finetune_task,
            context.recipe(),
            seed=seed,
            checkpoint=folder.finetune(directory),
            console=place.console,
            teacher=context.teacher,
            events=folder.events(label),
            name=f"{parameter_digest(context.target.model)} {bits.digest()}",
            mask=zeros,
        )
    save_network(context.target, where, model, zeros or bits)
    folder.finetune(directory).unlink(missing_ok=True)


def save_network(
    target: Target, where: Path, model: nn.Module, mask: ChannelMask | WeightMask | StoredMask
) -> None:
    """Write a pruned network with what rebuilds it."""
    if isinstance(mask, ChannelMask):
        pretrained = None
        within = target.graph.origin is not None and target.graph.min_keep.all()
        if within and target.tokenizer is not None:  # its config holds it
            model, pretrained = resized_network(model, target.example_inputs), target.tokenizer
        save_pruned(
            where,
            model=model,
            mask=mask,
            graph=target.graph,
            info=target.saved,
            pretrained=pretrained,
        )
    else:
        bits = mask.load() if isinstance(mask, StoredMask) else mask
        tokenizer = target.tokenizer
        save_masked(where, model=model, mask=bits, info=target.saved, pretrained=tokenizer)


def load_finetuned(context: RunContext, directory: Path) -> tuple[nn.Module, str]:
    """Return a saved network, ready to be measured, and the digest of its mask.

    Raises:
        ArtefactError: a file is missing, damaged or of another network.
    """
    target = context.target
    saved: MaskedNetwork | PrunedNetwork
    if target.structure is None:
        saved = load_masked(directory, target.build)
    else:
        saved = load_pruned(directory, target.build, graph=target.structure)
    return context.placed(saved.model), saved.mask.digest()
