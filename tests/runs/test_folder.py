import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prunegraph.core.errors import ArtefactError, BudgetError, ConfigError
from prunegraph.runs.folder import RunFolder, existing_run, open_run, slug
from prunegraph.runs.options.config import TrainConfig

CONFIG = TrainConfig(keep_macs=0.5)


def start(folder: RunFolder) -> None:
    """Begin a run that is interrupted at once."""
    with folder.started(CONFIG):
        pass


def test_opening_writes_nothing(tmp_path: Path) -> None:
    folder = open_run(CONFIG, tmp_path / "run", "name")
    assert not folder.path.exists()
    start(folder)
    assert folder.file("config.yaml").is_file()


def test_same_options_resume_and_others_are_refused(tmp_path: Path) -> None:
    start(open_run(CONFIG, tmp_path / "run", "name"))
    assert open_run(CONFIG, tmp_path / "run", "name").path == tmp_path / "run"
    with pytest.raises(
        ConfigError,
        match=r"other options \(keep_macs 0.5 there, 0.4 here\); .* --config .*run/config.yaml",
    ):
        open_run(TrainConfig(keep_macs=0.4), tmp_path / "run", "name")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds files of something else"):
        open_run(CONFIG, tmp_path, "name")
    with pytest.raises(ConfigError, match="is a file"):
        open_run(CONFIG, tmp_path / "thesis.txt", "name")


def test_default_folder_resumes_unfinished_runs_and_numbers_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = open_run(CONFIG, None, "name")
    start(first)
    assert open_run(CONFIG, None, "name").path == first.path == Path("runs/name")
    first.file("report.json").write_text("{}")
    first.finish()
    assert open_run(CONFIG, None, "name").path == Path("runs/name-2")
    other = TrainConfig(keep_macs=0.4)
    start(open_run(CONFIG, None, "name"))
    assert open_run(other, None, "name").path == Path("runs/name-3")


def test_digests_name_a_changed_and_a_missing_file(tmp_path: Path) -> None:
    folder = open_run(CONFIG, tmp_path / "run", "name")
    start(folder)
    (folder.path / "plots").mkdir()
    folder.file("plots/a.png").write_bytes(b"abc")
    folder.checkpoint("x").write_bytes(b"working file")
    for page in ("report.html", "plots/report.html"):  # a family's other networks have one too
        folder.file(page).write_text("derived")
    (folder.path / "adapted").mkdir()  # what others put there
    folder.file("adapted/report.json").write_text("{}")
    folder.file("log.txt").write_text("x")
    digests = folder.digests()
    assert sorted(digests) == ["config.yaml", "plots/a.png"]
    folder.check_digests(digests)
    folder.file("plots/a.png").write_bytes(b"abd")
    with pytest.raises(ArtefactError, match=r"plots/a\.png is not the file"):
        folder.check_digests(digests)
    folder.file("plots/a.png").unlink()
    with pytest.raises(ArtefactError, match=r"plots/a\.png is missing"):
        folder.check_digests(digests)


def test_finish_removes_only_the_checkpoints(tmp_path: Path) -> None:
    folder = open_run(CONFIG, tmp_path / "run", "name")
    start(folder)
    for path in (folder.path, folder.file("1-resnet20"), folder.file("2-other-run")):
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        (path / "checkpoints" / "x").write_bytes(b"working file")
    folder.finish([RunFolder(path=folder.file("1-resnet20"))])
    left = sorted(path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*"))
    other = [f"2-other-run{name}" for name in ("", "/checkpoints", "/checkpoints/x")]
    assert left == ["1-resnet20", *other, "config.yaml"]


LINKED = ("checkpoints", "plots", "events", "cells", "dense_finetuned", "pruned", "1-resnet20")


@pytest.mark.parametrize("name", [*LINKED, "cells/cem-0", "1-resnet20/checkpoints"])
@pytest.mark.parametrize("step", ["start", "finish"])
def test_a_link_that_leaves_the_folder_is_refused_and_not_followed(
    tmp_path: Path, name: str, step: str
) -> None:
    folder, member = RunFolder(path=tmp_path / "run"), RunFolder(path=tmp_path / "run/1-resnet20")
    start(folder)
    away = tmp_path / "away"
    (away / "checkpoints").mkdir(parents=True)
    (away / "checkpoints" / "thesis.txt").write_text("mine")
    place = folder.file(name)
    if name == "checkpoints":
        place.rmdir()
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(away / "checkpoints" if place.name == "checkpoints" else away)
    with pytest.raises(ArtefactError, match=f"run/{name} is a link that leaves the run folder"):
        start(folder) if step == "start" else folder.finish([member])
    found = sorted(path.relative_to(away).as_posix() for path in away.rglob("*"))
    assert found == ["checkpoints", "checkpoints/thesis.txt"]


def test_links_that_lead_nowhere_else_are_left(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "log.txt").touch()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")  # the user's own --out
    folder = RunFolder(path=tmp_path / "run")
    start(folder)
    folder.file("log.txt").symlink_to(tmp_path / "log.txt")
    folder.file("cells").mkdir()
    folder.file("plots").symlink_to("cells")
    start(folder)
    folder.finish()
    assert folder.file("plots").is_symlink()
    folder.file("events").symlink_to(tmp_path / "not-there-yet")
    with pytest.raises(ArtefactError, match="events is a link that leaves"):
        start(folder)


def test_a_run_that_was_killed_at_its_very_end_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = open_run(CONFIG, None, "name")
    start(folder)
    folder.checkpoint("x").write_bytes(b"working file")
    folder.file("report.json").write_text("{}")
    assert open_run(CONFIG, None, "name").path == folder.path
    folder.finish()
    assert open_run(CONFIG, None, "name").path == Path("runs/name-2")


def test_existing_run_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="is not a folder"):
        existing_run(tmp_path / "none")
    with pytest.raises(ArtefactError, match=r"holds no config\.yaml, it is no run folder"):
        existing_run(tmp_path)
    member = tmp_path / "1-resnet20"
    member.mkdir()
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ArtefactError, match=r"holds no report\.json: no finished run; repeat"):
        existing_run(tmp_path)
    with pytest.raises(ArtefactError, match=f"part of a run of several networks: name {tmp_path}"):
        existing_run(member)


def test_slug_is_a_file_name() -> None:
    assert slug("torchvision:resnet18") == "torchvision_resnet18"
    assert slug("a.b:c/d") == "a.b_c_d"


def hold(path: Path) -> None:
    """Work in a run folder for ever."""
    with RunFolder(path=path).started(CONFIG):
        (path / "started").touch()
        time.sleep(600)


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = multiprocessing.get_context("fork").Process(target=hold, args=(path,))
    first.start()
    while not (path / "started").exists():
        time.sleep(0.01)
    with pytest.raises(ConfigError, match=f"another run is at work on {path}: wait until"):
        start(open_run(CONFIG, path, "name"))
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert (path / "checkpoints" / "lock").exists()
    start(open_run(CONFIG, path, "name"))
    assert not (path / "checkpoints" / "lock").exists()


def test_who_loses_the_race_for_a_new_folder_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_run(CONFIG, tmp_path / "run", "name")

    @contextmanager
    def lost(path: Path, _: str) -> Iterator[None]:  # the other makes folder and lock first
        path.parent.mkdir(parents=True)
        path.touch()
        msg = "another run is at work"
        raise ConfigError(msg)
        yield

    monkeypatch.setattr("prunegraph.runs.folder.locked", lost)
    with pytest.raises(ConfigError, match="another run is at work"):
        start(folder)
    assert (tmp_path / "run" / "checkpoints" / "lock").exists()


def test_a_run_that_was_killed_at_once_is_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("chosen"), Path("runs/name")):
        (path / "checkpoints").mkdir(parents=True)
        (path / "checkpoints" / "lock").touch()
        (path / ".config.yaml.0123456789abcdef.tmp").touch()
    for out in (Path("chosen"), None):
        folder = open_run(CONFIG, out, "name")
        assert folder.path == (out or Path("runs/name"))
        start(folder)
        assert {item.name for item in folder.path.iterdir()} == {"checkpoints", "config.yaml"}
    (tmp_path / "chosen" / "checkpoints" / "mine").touch()
    (tmp_path / "chosen" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="holds files of something else"):
        open_run(CONFIG, Path("chosen"), "name")


def test_a_run_that_another_has_just_finished_is_not_run_again(tmp_path: Path) -> None:
    folder = open_run(CONFIG, tmp_path / "run", "name")
    start(folder)
    folder.file("report.json").write_text("{}")
    with pytest.raises(ConfigError, match="another run has just finished"):
        start(folder)


def test_a_folder_that_cannot_be_made_is_told_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArtefactError, match="cannot write /proc/run/checkpoints/lock"):
        start(open_run(CONFIG, Path("/proc/run"), "name"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ArtefactError, match="No space left on device"):
        start(open_run(CONFIG, tmp_path / "run", "name"))
    assert list(tmp_path.iterdir()) == []


def test_a_budget_found_out_of_reach_on_the_way_leaves_no_folder(tmp_path: Path) -> None:
    folder = RunFolder(path=tmp_path / "run")

    def begin(message: str) -> None:
        with folder.started(CONFIG):
            raise BudgetError(message)

    with pytest.raises(BudgetError, match="too fast"):
        begin("too fast")
    assert not folder.path.exists()
    start(folder)
    with pytest.raises(BudgetError):
        begin("of a run that was there before")
    assert folder.file("config.yaml").is_file()
