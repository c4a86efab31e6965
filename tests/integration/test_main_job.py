"""The main job on a tiny network: what it writes, resumes, verifies and refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prunegraph.cli.main import main
from prunegraph.core import files
from prunegraph.core.errors import ArtefactError
from prunegraph.core.precision import autocasting, computes_bfloat16
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.runs.context import RunContext
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.config import TrainConfig
from prunegraph.runs.options.yaml_file import load_config
from prunegraph.runs.parallel.jobs import load_targets
from prunegraph.runs.report import page
from prunegraph.runs.report.verdict import MethodRow
from prunegraph.runs.store import read_masks
from prunegraph.runs.verify import run as verify
from prunegraph.training.loop import _Training


def read_report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return content


def without_times(folder: Path) -> dict[str, Any]:
    """Return a report without what differs between two equal runs."""
    content = read_report(folder)
    for key in ("files", "machine", "latency_ms"):
        del content[key]
    for key in ("seconds", "evaluation_seconds"):
        del content["search"][key]
    for row in content["methods"]:
        del row["seconds"]
    return content


def fail_at(call: int, function: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """Return ``function``, but with an error at one of its calls."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return function(*args, **kwargs)

    return wrapped


def test_a_run_folder_holds_what_is_promised(finished: Path) -> None:
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*")}
    assert names >= {
        "report.json",
        "config.yaml",
        "events",
        "pruned/mask.json",
        "pruned/pruned.safetensors",
        "policy.safetensors",
        "policy.json",
        "plots",
        "dense.safetensors",
        "history.json",
        "report.html",
    }
    assert "checkpoints" not in names
    assert not list(finished.rglob("*.tmp"))
    curves = {path.name: path for path in (finished / "events").iterdir()}
    tuned = {name for name in curves if name.startswith("fine-tune")}
    assert len(curves) == 4 + len(tuned)  # agent and sampler, two seeds each
    assert len(tuned) == 2  # pruned and dense
    for name in tuned:
        (events,) = curves[name].iterdir()
        assert b"train/loss" in events.read_bytes()


def test_the_report_keeps_the_budget_and_counts_networks(finished: Path) -> None:
    report = read_report(finished)
    assert report["pruned"]["macs"] <= 0.5 * report["dense"]["macs"]
    rows = [row for row in report["methods"] if row["name"] != "dense"]
    assert all(row["macs"] <= 0.5 * report["dense"]["macs"] for row in rows)
    assert all(0 < row["networks_evaluated"] <= 24 for row in rows if "agent" in row["name"])
    assert all(row["networks_evaluated"] <= 24 for row in rows)
    names = {row["name"] for row in rows}
    assert {"agent", "l1/uniform", "cem", "random_search", "sampler", "prior"} <= names
    own = [row for row in rows if row["name"] == "agent"]
    starts = {row["seed"]: row["digest"] for row in rows if row["name"] == "prior"}
    assert {row["seed"] for row in own} == starts.keys()
    assert len(own) == 2
    options = load_config(TrainConfig, finished / "config.yaml")
    (target,) = load_targets(options)
    evaluator = RunContext(target=target, options=options, seed=options.seed).final_evaluator
    masks = read_masks(finished / RunFolder.MASKS, target.graph)
    for row in own:  # what a search began with may win, too
        found, before = (
            evaluator.evaluate(masks[key]) for key in (row["digest"], starts[row["seed"]])
        )
        assert found.rank >= before.rank
    assert report["pruned"]["search_accuracy"] == max(row["search_accuracy"] for row in own)
    assert report["search"]["networks_evaluated"] == sum(row["networks_evaluated"] for row in own)


def check_resumes(
    words: list[str],
    reference: Path,
    call: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Interrupt a run at one of its evaluations, and check that it resumes to the same report."""
    folder = Path(words[-1])
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "_measure", fail_at(call, Evaluator._measure, KeyboardInterrupt()))
        assert main(words) == 130
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "resumes" in captured.err
    assert not (folder / "report.json").exists()
    assert main(words) == 0
    assert without_times(folder) == without_times(reference)


@pytest.mark.parametrize(  # in the first update, between two masks, a finalist
    "call",
    [
        pytest.param(8, marks=pytest.mark.slow),
        11,
        pytest.param(14, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_search_resumes_to_the_same_report(
    call: int,
    quick: Path,
    quick_words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*quick_words, "--out", str(tmp_path / "run")]
    check_resumes(words, quick, call, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("call", [20, 40, 60, 90])
def test_interrupted_baselines_resume_to_the_same_report(
    call: int,
    finished: Path,
    train_words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*train_words, "--out", str(tmp_path / "run")]
    check_resumes(words, finished, call, monkeypatch, capsys)


def test_a_finetune_without_memory_and_one_interrupted_resume_to_the_same_report(
    quick: Path, quick_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*quick_words, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(_Training, "_step", exhaust)
        assert main(words) == 2
    with monkeypatch.context() as patch:
        patch.setattr(
            _Training, "train_epoch", fail_at(2, _Training.train_epoch, KeyboardInterrupt())
        )
        assert main(words) == 130
    assert main(words) == 0
    assert without_times(tmp_path / "run") == without_times(quick)


@pytest.mark.parametrize(
    "write", [*(pytest.param(early, marks=pytest.mark.slow) for early in (1, 2, 4, 9)), 16]
)
def test_a_full_disk_leaves_whole_files_and_resumes(
    write: int,
    quick: Path,
    quick_words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*quick_words, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        full = OSError(28, "No space left on device")
        patch.setattr(files.os, "fsync", fail_at(2 * write - 1, files.os.fsync, full))
        assert main(words) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.rglob("*.tmp"))
    assert main(words) == 0
    assert without_times(tmp_path / "run") == without_times(quick)


def exhaust(*_: object) -> None:
    torch.empty(2**60)  # more than any machine has: torch says so in a RuntimeError


def deny(*_: object) -> None:
    raise MemoryError


def refuse(*_: object) -> None:
    raise RuntimeError("could not create a primitive")  # noqa: EM101 - as oneDNN says it


def vanish(*_: object) -> None:
    msg = "CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later"
    raise RuntimeError(msg)


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (exhaust, "out of memory: what was finished is kept"),
        (deny, "out of memory: what was finished is kept"),
        (refuse, "out of memory: what was finished is kept"),
        (vanish, "the device failed (CUDA error: unspecified launch failure): what was finished"),
    ],
)
def test_without_memory_or_device_a_command_ends_with_one_line(
    fail: Callable[..., None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(_Training, "_step", fail)
    words = ["pretrain", "--epochs", "1", "--threads", "1", "--out", str(tmp_path / "net")]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_any_other_error_of_torch_is_no_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        torch.zeros(2) + torch.zeros(3)

    monkeypatch.setattr(_Training, "_step", fail)
    with pytest.raises(RuntimeError, match="must match the size"):
        main(["pretrain", "--epochs", "1", "--threads", "1", "--out", str(tmp_path / "net")])


def test_a_finished_run_is_shown_and_not_touched(
    copied: Path, train_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (copied / "report.json").read_bytes()
    assert main([*train_words, "--out", str(copied)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert (copied / "report.json").read_bytes() == before


@pytest.mark.usefixtures("drawn")
def test_the_page_of_a_finished_run_is_derived_and_made_anew(
    copied: Path, train_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    page = copied / "report.html"
    assert page.name not in read_report(copied)["files"]
    before = page.read_text()
    page.write_text("of an earlier version")
    assert main(["verify", str(copied), "--threads", "1"]) == 0
    page.unlink()
    assert main([*train_words, "--out", str(copied)]) == 0
    assert str(page) in capsys.readouterr().out
    assert page.read_text() == before


def test_the_report_tells_times_and_versions(finished: Path) -> None:
    report = read_report(finished)
    assert report["latency_ms"]["dense"] > 0 < report["latency_ms"]["pruned"]
    assert report["latency_ms"]["on"] == "the CPU with 1 thread"
    assert report["versions"]["torch"]


def test_a_finished_run_on_a_read_only_medium_shows_its_report(
    copied: Path,
    train_words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any) -> None:
        msg = "cannot write report.html: Read-only file system"
        raise ArtefactError(msg)

    monkeypatch.setattr(page, "write_page", refuse)
    assert main([*train_words, "--out", str(copied), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["command"] == "train"
    assert "the report's page stays as it is: cannot write" in shown.err


def test_a_folder_of_another_run_is_refused(
    copied: Path, train_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train_words, "--out", str(copied), "--keep-macs", "0.4"]) == 2
    assert "other options (keep_macs " in capsys.readouterr().err


def test_its_own_config_file_repeats_a_run_to_the_same_report(quick: Path, tmp_path: Path) -> None:
    words = ["train", "--config", str(quick / "config.yaml"), "--out", str(tmp_path / "run")]
    assert main([*words, "--threads", "1"]) == 0
    assert without_times(tmp_path / "run") == without_times(quick)


def test_verify_confirms_a_run_in_a_fresh_process(finished: Path) -> None:
    words = [sys.executable, "-m", "prunegraph", "verify", str(finished)]
    done = subprocess.run(
        [*words, "--threads", "1", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["figures"] > 100
    assert result["same_machine"]
    assert "search.seconds" in result["not_verifiable"]


@pytest.mark.parametrize(
    "name",
    [
        "pruned/mask.json",
        "masks.json",
        "pruned/pruned.safetensors",
        "dense.safetensors",
        "config.yaml",
        "policy.safetensors",
        "dense_finetuned/pruned.safetensors",
    ],
)
def test_a_changed_bit_is_found_by_the_name_of_the_file(
    name: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    assert main(["verify", str(copied), "--threads", "1"]) == 2
    err = capsys.readouterr().err
    assert str(copied / name) in err
    assert err.count("\n") == 1


CHANGES: list[tuple[tuple[str, ...], object]] = [
    (("pruned", "test_accuracy_finetuned"), 0.999),
    (("verdict",), "LEARNED"),
    (("budget",), {"keep_macs": 0.25}),
    (("dense_widths",), {}),
]
FURTHER: list[tuple[tuple[str, ...], object]] = [
    (("pruned", "macs"), 1),
    (("dense", "test_accuracy"), 0.5),
    (("dense", "params"), 3),
    (("pruned", "widths"), {}),
    (("seed",), 3),
    (("recipe",), {"epochs": 40}),
]


@pytest.fixture(scope="module")
def measured_rows() -> list[list[MethodRow]]:
    """Hold the rows of ``finished`` when they were measured again."""
    return []


@pytest.fixture
def measured_once(measured_rows: list[list[MethodRow]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the rows of copies of ``finished`` once: their weights and masks are the same."""
    measure = verify.measure_rows

    def once(*arguments: Any) -> list[MethodRow]:
        if not measured_rows:
            measured_rows.append(measure(*arguments))
        return measured_rows[0]

    monkeypatch.setattr(verify, "measure_rows", once)


@pytest.mark.usefixtures("measured_once")
@pytest.mark.parametrize(
    ("path", "value"),
    [*CHANGES, *(pytest.param(*change, marks=pytest.mark.slow) for change in FURTHER)],
)
def test_a_changed_figure_is_found_by_its_name(
    path: tuple[str, ...], value: object, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = read_report(copied)
    place = report
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (copied / "report.json").write_text(json.dumps(report))
    assert main(["verify", str(copied), "--threads", "1"]) == 2
    assert ".".join(path) in capsys.readouterr().err


@pytest.mark.parametrize(("precision", "wanted"), [("bfloat16", True), ("float32", False)])
def test_it_is_measured_in_the_precision_of_the_run(
    precision: str, wanted: bool, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = read_report(copied)
    assert report["precision"] == ("bfloat16" if computes_bfloat16("cpu") else "float32")
    (copied / "report.json").write_text(json.dumps(report | {"precision": precision}))
    seen = []

    def watch(*_: object) -> list[verify.Check]:
        with autocasting(torch.device("cpu"), wanted=True):
            seen.append(torch.is_autocast_enabled("cpu"))
        return []

    monkeypatch.setattr(verify, "_check_member", watch)
    assert main(["verify", str(copied), "--threads", "1"]) == 0
    assert seen == [wanted]


def test_a_method_that_was_left_out_is_missed(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = read_report(copied)
    report["methods"] = [row for row in report["methods"] if row["name"] != "random_search"]
    (copied / "report.json").write_text(json.dumps(report))
    assert main(["verify", str(copied), "--threads", "1"]) == 2
    assert "random_search" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.yaml", "masks.json", "dense.safetensors", "history.json"])
def test_a_file_that_a_report_does_not_list_is_missed(
    name: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = read_report(copied)
    del report["files"][name]
    (copied / "report.json").write_text(json.dumps(report))
    assert main(["verify", str(copied), "--threads", "1"]) == 2
    assert f"does not list {name}" in capsys.readouterr().err


def test_a_changed_row_is_found(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = read_report(copied)
    row = next(row for row in report["methods"] if row["name"] == "cem")
    row["test_accuracy_recalibrated"] += 0.1
    (copied / "report.json").write_text(json.dumps(report))
    assert main(["verify", str(copied), "--threads", "1"]) == 2
    assert "methods[cem, seed 0].test_accuracy_recalibrated" in capsys.readouterr().err


def test_export_reproduces_the_pruned_network(copied: Path) -> None:
    assert main(["export", str(copied), "--format", "safetensors"]) == 0
    assert (copied / "exported.safetensors").stat().st_size > 0
