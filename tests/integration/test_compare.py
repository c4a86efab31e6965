"""The two-stage comparison on a tiny network: plan, cells, resuming, verifying."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

from prunegraph.cli.main import main
from prunegraph.core.console import Console
from prunegraph.core.masks import ChannelMask
from prunegraph.core.splits import TrainSplit
from prunegraph.graph.features import rank_in_group
from prunegraph.layerwise import sequential
from prunegraph.methods.registry import SEARCHES, heuristics, torch_pruning
from prunegraph.runs import finetune as finish
from prunegraph.runs.conclude import _finetuned_mean
from prunegraph.runs.context import RunContext
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.measure import Measured, measure_again
from prunegraph.runs.options.compare import CompareConfig
from prunegraph.runs.parallel.jobs import Workplace
from prunegraph.runs.plan import make_plan, plan_finetunes
from prunegraph.runs.report.report import read_rows
from prunegraph.runs.report.verdict import judge, mean_by_name, proxy_correlation
from prunegraph.runs.store import Candidate, CandidateStore, read_masks
from prunegraph.runs.tasks.registry import load_target
from prunegraph.training.loop import _Training
from support.parts import part

METHODS = ("l1/uniform", "taylor/per_mac", "taylor/uniform", "l2/global", "cem", "random_search")


@pytest.fixture(scope="module")
def words(weights: Path) -> list[str]:
    return [
        *("compare", "--weights", str(weights), "--methods", *METHODS, "--seeds", "2"),
        *("--networks", "24", "--agent.update-size", "4", "--agent.subset", "64", "--threads", "1"),
        *("--calibration-images", "64", "--finetune-epochs", "1"),
        *("--agent.surrogate-steps", "2", "--agent.distill-steps", "1"),
    ]


@pytest.fixture(scope="module")
def measured() -> list[ChannelMask]:
    """Return the masks that ``compared`` measured on the test split."""
    return []


@pytest.fixture(scope="module")
def compared(
    words: list[str], measured: list[ChannelMask], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of a comparison that was interrupted in both of its last stages."""
    path = tmp_path_factory.mktemp("compare") / "run"
    epochs = 0
    train_epoch = _Training.train_epoch

    def interrupt(self: _Training, after_step: Callable[[float], None]) -> None:
        nonlocal epochs
        epochs += 1
        if epochs == 4:
            raise KeyboardInterrupt
        train_epoch(self, after_step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Training, "train_epoch", interrupt)
        assert main([*words, "--out", str(path)]) == 130
    assert len(list((path / "cells").iterdir())) == 3
    measure = RunContext.recalibrated_test_accuracy

    def stop(self: RunContext, mask: ChannelMask) -> float:
        measured.append(mask)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return measure(self, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunContext, "recalibrated_test_accuracy", stop)
        assert main([*words, "--out", str(path)]) == 130
        patch.setattr(finish, "finetune_job", pytest.fail)  # no cell is trained again
        assert main([*words, "--out", str(path)]) == 0
    return path


@pytest.mark.parametrize("on_search", [False, True])
def test_search_images_are_trained_on_only_if_asked_for(
    on_search: bool, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CompareConfig(weights=weights, finetune_epochs=1, finetune_on_search=on_search)
    context = RunContext(target=load_target(options, options.budget()), options=options, seed=0)
    trained: list[TrainSplit] = []
    monkeypatch.setattr(
        finish,
        "train_network",
        lambda label, model, task, *rest, **options: trained.append(task.train),
    )
    folder, console = RunFolder(path=tmp_path), Console()
    place = Workplace(contexts=[context], folders=[folder], console=console)
    for name, mask in (
        ("dense", None),
        ("l1", context.measures.problem(context.budget).project(context.measures.statistics["l1"])),
    ):
        finish.finetune_job(place, 0, mask, name, "fine-tune", 0)
    dataset = context.target.dataset
    wanted = {*dataset.train.index.tolist()} | (
        {*dataset.search.index.tolist()} if on_search else set()
    )
    for images in trained:
        assert sorted(images.index.tolist()) == sorted(wanted)
        assert not wanted & {*dataset.test.index.tolist()}
    assert len(trained) == 2
    assert ("on_search_images_too" in context.recipe_record()) == on_search


def test_networks_are_reconstructed_layer_by_layer_or_all_layers_at_once(weights: Path) -> None:
    options = CompareConfig(weights=weights, finetune_epochs=0, keep_macs=0.25)
    target = load_target(options, options.budget())
    contexts = [
        RunContext(target=target, options=replace(options, layer_by_layer=asked), seed=0)
        for asked in (False, True)
    ]
    scores = rank_in_group(target.graph, contexts[0].measures.statistics["l1"]).astype(np.float32)
    mask = contexts[0].measures.problem(options.budget()).project(scores)
    losses = [context.final_evaluator.evaluate(mask).loss for context in contexts]
    assert losses[1] < losses[0]
    everything = torch.arange(len(target.dataset.search))  # as a search of few images asks
    evaluators = [context.measures.evaluator() for context in contexts]
    searched = [evaluator.evaluate(mask, everything).loss for evaluator in evaluators]
    assert losses[1] < searched[1] < searched[0] == losses[0]  # fitted on fewer images
    assert [evaluator.is_cached(mask) for evaluator in evaluators] == [True, False]
    assert contexts[0].measures.quick_reconstruction is None
    assert ["layer_by_layer" in context.recipe_record() for context in contexts] == [False, True]


def test_searches_have_a_fit_of_their_own_only_where_it_is_on_fewer_images(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = CompareConfig(weights=weights, calibration_images=sequential.SEARCH_SAMPLES)
    target, many = load_target(few), replace(few, calibration_images=256)
    contexts = [RunContext(target=target, options=options, seed=0) for options in (few, many, many)]
    assert contexts[0].measures.quick_reconstruction is None
    assert contexts[1].measures.quick_reconstruction is not None
    monkeypatch.setattr("prunegraph.methods.context.SEARCH_SAMPLES", 256)
    assert contexts[2].measures.quick_reconstruction is None


def test_what_searches_are_fitted_on_is_drawn_of_all_train_images(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TrainSplit] = []
    sample = TrainSplit.sample

    def watched(split: TrainSplit, size: int, seed: int) -> TrainSplit:
        seen.append(sample(split, size, seed))
        return seen[-1]

    monkeypatch.setattr(TrainSplit, "sample", watched)
    options = CompareConfig(weights=weights, calibration_images=10_000)  # more than there are
    context = RunContext(target=load_target(options), options=options, seed=0)
    _ = context.measures.quick_reconstruction
    fitted = min(seen, key=len)  # more are held out
    assert len(fitted) == sequential.SEARCH_SAMPLES
    assert len(set(fitted.labels.tolist())) == 10
    positions = fitted.index.tolist()
    assert positions != context.target.dataset.train.index[: len(positions)].tolist()


def timeless(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a report without their times."""
    return [{**row, "seconds": None} for row in report["methods"]]


def test_stage_two_finetunes_the_agreed_rows_with_every_seed(compared: Path) -> None:
    report = json.loads((compared / "report.json").read_text())
    rows = [row for row in report["methods"] if row["test_accuracy_finetuned"] is not None]
    seeds: dict[str, list[int]] = {}
    for row in rows:
        seeds.setdefault(row["name"], []).append(row["finetune_seed"])
    assert all(sorted(found) == [0, 1] for found in seeds.values())
    figures: dict[str, list[float]] = {}
    for row in report["methods"]:
        figures.setdefault(row["name"], []).append(row["search_accuracy"])
    means = {name: fmean(found) for name, found in figures.items()}
    best = max(("taylor/uniform", "l2/global"), key=means.__getitem__)
    rival = max((*METHODS, "prior"), key=means.__getitem__)
    assert set(seeds) == {
        *("agent", "control:widths/l1", "control:widths/random", "cem", "random_search"),
        *("l1/uniform", "taylor/per_mac", best, rival, "dense"),
    }
    assert all((compared / row["cell"] / "pruned.safetensors").is_file() for row in rows)


def test_the_report_holds_both_verdicts_and_the_proxy(compared: Path) -> None:
    report = json.loads((compared / "report.json").read_text())
    assert report["verdict"] is None
    assert "2 seed(s)" in report["verdict_reason"]
    assert report["stage_one_verdict"][0] is None
    assert -1 <= report["proxy_rank_correlation"] <= 1
    dense = [row for row in report["methods"] if row["name"] == "dense"]
    mean = sum(row["test_accuracy_finetuned"] for row in dense) / len(dense)
    assert report["dense"]["test_accuracy_finetuned"] == pytest.approx(mean)


def test_only_the_best_baseline_is_finetuned_beside_the_agent_if_asked_for(
    compared: Path, weights: Path
) -> None:
    options = CompareConfig(weights=weights, methods=METHODS, seeds=2, finetune_best=True)
    context = RunContext(target=load_target(options, options.budget()), options=options, seed=0)
    rows = json.loads((compared / "report.json").read_text())["methods"]
    masks = read_masks(compared / RunFolder.MASKS, context.target.graph)
    candidates = [
        Candidate(
            name=row["name"],
            **{key: row[key] for key in ("role", "searches", "beginning")},
            seed=row["seed"],
            mask=masks[row["digest"]],
            networks_evaluated=0,
            search_accuracy=row["search_accuracy"],
        )
        for row in rows
        if row["name"] != "dense" and row["finetune_seed"] in (None, row["seed"])
    ]
    rivals = [item for item in candidates if item.name in (*METHODS, "prior")]
    names = sorted({item.name for item in rivals})
    figures = {
        name: fmean([item.search_accuracy for item in rivals if item.name == name])
        for name in names
    }
    best = max(figures, key=figures.__getitem__)
    cells = plan_finetunes(context, candidates)
    assert {cell.name for cell in cells} == {"agent", best, "dense"}
    assert len(cells) == 3 * options.seeds


def test_methods_are_named_alone_or_together() -> None:
    names = make_plan(CompareConfig(methods=("cem", "heuristics", "l1/uniform"))).methods
    assert names == ("agent", "cem", *heuristics())
    chosen = make_plan(CompareConfig(methods=("torch_pruning",))).methods
    assert chosen == ("agent", *torch_pruning())
    everything = make_plan(CompareConfig()).methods
    assert set(everything) == {"agent", *heuristics(), *SEARCHES}


def test_no_mask_is_measured_again(compared: Path, measured: list[ChannelMask]) -> None:
    content = json.loads((compared / "report.json").read_bytes())
    masks = {row["digest"] for row in content["methods"] if row["name"] != "dense"}
    assert len(measured) == 1 + len(masks)


def test_a_mask_is_measured_once_on_each_machine(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CompareConfig(weights=weights, calibration_images=64)
    context = RunContext(target=load_target(options, options.budget()), options=options, seed=0)
    mask = context.measures.problem(context.budget).project(
        np.arange(context.target.graph.num_units, dtype=np.float32)
    )
    folder, pruned = RunFolder(path=tmp_path), []
    prune = RunContext.recalibrated_test_accuracy

    def count(self: RunContext, mask: ChannelMask) -> float:
        pruned.append(mask)
        return prune(self, mask)

    monkeypatch.setattr(RunContext, "recalibrated_test_accuracy", count)
    first = Measured(context, folder)
    found = [first.test(mask), first.search(None), first.test(None), first.test(mask)]
    assert found[0] == found[3] == Measured(context, folder).test(mask)
    assert found[1] == context.search_accuracy(context.target.model)
    assert found[2] == context.test_accuracy(context.target.model)
    assert pruned == [mask]
    path = folder.checkpoint(RunFolder.MEASURED)
    content = json.loads(path.read_text())
    content["machine"]["threads"] += 1
    path.write_text(json.dumps(content))
    assert Measured(context, folder).test(mask) == found[0]
    assert pruned == [mask, mask]


def test_what_other_processes_measured_is_measured_anew_before_a_choice(
    weights: Path, tmp_path: Path
) -> None:
    options = CompareConfig(weights=weights, calibration_images=64)
    context = RunContext(target=load_target(options, options.budget()), options=options, seed=0)
    graph = context.target.graph
    mask = context.measures.problem(context.budget).project(
        np.arange(graph.num_units, dtype=np.float32)
    )
    accuracy = context.final_evaluator.evaluate(mask).accuracy
    store = CandidateStore(tmp_path / "candidates.json", graph)
    other = accuracy + 1 / 269  # with other threads one image more was right
    store.add(
        Candidate(
            name="cem",
            **part("cem"),
            seed=0,
            mask=mask,
            networks_evaluated=3,
            search_accuracy=other,
        )
    )
    measure_again(context, store, RunFolder(path=tmp_path), Console())
    assert [item.search_accuracy for item in store] == [accuracy]


def test_a_cell_that_lost_its_weights_before_it_was_measured_is_not_done(tmp_path: Path) -> None:
    (tmp_path / "mask.json").write_text("{}")
    assert not finish._is_done(tmp_path)
    assert not (tmp_path / "mask.json").exists()
    for name in ("mask.json", "accuracy.json"):
        (tmp_path / name).write_text("{}")
    assert finish._is_done(tmp_path)


def test_verify_confirms_a_comparison(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(compared), "--threads", "1"]) == 0
    path = next(compared.glob("cells/*/pruned.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["verify", str(compared), "--threads", "1"]) == 2
    assert str(path) in capsys.readouterr().err
    path.write_bytes(content)


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a report, and make its verdicts and means fit."""
    path = folder / "report.json"
    content = json.loads(path.read_text())
    change(content)
    rows = read_rows(content)
    content["verdict"], content["verdict_reason"] = judge(
        rows, content["verdict_metric"], repaired=content["repaired"]
    )
    recalibrated = judge(rows, "test_accuracy_recalibrated", repaired=content["repaired"])
    content["stage_one_verdict"] = [*recalibrated]
    content["proxy_rank_correlation"] = proxy_correlation(rows)
    tuned = mean_by_name(rows, "test_accuracy_finetuned")
    content["dense"]["test_accuracy_finetuned"] = tuned["dense"]
    digest = content["pruned"]["mask_digest"]
    content["pruned"]["test_accuracy_finetuned"] = _finetuned_mean(rows, digest)
    path.write_text(json.dumps(content))


def count_one_twice(content: dict[str, Any]) -> None:
    """Replace the second fine-tune of a baseline by its first."""
    first, second = (
        row for row in content["methods"] if row["name"] == "l1/uniform" and row["cell"]
    )
    second["cell"], second["test_accuracy_finetuned"] = (
        first["cell"],
        first["test_accuracy_finetuned"],
    )


def leave_one_out(content: dict[str, Any]) -> None:
    content["methods"].remove(next(row for row in content["methods"] if row["name"] == "cem"))


def rename_the_network(content: dict[str, Any]) -> None:
    content["arch"] = "resnet110"


def judge_by_another_metric(content: dict[str, Any]) -> None:
    content["verdict_metric"] = "test_accuracy_recalibrated"


def leave_the_start_out(content: dict[str, Any]) -> None:
    content["methods"] = [row for row in content["methods"] if row["name"] != "prior"]


def show_a_rival(content: dict[str, Any]) -> None:
    """Call a baseline's network that of the run."""
    own = content["pruned"]["mask_digest"]  # which a search may have found, too
    rows = [row for row in content["methods"] if row["cell"] and row["name"] != "dense"]
    content["pruned"]["mask_digest"] = next(r["digest"] for r in rows if r["digest"] != own)


def invent_a_fine_tune(content: dict[str, Any]) -> None:
    row = next(row for row in content["methods"] if row["name"].startswith("agent"))
    content["methods"].append(
        row | {"cell": None, "finetune_seed": 77, "test_accuracy_finetuned": 0.99}
    )


def repeat_a_row(content: dict[str, Any]) -> None:
    content["methods"].append(content["methods"][-1])


def invent_images(content: dict[str, Any]) -> None:
    content["data"]["test"]["samples"] = 10_000


def name_another_seed(content: dict[str, Any]) -> None:
    content["pruned"]["seed"] = 77


def invent_searches(content: dict[str, Any]) -> None:
    content["search"]["seeds"] = [0, 1, 2, 3]


def call_a_rival_a_control(content: dict[str, Any]) -> None:
    for row in content["methods"]:
        row["role"] = "control" if row["name"] == "cem" else row["role"]


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, str], float]:
    """Return what masks of the comparison were measured at: forging a report changes none."""
    return {}


@pytest.fixture
def measured_once(known: dict[tuple[str, str], float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure each mask of the forged copies once."""
    for name in ("recalibrated_search_accuracy", "recalibrated_test_accuracy"):
        monkeypatch.setattr(RunContext, name, remembering(getattr(RunContext, name), known))


def remembering(
    measure: Callable[[RunContext, ChannelMask], float], known: dict[tuple[str, str], float]
) -> Callable[[RunContext, ChannelMask], float]:
    def measured(self: RunContext, mask: ChannelMask) -> float:
        key = measure.__name__, mask.digest()
        if key not in known:
            known[key] = measure(self, mask)
        return known[key]

    return measured


@pytest.fixture(scope="module")
def written_again(compared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy whose report was written again as it was, which is no forgery."""
    copied = tmp_path_factory.mktemp("again") / "run"
    shutil.copytree(compared, copied)
    forge(copied, lambda _: None)
    assert main(["verify", str(copied), "--threads", "1"]) == 0
    return copied


FURTHER = [
    (repeat_a_row, "fine-tunes is reported"),
    (invent_images, "data.test.samples is reported as 10000"),
    (name_another_seed, "pruned.seed is reported as 77"),
    (count_one_twice, "cell is reported"),
    (rename_the_network, "arch is reported as resnet110"),
]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (invent_a_fine_tune, "fine-tunes is reported"),
        (invent_searches, "search.seeds is reported"),
        (leave_the_start_out, "methods that are missing is reported as ['prior']"),
        (show_a_rival, "pruned.test_accuracy_finetuned is reported"),
        (leave_one_out, "seeds of cem is reported"),
        (call_a_rival_a_control, "methods in the part of others is reported as ['cem']"),
        (judge_by_another_metric, "verdict_metric is reported"),
        *(pytest.param(*forgery, marks=pytest.mark.slow) for forgery in FURTHER),
    ],
)
@pytest.mark.usefixtures("measured_once")
def test_a_forged_comparison_is_found_out(
    change: Callable[[dict[str, Any]], None],
    named: str,
    written_again: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(written_again, tmp_path / "forged")
    forge(tmp_path / "forged", change)
    assert main(["verify", str(tmp_path / "forged"), "--threads", "1"]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_goes_on_elsewhere_without_the_weights_of_its_finished_cells(
    compared: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(compared, moved)
    content = json.loads((moved / "report.json").read_text())
    (moved / "report.json").unlink()
    cell = next(row["cell"] for row in content["methods"] if row["cell"] is not None)
    (moved / cell / "pruned.safetensors").unlink()
    assert main([*words, "--out", str(moved)]) == 0
    assert timeless(json.loads((moved / "report.json").read_text())) == timeless(content)
    assert main(["verify", str(moved), "--threads", "1"]) == 0
    assert f"{cell} (no weights)" in capsys.readouterr().out
