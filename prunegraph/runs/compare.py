"""``prunegraph compare``: the agent and every baseline at one budget, in two stages.

Stage 1 recalibrates every row and looks at search images only. Stage 2 fine-tunes eight rows and
the dense control with every seed; the rows are chosen on the search split before the test split is
opened. Every fine-tuned network lies in ``cells/``; an interrupted comparison goes on where it was,
on another machine too: finished cells need not bring their weights, which are most of a folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prunegraph.artefacts.pruned import MASK_FILE, WEIGHTS_FILE
from prunegraph.core.console import Console, seconds_in_words
from prunegraph.core.files import write_json
from prunegraph.core.reading import checked, read_json
from prunegraph.graph import copy_network
from prunegraph.runs.agent_options import DEFAULT_SUBSET
from prunegraph.runs.agent_rows import add_beginnings, agent_batch, agent_name, agent_summary
from prunegraph.runs.baselines import (
    CONTROL_CRITERIA,
    TORCH_PRUNING,
    add_controls,
    baseline_batches,
    check_baselines,
    check_methods,
    heuristics,
)
from prunegraph.runs.bench import Bench
from prunegraph.runs.conclude import Outcome, candidate_row, conclude, dense_row, make_report
from prunegraph.runs.dense import warn_of_network
from prunegraph.runs.finetune import finetune_job, load_finetuned
from prunegraph.runs.finetune_plan import ALWAYS, BEST_SEARCHES, Cell, finetune_seeds_of, plan_cells
from prunegraph.runs.folder import RunFolder, open_run
from prunegraph.runs.jobs import Batch, Jobs, make_workplace
from prunegraph.runs.measured import Measured, settle
from prunegraph.runs.options.compare import CompareConfig
from prunegraph.runs.policies import pin_policy
from prunegraph.runs.prepare import Target, check_trainable, load_target
from prunegraph.runs.ray_pool import load_ray
from prunegraph.runs.report.page import show_finished
from prunegraph.runs.report.report import machine
from prunegraph.runs.report.verdict import (
    SAMPLER,
    SEARCHES,
    MethodRow,
    Metric,
    judge,
    proxy_correlation,
    searches,
    verdict_line,
)
from prunegraph.runs.store import Candidate, CandidateStore
from prunegraph.runs.train import check_networks, run_name
from prunegraph.tasks.image_classification import training_task
from prunegraph.training.loop import finetune

METRIC: Metric = "test_accuracy_finetuned"
"""What the verdict of a comparison is about, if its rows are fine-tuned."""

ACCURACY = {"test_accuracy_finetuned": float, "machine": dict[str, Any]}
"""What it holds."""

PLAN_IMAGES = 1024
"""Training images by which the time of the fine-tunes is predicted."""


def run_compare(config: CompareConfig, console: Console) -> dict[str, Any]:
    """Compare, print the table and the verdict, and return the report."""
    check_methods(config.methods)
    target = load_target(config, config.budget())
    check_searches(target, config)
    check_trainable(target, config)
    folder = open_run(config, config.out, f"compare-{run_name([target], config.budget())}")
    if folder.finished:
        return show_finished(config, [folder], [target.graph], console)
    with folder.started(config):
        console.say(f"run folder: {folder.path}")
        pin_policy(config.policy, folder.checkpoint(folder.BEGUN_WITH))
        place = make_workplace(config, [target], [folder], console)
        bench = place.benches[0]
        warn_of_network(bench, console)
        with Jobs(config, place) as jobs:
            _say_plan(bench, config, jobs.num_workers, console)
            outcome = _stage_one(config, jobs)
            cells = plan_cells(bench, outcome.candidates, config)
            _stage_two(jobs, cells)
        content = _finish(config, bench, outcome, cells, folder, console)
        folder.finish()
        console.say(verdict_line(content))
        console.say(f"written to {folder.path}")
        return content


def check_searches(target: Target, config: CompareConfig) -> None:
    """Raise an error if the agent or a baseline could not do its work with so many networks."""
    if config.ray is not None:
        load_ray()
    if not config.no_agent or SAMPLER in wanted(config):
        check_networks([target], config, config.budget())
    check_baselines(wanted(config), target.graph, config.networks)


def seeds_of(config: CompareConfig) -> list[int]:
    """Return the seeds of searches."""
    return [config.seed + number for number in range(config.seeds)]


def wanted(config: CompareConfig) -> tuple[str, ...]:
    """Return the baselines of stage 1."""
    groups = {
        "heuristics": heuristics(),
        "all": (*heuristics(), *SEARCHES, SAMPLER),
        "torch_pruning": TORCH_PRUNING,
    }
    names = [name for method in config.methods for name in groups.get(method, (method,))]
    return tuple(dict.fromkeys(names))


def _stage_one(config: CompareConfig, jobs: Jobs) -> Outcome:
    """Let the agent and the baselines choose their masks."""
    bench, folder = jobs.place.benches[0], jobs.place.folders[0]
    store = CandidateStore(folder.checkpoint(folder.CANDIDATES), bench.target.graph)
    seeds = seeds_of(config)
    batches = [*baseline_batches([store], wanted(config), config, seeds=seeds)]
    if not config.no_agent:
        batches.insert(0, agent_batch(jobs.place, [store], config, seeds=seeds))
    jobs.run(*batches)
    settle(bench, store, folder, jobs.place.console)
    if config.no_agent:
        return Outcome(candidates=list(store))
    summary = agent_summary(jobs.place, [store], config, seeds=seeds)
    add_beginnings(bench, store, config, seeds)
    add_controls(bench, store, store.named(agent_name(config)), jobs.place.console)
    return Outcome(
        candidates=list(store),
        search=summary.result,
        repaired=summary.repaired,
        history=summary.histories[0],
    )


def _stage_two(jobs: Jobs, cells: Sequence[Cell]) -> None:
    """Fine-tune every cell; a mask and seed that two methods share once."""
    bench, folder = jobs.place.benches[0], jobs.place.folders[0]
    graph = bench.target.graph
    planned = {}
    for cell in cells:
        mask = graph.dense_mask() if cell.candidate is None else cell.candidate.mask
        label = f"fine-tune {cell.name}, seed {cell.seed}"
        planned[cell.digest] = (0, mask, cell.folder, label, cell.seed)
    missing = [item for item in planned.values() if not _is_done(folder.file(item[2]))]

    def measure(values: tuple[Any, ...], _: None) -> None:
        if bench.recipe().epochs:
            _cell_accuracy(bench, folder.file(values[2]))

    finetunes = Batch(
        label="fine-tunes",
        job=finetune_job,
        arguments=missing,
        keep=measure,
        planned=len(planned),
        trains=True,
        quick=not bench.recipe().epochs,
    )
    jobs.run(finetunes)


def _is_done(directory: Path) -> bool:
    """Return whether a cell can be measured or was; one that has lost its weights before is not."""
    mask = directory / MASK_FILE
    known = any((directory / name).is_file() for name in (WEIGHTS_FILE, RunFolder.ACCURACY))
    if mask.is_file() and not known:
        mask.unlink()
    return mask.is_file()


def _cell_accuracy(bench: Bench, directory: Path) -> float:
    """Return the test accuracy of a fine-tuned network; no choice is left to make by then.

    Measured once on each machine; another machine's figure stands where the weights are not.
    """
    path = directory / RunFolder.ACCURACY
    record = read_accuracy(path) if path.is_file() else {}
    here = {**machine(), "device": str(bench.target.device)}
    if record.get("machine") != here and (directory / WEIGHTS_FILE).is_file():
        model, _ = load_finetuned(bench.target, directory)
        record = {"test_accuracy_finetuned": bench.test_accuracy(model), "machine": here}
        write_json(path, record)
    accuracy: float = record["test_accuracy_finetuned"]
    return accuracy


def read_accuracy(path: Path) -> dict[str, Any]:
    """Return the test accuracy of a fine-tuned network, and the machine that measured it.

    Raises:
        ArtefactError: the file is damaged.
    """
    return dict(checked(read_json(path), ACCURACY, str(path)))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the evaluations and fine-tunes of a comparison take, one job after the other.

    Attributes:
        searches: how many, the agent's and the baselines'.
        search_seconds: of all of them.
        finetunes: how many.
        finetune_seconds: of all of them.
    """

    searches: int
    search_seconds: float
    finetunes: int
    finetune_seconds: float

    @property
    def seconds(self) -> float:
        """Of both stages."""
        return self.search_seconds + self.finetune_seconds


def make_plan(bench: Bench, config: CompareConfig) -> Plan:
    """Measure how fast networks are evaluated and trained, and predict what all will take."""
    evaluator = bench.evaluator()
    subset = evaluator.draw_subset(config.agent.subset or DEFAULT_SUBSET, config.seed)
    scores = np.random.default_rng(0).random((2, bench.target.graph.num_units), dtype=np.float32)
    for row in scores:  # the first network measures, too, what all later ones need
        outcome = evaluator.evaluate(bench.project(row, bench.budget), subset)
    num_images = len(bench.finetune_images)
    per_image = 0.0
    if bench.recipe().epochs:
        recipe = replace(bench.recipe(), epochs=1)
        train = bench.finetune_images.sample(PLAN_IMAGES, bench.seed)
        model = copy_network(bench.target.model)
        trained = finetune(
            model, training_task(model, train), recipe, seed=bench.seed, teacher=bench.teacher
        )
        per_image = trained.seconds / len(train)
    names = set(wanted(config))
    searched, chosen = {*filter(searches, names)}, names & {*heuristics(), *TORCH_PRUNING}
    num_searches = (len(searched) + (not config.no_agent)) * config.seeds
    others = len(chosen & {*ALWAYS}) + bool(chosen - {*ALWAYS})
    finetuned = 1 + min(len(searched), BEST_SEARCHES) + others
    if config.finetune_best:
        finetuned = 2
    finetuned += (not config.no_agent) * (1 if config.finetune_best else 1 + len(CONTROL_CRITERIA))
    finetunes = finetuned * len(finetune_seeds_of(config)) * bool(bench.recipe().epochs)
    return Plan(
        searches=num_searches,
        search_seconds=num_searches * config.networks * outcome.seconds,
        finetunes=finetunes,
        finetune_seconds=finetunes * bench.recipe().epochs * num_images * per_image,
    )


def _say_plan(bench: Bench, config: CompareConfig, workers: int, console: Console) -> None:
    """Say how long all will take."""
    plan = make_plan(bench, config)
    console.say(
        f"plan: about {seconds_in_words(plan.search_seconds)} of evaluations for {plan.searches} "
        f"searches of {config.networks} networks, {seconds_in_words(plan.finetune_seconds)} for "
        f"{plan.finetunes} fine-tunes of {bench.recipe().epochs} epochs: "
        f"{seconds_in_words(plan.seconds)} one after the other, {workers} at a time"
    )


def _finish(
    config: CompareConfig,
    bench: Bench,
    outcome: Outcome,
    cells: Sequence[Cell],
    folder: RunFolder,
    console: Console,
) -> dict[str, Any]:
    """Open the test split, measure every row, report."""
    rows = _measure(bench, outcome.candidates, cells, folder, console)
    recalibrated: Metric = "test_accuracy_recalibrated"
    details = {
        "proxy_rank_correlation": proxy_correlation(rows),
        "stage_one_verdict": list(judge(rows, recalibrated, repaired=outcome.repaired)),
    }
    metric = METRIC if bench.recipe().epochs else recalibrated
    report = make_report(config, bench, outcome, rows, metric, details)
    return conclude(config, bench, outcome, report, folder, console)


def _measure(
    bench: Bench,
    candidates: Sequence[Candidate],
    cells: Sequence[Cell],
    folder: RunFolder,
    console: Console,
) -> list[MethodRow]:
    """Return a row for each cell, and one for each candidate that has none."""
    rows = []
    measured = Measured(bench, folder)
    trained = bench.recipe().epochs > 0
    tuned = {(cell.name, cell.candidate.seed) for cell in cells if cell.candidate is not None}
    untuned = [item for item in candidates if (item.name, item.seed) not in tuned]
    with console.progress("measure on test images", len(cells) + len(untuned)) as report:
        for cell in cells:
            accuracy = _cell_accuracy(bench, folder.file(cell.folder)) if trained else None
            if cell.candidate is None:
                rows.append(dense_row(measured, accuracy, cell.seed, cell.folder))
            else:
                rows.append(
                    candidate_row(
                        measured,
                        cell.candidate,
                        finetuned=accuracy,
                        finetune_seed=cell.seed,
                        cell=cell.folder,
                    )
                )
            report(len(rows), cell.name)
        for item in untuned:
            rows.append(candidate_row(measured, item))
            report(len(rows), item.name)
    return rows
