"""The end of a run: choose, fine-tune, open the test split once, report, write the files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prunegraph.core.budget import Budget
from prunegraph.core.console import Console
from prunegraph.core.errors import ArtefactError
from prunegraph.core.files import write_json
from prunegraph.core.masks import ChannelMask
from prunegraph.core.precision import computes_bfloat16
from prunegraph.graph import StructureGraph
from prunegraph.graph.apply import unequal
from prunegraph.runs.bench import Bench
from prunegraph.runs.finetune import finetune_job, load_finetuned
from prunegraph.runs.finetune_plan import rank_of
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.jobs import Batch, Jobs
from prunegraph.runs.measured import Measured
from prunegraph.runs.options.config import CommonConfig
from prunegraph.runs.report.page import write_page
from prunegraph.runs.report.plots import Findings, draw, save_plots
from prunegraph.runs.report.report import (
    DenseResult,
    History,
    PrunedResult,
    Report,
    SearchResult,
    machine,
    methods_table,
    versions,
    write_report,
)
from prunegraph.runs.report.speed import latencies, latency_warning
from prunegraph.runs.report.verdict import (
    DENSE,
    MethodRow,
    Metric,
    column,
    each_cell_once,
    judge,
    mean_by_name,
    pruned_rows,
)
from prunegraph.runs.store import Candidate, choose, write_masks


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


def finetune_chosen(jobs: Jobs, outcomes: Sequence[Outcome]) -> None:
    """Fine-tune each network's chosen mask and its dense control; saved ones are left alone.

    Everything up to here looks at train and search images only.
    """
    arguments = []
    for number, (bench, outcome) in enumerate(zip(jobs.place.benches, outcomes, strict=True)):
        target, chosen = bench.target, choose(outcome.candidates, rank_of(bench.options)).mask
        problem = unequal(target.model, target.graph, chosen, target.example_inputs)
        if problem is not None:
            jobs.place.console.say(f"warning: {problem}")
        for name, mask, directory in (
            ("pruned", chosen, RunFolder.PRUNED),
            ("dense", target.graph.dense_mask(), RunFolder.DENSE_FINETUNED),
        ):
            label = f"fine-tune {name} {target.arch}"
            arguments.append((number, mask, directory, label, bench.seed))
    finetunes = Batch(
        label="fine-tunes",
        job=finetune_job,
        arguments=arguments,
        trains=True,
        quick=not jobs.place.benches[0].recipe().epochs,
    )
    jobs.run(finetunes)


def finalise(
    config: CommonConfig, bench: Bench, outcome: Outcome, folder: RunFolder, console: Console
) -> dict[str, Any]:
    """Measure the fine-tuned networks, report, and return the report."""
    chosen = choose(outcome.candidates, rank_of(bench.options))
    rows = _measure_rows(bench, outcome.candidates, chosen, folder, console)
    report = make_report(config, bench, outcome, rows, "test_accuracy_recalibrated")
    return conclude(config, bench, outcome, report, folder, console)


def conclude(
    config: CommonConfig,
    bench: Bench,
    outcome: Outcome,
    report: Report,
    folder: RunFolder,
    console: Console,
) -> dict[str, Any]:
    """Write all that a finished run leaves, print its table, and return its report."""
    masks = [candidate.mask for candidate in outcome.candidates]
    write_masks(folder.file(RunFolder.MASKS), masks)
    if outcome.history:
        write_json(folder.file(RunFolder.HISTORY), outcome.history, indent=None)
    findings = Findings(
        content=report.to_json(),
        graph=bench.target.graph,
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


def _measure_rows(
    bench: Bench,
    candidates: Sequence[Candidate],
    chosen: Candidate,
    folder: RunFolder,
    console: Console,
) -> list[MethodRow]:
    """Open the test split: measure every row, the dense control first."""
    dense, _ = load_finetuned(bench.target, folder.file(RunFolder.DENSE_FINETUNED))
    trained = bench.recipe().epochs > 0
    accuracy = bench.test_accuracy(dense) if trained else None
    measured = Measured(bench, folder)
    rows = [dense_row(measured, accuracy, bench.seed, RunFolder.DENSE_FINETUNED)]
    pruned, mask = load_finetuned(bench.target, folder.file(folder.PRUNED))
    if mask != chosen.mask:
        msg = (
            f"{folder.path} holds the network of another mask than the one that is best here: give "
            "the command with the threads and on the machine that made it, or a new --out"
        )
        raise ArtefactError(msg)
    with console.progress("measure on test images", len(candidates)) as report:
        for number, candidate in enumerate(candidates, start=1):
            finetuned = candidate is chosen
            rows.append(
                candidate_row(
                    measured,
                    candidate,
                    finetuned=bench.test_accuracy(pruned) if finetuned and trained else None,
                    finetune_seed=bench.seed if finetuned else None,
                    cell=folder.PRUNED if finetuned else None,
                )
            )
            report(number)
    return rows


def candidate_row(
    measured: Measured,
    candidate: Candidate,
    *,
    finetuned: float | None = None,
    finetune_seed: int | None = None,
    cell: str | None = None,
) -> MethodRow:
    """Return a candidate's row, its recalibrated network measured on search and test images.

    All rows are measured in this process: the last digits depend on the number of threads.
    """
    graph = measured.bench.target.graph
    cost = graph.cost(candidate.mask)
    return MethodRow(
        name=candidate.name,
        seed=candidate.seed,
        macs=cost.macs,
        params=cost.params,
        search_accuracy=measured.search(candidate.mask),
        test_accuracy_recalibrated=measured.test(candidate.mask),
        test_accuracy_finetuned=finetuned,
        networks_evaluated=candidate.networks_evaluated,
        digest=candidate.mask.digest(),
        finetune_seed=finetune_seed,
        cell=cell,
        seconds=round(candidate.seconds, 1) if candidate.seconds else None,
        memory=limited_memory(graph, candidate.mask, measured.bench.budget),
    )


def dense_row(measured: Measured, finetuned: float | None, seed: int, cell: str) -> MethodRow:
    """Return a row of the dense control."""
    graph = measured.bench.target.graph
    cost = graph.dense_cost
    return MethodRow(
        name=DENSE,
        seed=seed,
        macs=cost.macs,
        params=cost.params,
        search_accuracy=measured.search(None),
        test_accuracy_recalibrated=measured.test(None),
        test_accuracy_finetuned=finetuned,
        networks_evaluated=0,
        digest=graph.dense_mask().digest(),
        finetune_seed=seed,
        cell=cell,
        memory=limited_memory(graph, graph.dense_mask(), measured.bench.budget),
    )


def limited_memory(graph: StructureGraph, mask: ChannelMask, budget: Budget) -> int | None:
    """Return the peak memory of a pruned network in bytes; None where the budget limits none."""
    return None if budget.max_memory is None else graph.peak_memory(mask)


def make_report(
    config: CommonConfig,
    bench: Bench,
    outcome: Outcome,
    rows: Sequence[MethodRow],
    metric: Metric,
    details: Mapping[str, Any] | None = None,
) -> Report:
    """Return the report of measured rows, judged by ``metric``; ``details`` are further entries."""
    target, graph = bench.target, bench.target.graph
    chosen = choose(outcome.candidates, rank_of(bench.options))
    own = next(row for row in rows if (row.name, row.seed) == (chosen.name, chosen.seed))
    dense = next(row for row in rows if row.name == DENSE)
    verdict, reason = judge(rows, metric, repaired=outcome.repaired)
    return Report(
        command=config.command,
        arch=target.arch,
        dataset=target.dataset.name,
        seed=config.seed,
        budget=bench.budget,
        dense=DenseResult(
            cost=graph.dense_cost,
            test_accuracy=dense.test_accuracy_recalibrated,
            test_accuracy_finetuned=mean_by_name(rows, "test_accuracy_finetuned").get(DENSE),
        ),
        pruned=PrunedResult(
            cost=graph.cost(chosen.mask),
            seed=chosen.seed,
            search_accuracy=own.search_accuracy,
            test_accuracy_recalibrated=own.test_accuracy_recalibrated,
            test_accuracy_finetuned=finetuned_mean(rows, chosen.mask.digest()),
            widths=graph.group_widths(chosen.mask),
            digest=chosen.mask.digest(),
        ),
        search=outcome.search,
        methods=rows,
        verdict=verdict,
        verdict_reason=reason,
        details={
            **common_details(bench, outcome, metric),
            **mask_details(bench, chosen.mask),
            **outcome.details,
            **(details or {}),
        },
    )


def finetuned_mean(rows: Sequence[MethodRow], digest: str) -> float | None:
    """Return the mean accuracy of the fine-tunes of the pruned network; None if there is none."""
    own = each_cell_once(pruned_rows(rows, digest))
    values = column(own, "test_accuracy_finetuned")
    return float(np.mean(values)) if values else None


def mask_details(bench: Bench, mask: ChannelMask) -> dict[str, Any]:
    """Return the entries of a report about the mask that a run ends with.

    ``peak_memory`` in bytes, ``latency_ms`` as ``speed.latencies`` returns it.
    """
    target = bench.target
    return {
        "peak_memory": peak_memory(target.graph, mask),
        "latency_ms": latencies(target.as_loaded(), target.graph, mask, target.example_inputs),
    }


def peak_memory(graph: StructureGraph, mask: ChannelMask) -> dict[str, int]:
    """Return the bytes of activations alive at once for one image, before and after."""
    return {"dense": graph.peak_memory(graph.dense_mask()), "pruned": graph.peak_memory(mask)}


def common_details(bench: Bench, outcome: Outcome, metric: Metric) -> dict[str, Any]:
    """Return the entries of a report that say what it was made with."""
    target, dataset = bench.target, bench.target.dataset
    splits = {"train": dataset.train, "search": dataset.search, "test": dataset.test}
    return {
        "verdict_metric": metric,
        "repaired": outcome.repaired,
        "dense_widths": target.graph.group_widths(target.graph.dense_mask()),
        "graph": target.graph.fingerprint(),
        "data": {
            name: {"images": len(split), "fingerprint": split.fingerprint()}
            for name, split in splits.items()
        },
        "recipe": bench.recipe_record(),
        "precision": "bfloat16" if computes_bfloat16(target.device) else "float32",
        "machine": machine(),
        "versions": versions(),
    }
