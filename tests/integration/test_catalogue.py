"""A policy trained on a folder of networks, interrupted, applied to one that it has not seen."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prunegraph.agent import train
from prunegraph.agent.policies import load_policy
from prunegraph.cli.main import main
from prunegraph.data import load_dataset
from prunegraph.models import WeightsInfo, save_weights
from prunegraph.runs.prepare import build_network

ARCHS = ("random_basic_9", "random_inverted_1", "random_mixer_1")
WORDS = ("--budgets", "0.3", "0.6", "--agent.update-size", "2", "--threads", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a catalogue of fresh networks, of which the last is not to be trained on."""
    folder, dataset = tmp_path_factory.mktemp("catalogue"), load_dataset("digits")
    for number, arch in enumerate(ARCHS):
        info = WeightsInfo(
            arch=arch,
            dataset="digits",
            mean=dataset.mean,
            std=dataset.std,
            extra={"part": "test" if number == 2 else "train"},
        )
        path = folder / f"{number}.safetensors"
        save_weights(build_network(arch, dataset, number), path, info)
    return folder


@pytest.fixture(scope="module")
def words(networks: Path) -> list[str]:
    """Return a training command without its ``--out``: three updates."""
    return ["train", "--catalogue", str(networks), *WORDS, "--networks", "35"]


@pytest.fixture(scope="module")
def policy(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folder of a finished training."""
    path = tmp_path_factory.mktemp("policy") / "run"
    assert main([*words, "--out", str(path)]) == 0
    return path


def test_the_policy_learned_and_names_what_it_was_trained_on(policy: Path) -> None:
    trained = load_policy(policy)
    assert trained.record["updates"] == 3
    assert set(trained.record["catalogue"]) == {"0", "1"}
    assert [budget["keep_macs"] for budget in trained.record["budgets"]] == [0.3, 0.6]
    last = trained.network.group_head[-1].weight
    assert last.abs().sum() > 0


def test_a_finished_training_is_not_repeated(words: list[str], policy: Path) -> None:
    before = (policy / "policy.json").stat().st_mtime_ns
    assert main([*words, "--out", str(policy)]) == 0
    assert (policy / "policy.json").stat().st_mtime_ns == before


def test_an_interrupted_training_ends_with_the_same_policy(
    words: list[str], policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach: Callable[..., None] = train.Checkpoint.attach

    def interrupted(self: train.Checkpoint, model: train.ChannelPPO) -> None:
        self.seconds = 0.0
        attach(self, model)
        told = model.progress

        def stop(record: dict[str, object]) -> None:
            assert told is not None
            told(record)
            if record["update"] == 2:
                raise KeyboardInterrupt

        model.progress = stop

    command = [*words, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patched:
        patched.setattr(train.Checkpoint, "attach", interrupted)
        assert main(command) == 130
    assert not (tmp_path / "run" / "policy.json").exists()
    assert main(command) == 0
    whole, resumed = load_policy(policy), load_policy(tmp_path / "run")
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_it_decides_on_a_network_that_it_has_not_seen(
    networks: Path, policy: Path, tmp_path: Path
) -> None:
    command = ["apply", "--weights", str(networks / "2.safetensors"), "--policy", str(policy)]
    command += ["--keep-macs", "0.5", "--finetune-epochs", "0", "--calibration-images", "64"]
    command += ["--threads", "1", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["pruned"]["macs"] <= 0.5 * report["dense"]["macs"]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--catalogue", "EMPTY"), "holds no weights to train on"),
        (("--arch", "resnet20"), "leave --arch, --weights"),
        (("--keep-params", "0.5"), "takes --budgets"),
        (("--task", "causal_lm"), "--task"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str],
    more: tuple[str, ...],
    match: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [word.replace("EMPTY", str(tmp_path)) for word in more]
    assert main([*words, *given, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1


def test_too_few_networks_for_an_update_are_refused_before_any_work(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--networks", "5", "--out", str(tmp_path / "run")]) == 2
    told = "networks=5 for each of 2 in the catalogue allows no update of the policy"
    assert f"{told}: give at least 12" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
