"""A run of a method that zeroes single weights: choose, fine-tune under the mask, measure, report.

Nothing is cut out: multiply-adds and parameters stay as they are, and the fine-tune leaves zeros
zero. The mask is made before the test split is opened.
"""

import dataclasses
import time
from typing import Any

from torch import Tensor, nn

from prunegraph.artefacts.masked import MaskedNetwork, load_masked, save_masked
from prunegraph.artefacts.pruned import MASK_FILE
from prunegraph.core.console import Console
from prunegraph.core.tensors import parameter_digest
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import copy_network
from prunegraph.layerwise.recalibrate import recalibrate_bn
from prunegraph.methods.method import Method, Result
from prunegraph.methods.registry import make_method
from prunegraph.runs.conclude import Outcome, common_details, mask_details
from prunegraph.runs.context import RunContext
from prunegraph.runs.finetune import finetune_mask, load_finetuned, pruned_info
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.config import PruneConfig
from prunegraph.runs.plan import RECALIBRATED
from prunegraph.runs.prepare import Target, build_dense, place
from prunegraph.runs.pretrain import train_network
from prunegraph.runs.report.report import (
    DenseResult,
    PrunedResult,
    Report,
    methods_table,
    read_report,
    write_report,
)
from prunegraph.runs.report.verdict import DENSE, MethodRow, judge
from prunegraph.tasks.classification import BATCH_SIZE


def run_weights(
    config: PruneConfig, context: RunContext, folder: RunFolder, console: Console
) -> dict[str, Any]:
    """Zero weights by a method, fine-tune, measure; return the report.

    Args:
        config: the command, whose method chooses a ``WeightMask``.
        context: the dense network, its weights final.
        folder: the run folder, which has been started.
        console: where progress goes.
    """
    started, method = time.monotonic(), make_method(config.method)
    result = method.prune(context.problem(seed=config.seed, max_networks=config.networks))
    seconds = round(time.monotonic() - started, 1)
    mask = result.mask
    assert isinstance(mask, WeightMask)
    before = zeroed(context, mask, result)
    _finetune(context, mask, before, folder, console)
    rows = weight_rows(context, method, mask, before, folder)
    own = dataclasses.replace(rows[1], networks_evaluated=result.networks, seconds=seconds)
    report = _report(config, context, mask, [rows[0], own])
    content = write_report(report, folder.file(folder.REPORT), folder.digests())
    folder.finish()
    console.table(methods_table(content))
    console.say(f"written to {folder.path}")
    return content


def show_weights(folder: RunFolder, console: Console) -> dict[str, Any]:
    """Print the table of a finished run, and return its report."""
    folder.finish()  # in case that the run was killed before it did
    content = read_report(folder)
    console.say(f"{folder.path} is finished; this is its report (a new --out runs it anew)")
    console.table(methods_table(content))
    return content


def zeroed(context: RunContext, mask: WeightMask, result: Result | None = None) -> nn.Module:
    """Return the network with zeros in place, or the method's own, its batch norm recalibrated."""
    task, given = context.target.task, None if result is None else result.model
    model = mask.apply(task.model) if given is None else copy_network(given)
    samples = task.train.sample(context.options.calibration_images, context.seed)
    batches = list(task.batches(samples, BATCH_SIZE))
    whole = batches[:-1] or batches  # each batch counts alike
    recalibrate_bn(model, whole, forward=task.forward, autocast=task.autocast)
    return model


def _finetune(
    context: RunContext, mask: WeightMask, before: nn.Module, folder: RunFolder, console: Console
) -> None:
    """Fine-tune the network under its mask, and the dense one; saved ones are left alone."""
    target, directory = context.target, folder.file(folder.PRUNED)
    if not (directory / MASK_FILE).is_file():  # written last
        model = copy_network(before)
        hold_zeros(model, mask)
        label = f"fine-tune {target.arch} under its mask"
        checkpoint = folder.finetune(folder.PRUNED)
        train_network(
            label,
            model,
            context.finetune_images,
            context.recipe(),
            seed=context.seed,
            checkpoint=checkpoint,
            console=console,
            teacher=context.teacher,
            events=folder.events(label),
            name=f"{parameter_digest(target.model)} {mask.digest()}",
        )
        save_masked(directory, model=model, mask=mask, info=pruned_info(target))
        checkpoint.unlink(missing_ok=True)
    finetune_mask(
        context,
        target.graph.dense_mask(),
        folder.file(folder.DENSE_FINETUNED),
        label=f"fine-tune {DENSE} of {target.arch}, seed {context.seed}",
        seed=context.seed,
        checkpoint=folder.finetune(folder.DENSE_FINETUNED),
        console=console,
    )


def hold_zeros(model: nn.Module, mask: WeightMask) -> None:
    """Let no gradient reach what a mask removes: SGD then leaves its zeros zero."""

    def hold(parameter: nn.Parameter, keep: Tensor) -> None:
        parameter.register_hook(lambda gradient: gradient * keep.to(gradient))

    for name, parameter in mask.parameters_of(model).items():
        hold(parameter, mask.keep[name])


def load_saved(target: Target, folder: RunFolder) -> MaskedNetwork:
    """Return the fine-tuned network of a run, ready to be measured.

    Raises:
        ArtefactError: a file is missing, damaged or of another network.
    """
    saved = load_masked(folder.file(folder.PRUNED), lambda: build_dense(pruned_info(target)))
    model = place(saved.model, target.device, target.example_inputs)
    return dataclasses.replace(saved, model=model)


def weight_rows(
    context: RunContext, method: Method, mask: WeightMask, before: nn.Module, folder: RunFolder
) -> list[MethodRow]:
    """Open the test split: return the rows of the dense network and of the one with zeros."""
    target = context.target
    dense, _ = load_finetuned(target, folder.file(folder.DENSE_FINETUNED))
    own = _row(context, target.model, dense, digest=target.graph.dense_mask().digest())
    zeros = _row(context, before, load_saved(target, folder).model, digest=mask.digest())
    return [
        dataclasses.replace(own, cell=folder.DENSE_FINETUNED, sparsity=0.0),
        dataclasses.replace(
            zeros,
            name=method.name,
            role=method.role,
            searches=method.searches,
            cell=folder.PRUNED,
            sparsity=mask.sparsity,
        ),
    ]


def _row(context: RunContext, before: nn.Module, tuned: nn.Module, digest: str) -> MethodRow:
    """Return a row of the dense network, measured before and after a fine-tune."""
    cost, trained = context.target.graph.dense_cost, context.recipe().epochs > 0
    recalibrated = context.test_accuracy(before)
    finetuned = context.test_accuracy(tuned) if trained else None
    return MethodRow(
        name=DENSE,
        role="control",
        searches=False,
        seed=context.seed,
        macs=cost.macs,
        params=cost.params,
        search_accuracy=context.search_accuracy(before),
        test_accuracy_recalibrated=recalibrated,
        test_accuracy_finetuned=finetuned,
        networks_evaluated=0,
        digest=digest,
        finetune_seed=context.seed,
        score=recalibrated if finetuned is None else finetuned,
    )


def _report(
    config: PruneConfig, context: RunContext, mask: WeightMask, rows: list[MethodRow]
) -> Report:
    target, (dense, own) = context.target, rows
    verdict, reason = judge(rows, RECALIBRATED)
    graph = target.graph
    return Report(
        command=config.command,
        arch=target.arch,
        dataset=target.dataset.name,
        seed=config.seed,
        budget=context.budget,
        dense=DenseResult(
            cost=graph.dense_cost,
            test_accuracy=dense.test_accuracy_recalibrated,
            test_accuracy_finetuned=dense.test_accuracy_finetuned,
        ),
        pruned=PrunedResult(
            cost=graph.dense_cost,
            seed=own.seed,
            search_accuracy=own.search_accuracy,
            test_accuracy_recalibrated=own.test_accuracy_recalibrated,
            test_accuracy_finetuned=own.test_accuracy_finetuned,
            widths=graph.group_widths(graph.dense_mask()),
            digest=own.digest,
        ),
        search=None,
        methods=rows,
        verdict=verdict,
        verdict_reason=reason,
        details={
            **common_details(context, Outcome(candidates=()), RECALIBRATED),
            **mask_details(context, graph.dense_mask()),
            "sparsity": mask.sparsity,
            "pattern": str(mask.pattern),
            "densities": mask.densities,
        },
    )
