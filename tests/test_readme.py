"""What the README shows works as it stands there."""

import re
import shlex
from pathlib import Path

import pytest

from prunegraph.experiment.cli import COMMANDS

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code) == 1
    exec(compile(code[0], "README.md", "exec"), {})
    dense, pruned = re.findall(r"[\d,]+", capsys.readouterr().out)[:2]
    assert int(pruned.replace(",", "")) <= 0.5 * int(dense.replace(",", ""))


def test_the_commands_of_the_quickstart_exist() -> None:
    lines = re.findall(r"^prunegraph (.*)$", README, re.MULTILINE)
    assert len(lines) >= 8
    assert {shlex.split(line, comments=True)[0] for line in lines} <= set(COMMANDS)
