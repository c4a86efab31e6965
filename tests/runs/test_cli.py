import dataclasses
import errno
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prunegraph.agent.options import AgentOptions
from prunegraph.cli import main as cli
from prunegraph.core.errors import ConfigError
from prunegraph.methods.registry import BY_NAME, CLASSES, SEARCHES, load
from prunegraph.runs import inspect
from prunegraph.runs.options import yaml_file as options
from prunegraph.runs.options.compare import CompareConfig
from prunegraph.runs.options.config import PretrainConfig, TrainConfig
from prunegraph.runs.options.help import SECTIONS
from prunegraph.runs.options.tools import InspectConfig, VerifyConfig
from prunegraph.runs.parallel.machine import default_threads


def run(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(arguments.split())
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("--help", capsys)
    assert code == 0
    assert err == ""
    assert all(f"  {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(f"{name} --help", capsys)
    assert code == 0
    assert err == ""
    for option in ("--device", "--seed", "--config", "--json", "--threads"):
        assert option in out


def test_help_and_mistakes_load_no_torch() -> None:
    words = (["--help"], ["trian"], ["train", "--help"], ["compare", "--help"], ["apply", "--keep"])
    code = (
        "import sys; from prunegraph.__main__ import main; "
        f"codes = [*map(main, {words})]; "
        "sys.exit(f'{codes}' if {'torch', 'stable_baselines3'} & {*sys.modules} else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: prunegraph COMMAND" in done.stdout
    assert "did you mean 'train'" in done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("--version", capsys)
    assert code == 0
    assert out.startswith("prunegraph ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "unknown command 'trian'"),
        ("inspect --arch resnet21", "unknown architecture 'resnet21'"),
        ("inspect --archh=resnet20", "unknown option '--archh=resnet20' of `prunegraph inspect`"),
        ("inspect resnet20", "(a network? give --arch resnet20; a run? --run resnet20); see"),
        ("train --sparsity 0.5", "unknown option '--sparsity' of `prunegraph train`"),
        ("apply --policy resnet-cifar --pattern 2:4", "unknown option '--pattern' of"),
        ("inspect --seed one", "--seed: 'one' is no integer; see `prunegraph inspect --help`"),
        ("train --keep-macs 50%", "--keep-macs: '50%' is no number"),
        ("inspect --seed", "Missing value for argument '--seed'"),
        ("inspect --threads 0", "threads=0 must be at least 1"),
        ("inspect --device nowhere", "device 'nowhere' cannot be used here"),
        ("inspect --config none.yaml", "cannot read options from none.yaml"),
        ("inspect --weights none.safetensors", "no weights file none.safetensors"),
        ("inspect --arch torchvision:resnet19", "torchvision has no classification network"),
        ("inspect --arch nothing:build", "cannot import 'nothing'"),
        ("inspect --dataset folder", "folder needs a data_dir"),
        ("inspect --dataset mnist", "unknown data set 'mnist'"),
        ("export", "`prunegraph export` needs RUN: run folder of a command that prunes; of"),
        ("prune --seed 1", "`prunegraph prune` needs METHOD: a heuristic (l1/uniform,"),
        ("apply", "`prunegraph apply` needs --policy: resnet-cifar, which comes with"),
        ("export nowhere", "nowhere holds no mask.json: name the --out of a finished run"),
        ("verify nowhere", "nowhere is not a folder"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(arguments, capsys)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("prunegraph: ")
    assert out == ""


def test_near_misses_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'inspect'" in run("inspekt", capsys)[2]
    assert "did you mean '--image-size'" in run("inspect --image-siz 3", capsys)[2]


def test_full_disk_gives_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> dict[str, object]:
        raise OSError(28, "No space left on device", "runs/a")

    monkeypatch.setattr(inspect, "run_inspect", fail)
    code, _, err = run("inspect", capsys)
    assert code == 2
    assert err.startswith("prunegraph: No space left on device: runs/a; free space or choose")
    assert err.count("\n") == 1


def test_a_file_that_cannot_be_read_is_named_without_advice_on_space(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> dict[str, object]:
        raise OSError(errno.EIO, "Input/output error", "a.png")

    monkeypatch.setattr(inspect, "run_inspect", fail)
    assert run("inspect", capsys) == (2, "", "prunegraph: Input/output error: a.png\n")


def test_ctrl_c_gives_one_line_and_exit_code_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> dict[str, object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "run_inspect", interrupt)
    code, _, err = run("inspect", capsys)
    assert code == 130
    assert "resumes" in err
    assert err.count("\n") == 1


def test_threads_are_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    assert run("inspect --threads 3 --json", capsys)[0] == 0
    assert run("inspect --json", capsys)[0] == 0
    assert seen == [3, default_threads()]


def test_config_file_gives_defaults_that_the_command_line_overrides(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("arch: resnet20\nnum-classes: 7\nseed: 4\n")
    config = options.parse(InspectConfig, ["--config", str(path), "--seed", "5"])
    assert isinstance(config, InspectConfig)
    assert (config.arch, config.num_classes, config.seed) == ("resnet20", 7, 5)
    assert config.config == path


@pytest.mark.parametrize(("option", "name"), [("arch", "shop:make"), ("ray", "ray://there:10001")])
def test_code_and_clusters_that_only_a_file_of_options_names_are_refused(
    tmp_path: Path, option: str, name: str
) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(json.dumps({option: [name] if option == "arch" else name}))
    with pytest.raises(ConfigError, match=f"trust it with --{option} {name}"):
        options.parse(TrainConfig, ["--config", str(path)])
    config = options.parse(TrainConfig, ["--config", str(path), f"--{option}", name])
    assert isinstance(config, TrainConfig)
    assert name in (config.ray, *config.arch)


def test_a_config_file_is_checked_with_what_the_command_line_gives(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("slimmable: 0.25\n")
    words = ["--config", str(path), "--weights", "a.safetensors"]
    config = options.parse(PretrainConfig, words)
    assert isinstance(config, PretrainConfig)
    assert (config.slimmable, config.weights) == (0.25, Path("a.safetensors"))
    with pytest.raises(ConfigError, match="--weights"):
        options.parse(PretrainConfig, words[:2])


def test_config_file_may_leave_out_what_the_command_line_gives(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("threads: 2\n")
    config = options.parse(VerifyConfig, [f"--config={path}", "somewhere"])
    assert config == VerifyConfig(run=Path("somewhere"), threads=2, config=path)


@pytest.mark.parametrize("word", ["--no-reconstruct", "--reconstruct"])
def test_a_switch_may_repeat_or_turn_what_the_file_of_options_says(
    word: str, tmp_path: Path
) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("reconstruct: false\nagent:\n  update-size: 8\n")
    words = ["--config", str(path), word, "--agent.swaps", "3"]
    config = options.parse(CompareConfig, words)
    assert isinstance(config, CompareConfig)
    assert config.reconstruct == (word == "--reconstruct")
    assert config.agent == AgentOptions(update_size=8, swaps=3)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_the_plain_help_is_short_and_the_whole_one_is_not(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plain, _ = run(f"{name} --help", capsys)
    _, whole, _ = run(f"{name} --help-all", capsys)
    assert "--agent." not in plain
    assert ("--agent.swaps N " in whole) == (name in ("train", "prune", "compare"))
    long = ("train", "prune", "compare")
    assert plain.count("\n  --") <= 30 < whole.count("\n  --") or name not in long
    sections = re.findall(r"^(\S.*):$", plain, re.MULTILINE)
    assert sections == [s for s in (*SECTIONS, "help", "examples") if s in sections]
    assert not re.search(r"default: *(None|False|True|\(\))?\)", whole)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_the_help_ends_with_three_examples_that_the_command_takes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(f"{name} --help", capsys)
    lines = out.partition("examples:\n")[2].splitlines()
    assert len(lines) == 3
    for line in lines:
        program, command, *words = shlex.split(line)
        assert (program, command) == ("prunegraph", name)
        assert options.parse(cli.load(cli.COMMANDS[name].options), words) is not None


@pytest.mark.parametrize("name", sorted({*SEARCHES, *BY_NAME} - {"sampler"}))
def test_the_help_of_prune_shows_the_options_of_a_method(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(f"prune {name} --help", capsys)
    assert code == 0
    kind = load(CLASSES[name])
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    shown = re.findall(rf"^  --{name.replace('_', '-')}\.([\w-]+) ", out, re.M)
    assert shown == [field.name.replace("_", "-") for field in fields]


def test_the_help_tells_defaults_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run("train --help", capsys)
    words = " ".join(out.split())
    assert "--networks N pruned networks that one search may evaluate" in words
    assert "everything counted (default: 400)" in words
    assert "epochs of the fine-tune, the same for every network that gets one; default: 40" in words
    assert "--policy PATH resnet-cifar" in " ".join(run("apply --help", capsys)[1].split())
    assert "or a policy file (needed)" in " ".join(run("apply --help", capsys)[1].split())


@pytest.mark.slow
def test_a_broken_pipe_is_no_error() -> None:
    code = (
        "import sys; from prunegraph.cli.main import main; "
        "sys.exit(main(['inspect', '--arch', 'resnet56', '--json']))"
    )
    command = f'{sys.executable} -c "{code}" | head -c 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0


def test_inspect_json_has_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("inspect --arch resnet20 --json", capsys)
    assert code == 0
    assert err == ""
    content = json.loads(out)
    assert list(content) == ["arch", "macs", "params", "units", "groups", "frozen_ops"]
    assert content["arch"] == "resnet20"
    group = content["groups"][0]
    assert list(group) == ["name", "size", "members", "frozen", "macs_share"]
    assert "conv1.weight:0" in group["members"]
    assert sum(item["size"] for item in content["groups"]) == content["units"]


ROUND = """╭─ Parsing error ─────╮
│ invalid choice 'x'.  │
│ ──────────────────── │
│ For full helptext,   │
╰──────────────────────╯"""


@pytest.mark.parametrize("box", [ROUND, ROUND.translate(str.maketrans("│╭╮╰╯─", "|++++-"))])
def test_the_box_of_a_message_is_taken_away_in_ascii_too(box: str) -> None:
    assert options._one_line(box) == "invalid choice 'x'"
