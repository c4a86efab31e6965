"""A stranger's run folder, given to a command: all is well, or one line says why it is not."""

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunegraph.cli.main import main
from prunegraph.runs.folder import RunFolder

PROFILE = settings.get_profile(os.environ.get("PRUNEGRAPH_PROFILE", "hostile"))
EXAMPLES = max(PROFILE.max_examples // 20, 1)
"""A whole command takes longer than one reader."""

KINDS = {".json": "json", ".safetensors": "safetensors", ".yaml": "yaml"}


def sign_report(folder: Path) -> None:
    """Let the report list the files as they are, so that what is in them is looked at."""
    path = folder / "report.json"
    with contextlib.suppress(ValueError, RecursionError, OSError):
        report = json.loads(path.read_text())
        if isinstance(report, dict) and isinstance(report.get("files"), dict):
            report["files"] = RunFolder(path=folder).digests()
            path.write_text(json.dumps(report))


def check_command(words: list[str]) -> int:
    """Run a command and check that it ends well, or with one line on standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*words, "--threads", "1"])
    assert code in (0, 2)
    assert err.getvalue().count("\n") == (code == 2)
    return code


def names(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("command", ["verify", "export", "apply", "inspect", "train"])
def test_a_command_takes_a_hostile_run_folder_or_says_why_not(
    command: str,
    run_folder: Path,
    run_words: list[str],
    mutators: dict[str, Callable[[bytes, Random], bytes]],
    sign_recipe: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    out = tmp_path_factory.mktemp("out")
    files = [path for path in sorted(run_folder.rglob("*")) if path.suffix in KINDS]
    valid = {path: path.read_bytes() for path in files}
    dense = str(run_folder / "dense.safetensors")
    words = {
        "verify": ["verify", str(run_folder)],
        "export": [
            "export",
            str(run_folder),
            "--format",
            "safetensors",
            "--out",
            f"{out}/e.safetensors",
        ],
        "apply": ["apply", "--policy", str(run_folder), "--weights", dense, "--out", f"{out}/a"],
        "inspect": ["inspect", "--run", str(run_folder)],
        "train": [*run_words, "--out", str(run_folder)],  # shows the finished run again
    }[command]
    if command == "apply":  # refused once all files are read
        words += ["--keep-macs", "0.000001"]
    before = names(run_folder)

    @settings(
        PROFILE, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), deadline=None
    )
    @given(random=st.randoms(use_true_random=False))
    def check(random: Random) -> None:
        path = random.choice(files)
        path.write_bytes(mutators[KINDS[path.suffix]](valid[path], random))
        try:
            sign_recipe(run_folder / "pruned")
            sign_report(run_folder)
            written = 2 if check_command(words) == 0 and command == "export" else 0
            assert names(run_folder) == before
            assert len(names(out)) == written
        finally:
            for each in out.iterdir():
                each.unlink()
            for each, content in valid.items():
                each.write_bytes(content)

    check()
