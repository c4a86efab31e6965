"""Kill -9 at any moment: the same command goes on to the same result, and nothing else is left.

A process kills itself just before a random one of its steps on the disk: what the next run finds
changes at these steps only. ``make endurance`` asks for more kills.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from prunegraph.cli.main import main
from prunegraph.models import WeightsInfo, save_weights
from prunegraph.models.embedded_language import build_embedded, byte_tokenizer
from prunegraph.models.pretrained import save_pretrained_layout
from prunegraph.models.recogniser import PROXY_SIZES, build_recogniser
from support.drawing import drawn
from support.sentences import save_encoder, tiny_encoder, write_table

KILLS = int(os.environ.get("PRUNEGRAPH_KILLS", "2"))
KILLS_A_RUN = 3
TIMES = {"files", "report", "latency_ms", "seconds", "evaluation_seconds"}
"""Keys of a report or summary that hold times or digests of what holds them."""

STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
Run = Callable[..., int]


def child(words: list[str], folder: str, kill_at: int | None, counter: str) -> None:
    """Run a command; die by SIGKILL just before its ``kill_at``-th step in ``folder``."""
    steps = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if event in STEPS and str(arguments[0]).startswith(folder):
            steps += 1
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    sys.addaudithook(watch)
    code = main(words)
    Path(counter).write_text(str(steps))
    os._exit(code)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that runs a command in a process, and returns its steps; 0 = killed."""
    context = multiprocessing.get_context("fork")  # a new interpreter would load torch each time
    counter = tmp_path_factory.mktemp("steps") / "steps"

    def start(words: list[str], out: Path, kill_at: int | None = None) -> int:
        counter.unlink(missing_ok=True)
        arguments = ([*words, "--out", str(out)], str(out.parent), kill_at, str(counter))
        process = context.Process(target=child, args=arguments)
        process.start()
        process.join(600)
        assert process.exitcode in (0, -signal.SIGKILL)
        return int(counter.read_text()) if process.exitcode == 0 else 0

    return start


@pytest.fixture(scope="module")
def commands(
    weights: Path, quick: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """Return a very small job of each command, without its ``--out``."""
    small = ["--weights", str(weights), "--calibration-images", "64", "--finetune-epochs", "2"]
    few = ["--networks", "36", "--agent.update-size", "4", "--agent.surrogate-steps", "2"]
    few += ["--agent.distill-steps", "1"]
    search = [*few, "--agent.subset", "64", *small]
    one = ["--seeds", "1"]
    alone = ["--search-seeds", "1", "--baselines", "none"]
    folder = tmp_path_factory.mktemp("lm") / "tiny"
    save_pretrained_layout(build_embedded(), byte_tokenizer(), folder)
    language = ["--task", "causal_lm", "--weights", str(folder), "--calibration-tokens", "512"]
    language += ["--window", "32", "--keep-params", "0.8", "--finetune-epochs", "0", *few]
    methods = ["--methods", "l1/uniform", "taylor/per_mac", "cem", "netadapt"]
    more = ["pretrain", "--weights", str(weights), "--slimmable", "0.4", "--distill", "0.5"]
    clients = ["--clients", "3", "--rounds", "4", "--fedmap.every", "1", "--sparsity", "0.8"]
    clients += ["--fedmap.epochs", "1", "--fedmap.batch-size", "64"]
    sentences = tmp_path_factory.mktemp("sentences")
    save_encoder(sentences / "encoder", tiny_encoder(initializer_range=0.3))
    write_table(sentences / "toy.tsv", train=64, search=32, dev=32)
    drawn = ["--task", "text_classification", "--weights", str(sentences / "encoder")]
    drawn += ["--data-dir", str(sentences), "--dataset", "toy", "--pretrain-epochs", "1"]
    for option, value in ("candidates", 2), ("early", 1), ("steps", 2), ("batch-size", 16):
        drawn += [f"--randomized.{option}", str(value)]
    recogniser = tmp_path_factory.mktemp("speech") / "recogniser.safetensors"
    fresh = build_recogniser(features=8, tokens=41, **PROXY_SIZES)
    save_weights(fresh, recogniser, WeightsInfo(arch="recogniser"))
    spoken = ["--task", "speech_recognition", "--weights", str(recogniser), "--sparsity", "0.5"]
    spoken += ["--languages", "right", "up", "--pathways.epochs", "1", "--finetune-epochs", "1"]
    blocks = [*language[:8], "--sparsity", "0.5", "--finetune-epochs", "0"]
    words = {
        "pretrain": ["pretrain", "--arch", "digits_resnet8_w4", "--epochs", "3"],
        "slimmable": [*more, "--epochs", "2"],
        "train": ["train", "--search-seeds", "2", "--baselines", "none", *search],
        "adapt": ["train", "--policy", str(quick), *alone, *search],
        "apply": ["apply", "--policy", str(quick), *small],
        "compare": ["compare", *one, *methods, *search],
        "federation": ["prune", "fedmap", *clients, *small[:4], "--finetune-epochs", "0"],
        "language": ["prune", "agent", *language],
        "blocks": ["prune", "thanos", *blocks],
        "pathways": ["prune", "pathways", *spoken],
        "randomized": ["prune", "randomized", *drawn, "--sparsity", "0.9"],
    }
    return {name: [*those, "--threads", "1"] for name, those in words.items()}


def contents(out: Path) -> dict[str, Any]:
    """Return all that a command left, by name, without times and learning curves."""
    paths = [path for path in out.parent.rglob("*") if path.is_file() or not any(path.iterdir())]
    names = {path.relative_to(out.parent).as_posix(): path for path in paths}
    found: dict[str, Any] = {
        name: path.read_bytes() if path.is_file() else None
        for name, path in names.items()
        if "/events/" not in name and not name.endswith("report.html")  # it shows times
    }
    for name in [name for name in found if name.endswith("config.yaml")]:
        lines = found[name].splitlines()
        found[name] = [line for line in lines if not line.startswith(b"out:")]
    for name in [name for name in found if name.endswith("report.json")]:
        found[name] = without_times(json.loads(found[name]))
    return found


def without_times(value: Any) -> Any:
    """Return a JSON value without the keys that hold times."""
    if isinstance(value, list):
        return [without_times(item) for item in value]
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return value


SEARCHES = ("slimmable", "train", "adapt", "compare", "language")
SYSTEMS = ("federation", "blocks", "pathways", "randomized")
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in (*SEARCHES, *SYSTEMS)]


@pytest.mark.parametrize("command", ["pretrain", "apply", *OTHERS])
def test_a_killed_command_goes_on_to_the_same_result(
    command: str, commands: dict[str, list[str]], run: Run, tmp_path: Path
) -> None:
    with drawn() if command == "apply" else nullcontext():  # figures are files, too
        check_kills(command, commands[command], run, tmp_path)


def check_kills(command: str, words: list[str], run: Run, tmp_path: Path) -> None:
    """Kill a command before steps that chance draws, and compare what it leaves in the end."""
    draws = random.Random(f"{command} {KILLS}")
    whole = tmp_path / "whole" / "out"
    total = run(words, whole)
    expected, kills = contents(whole), 0
    while kills < KILLS:
        out = tmp_path / str(kills) / "out"
        left, points = total, []
        for _ in range(min(KILLS_A_RUN, KILLS - kills)):
            points.append(1 + int(draws.random() * left))
            left -= points[-1] - 1
            if run(words, out, points[-1]):
                break  # it had less left to do than was thought
            kills += 1
        else:
            run(words, out)
        found = contents(out)
        assert found.keys() == expected.keys(), f"killed before steps {points}"
        wrong = [name for name in expected if found[name] != expected[name]]
        assert not wrong, f"killed before steps {points}"
