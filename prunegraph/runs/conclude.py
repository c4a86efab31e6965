"""The end of a run: open the test split once, report, write the files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prunegraph.artefacts.masked import StoredMask
from prunegraph.artefacts.pruned import StoredChannels
from prunegraph.core.console import Console
from prunegraph.core.files import write_json
from prunegraph.core.masks import ChannelMask
from prunegraph.core.precision import computes_bfloat16
from prunegraph.core.reading import checked, read_json
from prunegraph.runs.context import RunContext
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.measure import Measured, measure_rows
from prunegraph.runs.options.compare import RunConfig
from prunegraph.runs.plan import RECALIBRATED, Finetune, make_plan
from prunegraph.runs.report.page import show_end, write_page
from prunegraph.runs.report.plots import Findings, draw, save_plots
from prunegraph.runs.report.report import (
    CLIENTS,
    GROUP,
    SCHEMA,
    History,
    machine,
    versions,
    write_report,
)
from prunegraph.runs.report.speed import BATCH, latencies
from prunegraph.runs.report.verdict import (
    DENSE,
    MethodRow,
    Unit,
    column,
    each_cell_once,
    judge,
    mean_by_name,
    proxy_correlation,
    pruned_rows,
)
from prunegraph.runs.store import Candidate, choose, write_masks


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """What a command found for one network, before the test split is opened.

    Attributes:
        candidates: the masks of all methods.
        search: what the agent's searches, or a policy's decision, cost; None without one.
        repaired: mean share of repaired bits; None without a search.
        history: learning curves of the searches.
        details: further entries of the report.
    """

    candidates: Sequence[Candidate]
    search: Mapping[str, Any] | None = None
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
    rows = measure_rows(Measured(context, folder), outcome.candidates, cells, console)
    target, chosen = context.target, choose(outcome.candidates).mask
    found = derived(config, context, outcome.candidates, rows, outcome.repaired)
    last = {name: found.pop(name) for name in ("verdict", "verdict_reason")}
    content = {
        "schema": SCHEMA,
        **found,
        "search": outcome.search,
        "methods": [row.to_json() for row in rows],
        **last,
        "repaired": outcome.repaired,
        "precision": "bfloat16" if computes_bfloat16(target.device) else "float32",
        "machine": machine(),
        "versions": versions(),
        **outcome.details,
    }
    shapes: dict[str, tuple[str, Any]] = {
        "layer_errors": ("errors", dict[str, float]),
        "selection": ("selection", dict[str, Any]),
        "groups": ("groups", GROUP),
        "clients": ("clients", CLIENTS),
    }
    for name, (part, shape) in shapes.items():
        if told := told_of(outcome.candidates, RunFolder.TOLD[part], shape):
            content[name] = told
    if isinstance(chosen, ChannelMask):
        model, inputs = target.as_loaded(), target.example_inputs
        content["latency_ms"] = latencies(model, target.graph, chosen, inputs, batch=BATCH)
    masks = [candidate.mask for candidate in outcome.candidates]
    write_masks(folder.file(RunFolder.MASKS), masks)
    if outcome.history:
        write_json(folder.file(RunFolder.HISTORY), outcome.history, indent=None)
    findings = Findings(
        content=content,
        structure=target.structure,
        masks={mask.digest(): mask for mask in masks},
        history=outcome.history,
    )
    plots = draw(findings)
    save_plots(plots, folder.file(folder.PLOTS))
    written = write_report(content, folder.file(RunFolder.REPORT), folder.digests())
    write_page(config, folder, findings, plots)
    show_end(content, console)
    return written


def told_of(candidates: Sequence[Candidate], file: str, shape: Any) -> dict[str, Any]:
    """Return what methods say of their first seed's network in a file beside it, by method."""
    found: dict[str, Any] = {}
    for candidate in candidates:
        mask = candidate.mask
        if isinstance(mask, StoredMask | StoredChannels) and candidate.name not in found:
            path = mask.where / file
            if path.is_file():
                found[candidate.name] = checked(read_json(path), shape, str(path))
    return found


def derived(
    config: RunConfig,
    context: RunContext,
    candidates: Sequence[Candidate],
    rows: Sequence[MethodRow],
    repaired: float | None,
) -> dict[str, Any]:
    """Return the entries of a report that follow from options, network, masks and rows.

    ``verify`` makes them anew.
    """
    plan, target, chosen = make_plan(config), context.target, choose(candidates)
    metric, unit = plan.metric(trained=context.trains), Unit.of_task(target.task)
    own = next(row for row in rows if (row.name, row.seed) == (chosen.name, chosen.seed))
    dense = next(row for row in rows if row.name == DENSE)
    verdict, reason = judge(rows, metric, repaired=repaired, unit=unit)
    content: dict[str, Any] = {
        "command": config.command,
        "arch": target.arch,
        "dataset": target.data_name,
        "seed": config.seed,
        "budget": context.budget.as_dict(),
        "dense": {
            "macs": target.cost.macs,
            "params": target.cost.params,
            "test_accuracy": dense.test_accuracy_recalibrated,
            "test_accuracy_finetuned": mean_by_name(rows, "test_accuracy_finetuned").get(DENSE),
        },
        "pruned": {
            "macs": own.macs,
            "params": own.params,
            "search_accuracy": own.search_accuracy,
            "test_accuracy_recalibrated": own.test_accuracy_recalibrated,
            "test_accuracy_finetuned": _finetuned_mean(rows, own.digest),
            **_what_stays(context, chosen),
            "seed": chosen.seed,
            "mask_digest": own.digest,
        },
        "verdict": verdict,
        "verdict_reason": reason,
        "task": target.task.kind,
        "score_name": unit.name,
        "higher_is_better": unit.higher_is_better,
        "verdict_metric": metric,
        "data": {
            name: {"samples": len(split), "fingerprint": split.fingerprint()}
            for name, split in target.splits.items()
        },
        "recipe": context.recipe_record(),
    }
    if isinstance(chosen.mask, ChannelMask):
        graph = target.graph
        content["graph"] = graph.fingerprint()
        content["dense_widths"] = graph.group_widths(graph.dense_mask())
        masks = {"dense": graph.dense_mask(), "pruned": chosen.mask}
        content["peak_memory"] = {name: graph.peak_memory(mask) for name, mask in masks.items()}
    if plan.finetunes:
        first = judge(rows, RECALIBRATED, repaired=repaired, unit=unit)
        content["stage_one_verdict"] = [*first]
        content["proxy_rank_correlation"] = proxy_correlation(rows)
    return content


def _what_stays(context: RunContext, chosen: Candidate) -> dict[str, Any]:
    """Return the widths of a mask of channels; of single weights how many are zero, and where."""
    if isinstance(chosen.mask, ChannelMask):
        return {"widths": context.target.graph.group_widths(chosen.mask)}
    bits = chosen.mask.load()
    return {
        "sparsity": bits.sparsity,
        "network_sparsity": bits.sparsity * bits.size / context.target.cost.params,
        "pattern": str(bits.pattern),
        "densities": bits.densities,
    }


def _finetuned_mean(rows: Sequence[MethodRow], digest: str) -> float | None:
    """Return the mean accuracy of the fine-tunes of the pruned network; None if there is none."""
    values = column(each_cell_once(pruned_rows(rows, digest)), "test_accuracy_finetuned")
    return float(np.mean(values)) if values else None
