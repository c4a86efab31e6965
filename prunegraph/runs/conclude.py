"""The end of a run: choose, fine-tune, open the test split once, report, write the files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prunegraph.core.budget import Cost
from prunegraph.core.console import Console
from prunegraph.core.files import write_json
from prunegraph.core.masks import ChannelMask
from prunegraph.core.precision import computes_bfloat16
from prunegraph.graph import StructureGraph
from prunegraph.runs.context import Mask, RunContext
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.measure import measure_rows
from prunegraph.runs.options.compare import RunConfig
from prunegraph.runs.plan import RECALIBRATED, Finetune, make_plan, rank_of
from prunegraph.runs.report.page import write_page
from prunegraph.runs.report.plots import Findings, draw, save_plots
from prunegraph.runs.report.report import (
    DenseResult,
    History,
    PrunedResult,
    Report,
    SearchResult,
    machine,
    versions,
    write_report,
)
from prunegraph.runs.report.speed import latencies, latency_warning
from prunegraph.runs.report.tables import methods_table
from prunegraph.runs.report.verdict import (
    DENSE,
    MethodRow,
    Metric,
    Unit,
    column,
    each_cell_once,
    judge,
    mean_by_name,
    proxy_correlation,
    pruned_rows,
)
from prunegraph.runs.store import Candidate, choose, write_masks
from prunegraph.runs.target import Target


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """What a command found for one network, before the test split is opened.

    Attributes:
        candidates: the masks of all methods.
        search: what the search cost; None without one.
        repaired: mean share of repaired bits; None without a search.
        history: learning curves of the searches.
        details: further entries of the report.
    """

    candidates: Sequence[Candidate]
    search: SearchResult | None = None
    repaired: float | None = None
    history: History = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


def conclude(
    config: RunConfig,
    context: RunContext,
    outcome: Outcome,
    cells: Sequence[Finetune],
    folder: RunFolder,
    console: Console,
) -> dict[str, Any]:
    """Open the test split, write all that a finished run leaves, print its table, return it."""
    rows = measure_rows(context, outcome.candidates, cells, folder, console)
    report = make_report(config, context, outcome, rows)
    masks = [candidate.mask for candidate in outcome.candidates]
    write_masks(folder.file(RunFolder.MASKS), masks)
    if outcome.history:
        write_json(folder.file(RunFolder.HISTORY), outcome.history, indent=None)
    findings = Findings(
        content=report.to_json(),
        structure=context.target.structure,
        masks={mask.digest(): mask for mask in masks},
        history=outcome.history,
    )
    plots = draw(findings)
    save_plots(plots, folder.file(folder.PLOTS))
    content = write_report(report, folder.file(RunFolder.REPORT), folder.digests())
    write_page(config, folder, findings, plots)
    console.table(methods_table(findings.content))
    warning = latency_warning(findings.content)
    if warning is not None:
        console.say(f"warning: {warning}")
    return content


def make_report(
    config: RunConfig,
    context: RunContext,
    outcome: Outcome,
    rows: Sequence[MethodRow],
) -> Report:
    """Return the report of measured rows."""
    plan = make_plan(config)
    metric = plan.metric(trained=context.trains)
    target, unit = context.target, Unit.of_task(context.target.task)
    chosen = choose(outcome.candidates, rank_of(context.options))
    own = next(row for row in rows if (row.name, row.seed) == (chosen.name, chosen.seed))
    dense = next(row for row in rows if row.name == DENSE)
    verdict, reason = judge(rows, metric, repaired=outcome.repaired, unit=unit)
    return Report(
        command=config.command,
        arch=target.arch,
        dataset=target.data_name,
        seed=config.seed,
        budget=context.budget,
        dense=DenseResult(
            cost=target.cost,
            test_accuracy=dense.test_accuracy_recalibrated,
            test_accuracy_finetuned=mean_by_name(rows, "test_accuracy_finetuned").get(DENSE),
        ),
        pruned=PrunedResult(
            cost=Cost(macs=own.macs, params=own.params),
            seed=chosen.seed,
            search_accuracy=own.search_accuracy,
            test_accuracy_recalibrated=own.test_accuracy_recalibrated,
            test_accuracy_finetuned=finetuned_mean(rows, own.digest),
            digest=own.digest,
            details=mask_widths(target, chosen.mask),
        ),
        search=outcome.search,
        methods=rows,
        verdict=verdict,
        verdict_reason=reason,
        details={
            **common_details(context, outcome, metric),
            **mask_details(context, chosen.mask),
            **outcome.details,
            **(_stages(rows, outcome, unit) if plan.finetunes else {}),
        },
    )


def _stages(rows: Sequence[MethodRow], outcome: Outcome, unit: Unit) -> dict[str, Any]:
    """Return what a comparison says of its first stage."""
    verdict = judge(rows, RECALIBRATED, repaired=outcome.repaired, unit=unit)
    return {
        "proxy_rank_correlation": proxy_correlation(rows),
        "stage_one_verdict": list(verdict),
    }


def finetuned_mean(rows: Sequence[MethodRow], digest: str) -> float | None:
    """Return the mean accuracy of the fine-tunes of the pruned network; None if there is none."""
    own = each_cell_once(pruned_rows(rows, digest))
    values = column(own, "test_accuracy_finetuned")
    return float(np.mean(values)) if values else None


def mask_widths(target: Target, mask: Mask) -> dict[str, Any]:
    """Return what the report's ``pruned`` tells of the mask: widths, or how many zeros where."""
    if isinstance(mask, ChannelMask):
        return {"widths": target.graph.group_widths(mask)}
    bits = mask.load()
    return {"sparsity": bits.sparsity, "pattern": str(bits.pattern), "densities": bits.densities}


def mask_details(context: RunContext, mask: Mask) -> dict[str, Any]:
    """Return the entries of a report about the mask that a run ends with, if it is of channels.

    ``peak_memory`` in bytes, ``latency_ms`` as ``speed.latencies`` returns it.
    """
    target = context.target
    if not isinstance(mask, ChannelMask):
        return {}
    return {
        "peak_memory": peak_memory(target.graph, mask),
        "latency_ms": latencies(target.as_loaded(), target.graph, mask, target.example_inputs),
    }


def peak_memory(graph: StructureGraph, mask: ChannelMask) -> dict[str, int]:
    """Return the bytes of activations alive at once for one image, before and after."""
    return {"dense": graph.peak_memory(graph.dense_mask()), "pruned": graph.peak_memory(mask)}


def common_details(context: RunContext, outcome: Outcome, metric: Metric) -> dict[str, Any]:
    """Return the entries of a report that say what it was made with."""
    target, structure = context.target, {}
    if target.structure is not None:
        structure = {
            "dense_widths": target.structure.group_widths(target.structure.dense_mask()),
            "graph": target.structure.fingerprint(),
        }
    return {
        "task": target.task.kind,
        "score_name": target.task.score_name,
        "higher_is_better": target.task.higher_is_better,
        "verdict_metric": metric,
        "repaired": outcome.repaired,
        **structure,
        "data": {
            name: {"samples": len(split), "fingerprint": split.fingerprint()}
            for name, split in target.splits.items()
        },
        "recipe": context.recipe_record(),
        "precision": "bfloat16" if computes_bfloat16(target.device) else "float32",
        "machine": machine(),
        "versions": versions(),
    }
