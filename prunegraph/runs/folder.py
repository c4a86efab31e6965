"""Run folders: where a command's files go, and how the same command finds them again."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from prunegraph.core.errors import ArtefactError, BudgetError, ConfigError
from prunegraph.core.files import (
    POLICY_FILE,
    TEMPORARY,
    file_digest,
    locked,
    remove_temporaries,
)
from prunegraph.runs.options.config import CommonConfig
from prunegraph.runs.options.yaml_file import differences, read_yaml, save_config

RUNS = Path("runs")
"""Where run folders go without ``--out``, in the working directory."""

MOST_NAMED = 4
"""So many options in which two runs differ are named."""

OWN_SUFFIXES = (".json", ".yaml", ".safetensors")
"""Of the files that a run writes beside its folders."""

MEMBER = re.compile(r"\d+-.+")
"""Sub-folders of a run of several networks."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A folder that one run writes to, and the names of all that lies in it.

    ``PAGE`` is made from the other files, anew at will. ``PRUNED`` holds the pruned network, in a
    comparison each of ``CELLS`` a fine-tuned one; ``DENSE_FINETUNED`` the control; ``CHOSEN`` those
    with zeros in place before a fine-tune, with a file of each of ``TOLD``, what a method says of
    itself. ``WORK`` holds
    what an interrupted run resumes from, and is removed when the run is finished.

    Attributes:
        path: the folder; it exists after ``started``.
    """

    CONFIG: ClassVar[str] = "config.yaml"
    REPORT: ClassVar[str] = "report.json"
    PAGE: ClassVar[str] = "report.html"
    MASKS: ClassVar[str] = "masks.json"
    HISTORY: ClassVar[str] = "history.json"
    LATENCY: ClassVar[str] = "latency.json"
    DENSE: ClassVar[str] = "dense.safetensors"
    POLICY: ClassVar[str] = POLICY_FILE
    PRUNED: ClassVar[str] = "pruned"
    DENSE_FINETUNED: ClassVar[str] = "dense_finetuned"
    CELLS: ClassVar[str] = "cells"
    CHOSEN: ClassVar[str] = "chosen"
    TOLD: ClassVar[Mapping[str, str]] = {
        part: f"{part}.json" for part in ("errors", "selection", "groups", "clients")
    }
    ACCURACY: ClassVar[str] = "accuracy.json"
    PLOTS: ClassVar[str] = "plots"
    EVENTS: ClassVar[str] = "events"
    OWN_FOLDERS: ClassVar[tuple[str, ...]] = (
        *(PRUNED, DENSE_FINETUNED, CELLS, CHOSEN, PLOTS, EVENTS),
    )

    WORK: ClassVar[str] = "checkpoints"
    LOCK: ClassVar[str] = "lock"
    CANDIDATES: ClassVar[str] = "candidates.json"
    MEASURED: ClassVar[str] = "measured.json"
    BEGUN_WITH: ClassVar[str] = "policy.json"
    PRETRAINING: ClassVar[str] = "pretrain.safetensors"

    path: Path

    def file(self, name: str) -> Path:
        """Return the path of a file in the folder."""
        return self.path / name

    def inside(self, name: str) -> Path:
        """Return the path of a file that a report names.

        Raises:
            ArtefactError: it lies outside the folder.
        """
        path = self.path / name
        if not path.resolve().is_relative_to(self.path.resolve()):
            msg = f"{self.path}: its report names {name!r}, which lies outside the folder"
            raise ArtefactError(msg)
        return path

    def checkpoint(self, name: str) -> Path:
        """Return the path of a file that resumes an interrupted run."""
        return self.path / self.WORK / name

    def outcomes(self, name: str, seed: int) -> Path:
        """Return the checkpoint of what a method's search has measured."""
        return self.checkpoint(f"outcomes-{slug(name)}-{seed}.json")

    def chosen(self, name: str, seed: int) -> Path:
        """Return the folder of the network in which a method has put zeros."""
        return self.file(f"{self.CHOSEN}/{slug(name)}-{seed}")

    def search(self, name: str, seed: int) -> Path:
        """Return the folder of the agent's checkpoints, and of the policy that it ends with."""
        return self.checkpoint(f"search-{slug(name)}-{seed}")

    def found(self, name: str, seed: int) -> Path:
        """Return the checkpoint of what a search, or a policy, says of itself: it is finished."""
        return self.checkpoint(f"finished-{slug(name)}-{seed}.json")

    def finetune(self, directory: str) -> Path:
        """Return the checkpoint of the fine-tune whose network goes into a folder of the run."""
        return self.checkpoint(f"finetune-{slug(directory)}.safetensors")

    def events(self, label: str) -> Path:
        """Return the folder of TensorBoard's curves of a search or fine-tune."""
        return self.file(f"{self.EVENTS}/{slug(label)}")

    @property
    def untouched(self) -> bool:
        """True if nothing is in it, or only what a run that was killed at once leaves."""
        if not self.path.exists():
            return True
        if not self.path.is_dir():
            return False
        names = {path.name for path in self.path.iterdir() if not TEMPORARY.fullmatch(path.name)}
        left = {path.name for path in (self.path / RunFolder.WORK).glob("*")}
        return names <= {RunFolder.WORK} and left <= {RunFolder.LOCK}

    @property
    def finished(self) -> bool:
        """True if the report is written, which is the last thing that a run does."""
        return self.file(RunFolder.REPORT).is_file()

    def check_links(self) -> None:
        """Raise ArtefactError for a linked folder below it that lies elsewhere, where none writes.

        A link to a file is no way out: files are written beside it and take its place.
        """
        whole = self.path.resolve()
        for path in self.path.rglob("*"):  # which follows no links
            if path.is_symlink() and not path.is_file():
                if path.resolve().is_relative_to(whole):
                    continue
                msg = (
                    f"{path} is a link that leaves the run folder, and nothing is written through "
                    "it: remove the link, or name a new --out"
                )
                raise ArtefactError(msg)

    @contextmanager
    def started(self, config: CommonConfig) -> Iterator[None]:
        """Work in the folder: make it, lock it, write the options into it.

        Call it when all input is checked.

        Raises:
            ConfigError: another run is at work in it.
            ArtefactError: it cannot be written, or a link in it leads out of it.
        """
        self.check_links()
        existed, held, useless = self.path.exists(), False, False
        try:
            with locked(self.checkpoint(RunFolder.LOCK), str(self.path)):
                held = True
                _check_usable(config, self.path)
                if self.finished:
                    msg = f"another run has just finished {self.path}: give the command again"
                    raise ConfigError(msg)
                remove_temporaries(self.path.rglob(".*.tmp"))
                save_config(config, self.file(RunFolder.CONFIG))
                yield
        except BudgetError:  # found out of reach on the way: no command can go on with it
            useless = True
            raise
        finally:
            useless = useless and not self._holds_work()
            if held and not existed and (useless or not self.file(RunFolder.CONFIG).exists()):
                shutil.rmtree(self.path, ignore_errors=True)

    def _holds_work(self) -> bool:
        """Return whether a report or a checkpoint is in the folder, or in one below it."""
        return any(
            path.name == RunFolder.REPORT
            or (path.parent.name == RunFolder.WORK and path.name != RunFolder.LOCK)
            for path in self.path.rglob("*")
            if path.is_file()
        )

    def finish(self, members: Sequence["RunFolder"] = ()) -> None:
        """Remove what only an interrupted run needs; no link is followed.

        Args:
            members: the folders in it that hold further networks of the run.

        Raises:
            ArtefactError: a link in it leads out of it.
        """
        self.check_links()
        for folder in (self, *members):
            shutil.rmtree(folder.path / RunFolder.WORK, ignore_errors=True)
        remove_temporaries(self.path.rglob(".*.tmp"))

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each file of the run but report and pages, by path in it.

        What others have put there, such as a log or another run, is not the run's.
        """
        files = (path for path in sorted(self.path.rglob("*")) if path.is_file())
        return {
            name: file_digest(path)
            for path in files
            if path.name != RunFolder.PAGE
            and (name := path.relative_to(self.path).as_posix()) != RunFolder.REPORT
            and RunFolder.WORK not in name.split("/")
            and not TEMPORARY.fullmatch(path.name)
            and _is_own(name)
        }

    def check_digests(self, expected: dict[str, str]) -> None:
        """Raise ArtefactError that names the first file which is missing or not as reported."""
        for name, digest in expected.items():
            path = self.inside(name)
            if not path.is_file():
                msg = f"{path} is missing, though the report lists it: restore it or run again"
                raise ArtefactError(msg)
            if file_digest(path) != digest:
                msg = f"{path} is not the file that the report was made from: its SHA-256 differs"
                raise ArtefactError(msg)


def _is_own(name: str) -> bool:
    """Tell a run's files from others by their path in its folder."""
    *folders, file = name.split("/")
    if folders and MEMBER.fullmatch(folders[0]):
        folders = folders[1:]
    if not folders:
        return Path(file).suffix in OWN_SUFFIXES
    return folders[0] in RunFolder.OWN_FOLDERS


def open_run(config: CommonConfig, out: Path | None, default_name: str) -> RunFolder:
    """Find the folder of a run: new, or one to resume. Nothing is written yet.

    With ``out`` that folder is used, and must be new, or hold a run with the same options. Without,
    it is ``runs/NAME``; where that holds a finished run, or one with other options, the first of
    ``runs/NAME-2``, ``-3``, ... that does not.

    Args:
        config: the options of this run.
        out: the folder that the user named.
        default_name: NAME.

    Raises:
        ConfigError: the folder holds something else.
    """
    if out is not None:
        _check_usable(config, out)
        return RunFolder(path=out)
    number = 1
    while True:
        name = default_name if number == 1 else f"{default_name}-{number}"
        folder = RunFolder(path=RUNS / name)
        at_work = (
            not folder.finished or (folder.path / RunFolder.WORK).exists()
        )  # killed at its end
        if folder.untouched or (at_work and not _differences(config, folder)):
            return folder
        number += 1


def _check_usable(config: CommonConfig, out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        msg = f"--out {out} is a file; name a folder"
        raise ConfigError(msg)
    folder = RunFolder(path=out)
    if not folder.file(RunFolder.CONFIG).is_file():
        if not folder.untouched:
            msg = f"--out {out} holds files of something else; name a new folder"
            raise ConfigError(msg)
        return
    found = _differences(config, folder)
    if found:
        more = f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        msg = (
            f"--out {out} holds a run with other options ({'; '.join(found[:MOST_NAMED])}{more}); "
            f"name a new folder, or resume that run with --config {folder.file(RunFolder.CONFIG)}"
        )
        raise ConfigError(msg)


def _differences(config: CommonConfig, folder: RunFolder) -> list[str]:
    path = folder.file(RunFolder.CONFIG)
    if not path.is_file():
        return ["command"]
    return differences(config, read_yaml(path))


def existing_run(path: Path) -> RunFolder:
    """Return the folder of a finished run.

    Raises:
        ArtefactError: there is no finished run in it.
    """
    folder = RunFolder(path=path)
    if not path.is_dir():
        msg = f"{path} is not a folder; name the --out of an earlier run"
        raise ArtefactError(msg)
    missing = [
        name for name in (RunFolder.CONFIG, RunFolder.REPORT) if not folder.file(name).is_file()
    ]
    if not missing:
        return folder
    whole = path.resolve().parent
    if MEMBER.fullmatch(path.resolve().name) and (whole / RunFolder.CONFIG).is_file():
        msg = f"{path} is a part of a run of several networks: name {whole}"
    elif RunFolder.CONFIG in missing:
        msg = f"{path} holds no {RunFolder.CONFIG}, it is no run folder: name the --out of a run"
    else:
        msg = (
            f"{path} holds no {RunFolder.REPORT}: no finished run; repeat its command to finish it"
        )
    raise ArtefactError(msg)


def slug(name: str) -> str:
    """Return ``name`` with what a file name cannot hold replaced by ``_``."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
