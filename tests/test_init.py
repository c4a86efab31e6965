import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import prunegraph
from prunegraph.__main__ import main


def test_import_is_lean() -> None:
    code = (
        "import sys, prunegraph; "
        "print([m for m in ('torch', 'numpy', 'stable_baselines3') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", prunegraph.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert name in dir(prunegraph)
    assert getattr(prunegraph, name).__name__.rpartition(".")[2] == name


@pytest.mark.parametrize(
    ("command", "loaded"),
    [
        ("prunegraph train --help", "tyro"),
        ("train_agent --help", "tyro"),
        ("prunegraph inspect", "torch"),
    ],
)
def test_ctrl_c_while_loading_gives_one_line(command: str, loaded: str) -> None:
    words = [sys.executable, "-v", "-m", *command.split()]  # -v tells what is being loaded
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(f"import '{loaded}"):
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert "prunegraph: interrupted" in rest


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_ends_a_command_with_one_line(number: signal.Signals, tmp_path: Path) -> None:
    words = ["pretrain", "--arch", "digits_resnet8_w4", "--epochs", "100000", "--out", "net"]
    code = (
        "import runpy; from prunegraph.core import console; console.PLAIN_INTERVAL = 0.1; "
        "runpy.run_module('prunegraph', run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline()  # its progress
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error == "prunegraph: interrupted; the same command resumes where it stopped\n"


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_idle_threads_sleep_unless_the_user_says_otherwise(
    given: dict[str, str], spins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    kept = {key: value for key, value in os.environ.items() if key not in names}
    monkeypatch.setattr("os.environ", kept | given)
    main(["train", "--nonsense"])
    assert str(os.environ.get("GOMP_SPINCOUNT")) == spins


def test_unknown_names_raise() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prunee'"):
        _ = prunegraph.prunee


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -u -m prunegraph | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_agent_and_optional_libraries_load_when_they_are_needed() -> None:
    heavy = ("torch_geometric", "stable_baselines3", "transformers", "tokenizers", "datasets")
    at_work = ("matplotlib", "sklearn", "scipy.stats", "scipy.optimize")
    code = (
        "import sys, prunegraph.tasks, prunegraph.models, prunegraph.runs.export,"
        "prunegraph.runs.inspect;"
        f"print([m for m in {heavy + at_work} if m in sys.modules]);"
        "import prunegraph.runs.verify.run;"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    words = [sys.executable, "-c", code]
    output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert output == "[]\n[]\n"
