import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from prunegraph.cli.main import main
from prunegraph.core.files import locked
from prunegraph.training.loop import _Training

OPTIONS = ["pretrain", "--arch", "digits_resnet8_w4", "--epochs", "3", "--threads", "1"]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


def test_pretrain_writes_weights_with_their_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*OPTIONS, "--out", str(tmp_path / "net"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / "net.json").read_text())
    assert record["arch"] == "digits_resnet8_w4"
    assert record["dataset"] == "digits"
    assert record["split_seed"] == 0
    assert record["test_accuracy"] == result["test_accuracy"] > 0.2
    assert len(record["losses"]) == 3
    assert record["losses"][0] > record["losses"][-1] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.json", "net.safetensors"]


def test_an_interrupted_pretrain_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*OPTIONS, "--out", str(tmp_path / "whole")]) == 0
    whole = weights(tmp_path / "whole.safetensors")
    calls = 0
    train_epoch = _Training.train_epoch

    def interrupt(self: _Training, after_step: Callable[[float], None]) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        train_epoch(self, after_step)

    monkeypatch.setattr(_Training, "train_epoch", interrupt)
    assert main([*OPTIONS, "--out", str(tmp_path / "cut")]) == 130
    assert not (tmp_path / "cut.safetensors").exists()
    assert main([*OPTIONS, "--out", str(tmp_path / "cut")]) == 0
    assert calls == 4  # the first epoch was not repeated
    cut = weights(tmp_path / "cut.safetensors")
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("cut", "whole")]
    assert records[0]["losses"] == records[1]["losses"]
    capsys.readouterr()


def test_existing_weights_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.safetensors").write_bytes(b"precious")
    assert main([*OPTIONS, "--out", str(tmp_path / "net")]) == 2
    assert "exists: delete it" in capsys.readouterr().err
    assert (tmp_path / "net.safetensors").read_bytes() == b"precious"
    (tmp_path / "notes.json").write_text("mine")
    assert main([*OPTIONS, "--out", str(tmp_path / "notes")]) == 2
    assert "notes.json exists: delete it" in capsys.readouterr().err
    assert (tmp_path / "notes.json").read_text() == "mine"


def test_the_same_command_again_says_that_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*OPTIONS, "--out", str(tmp_path / "net")]
    assert main([*words, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(_Training, "train_epoch", pytest.fail)
    assert main([*words, "--json"]) == 0
    captured = capsys.readouterr()
    assert "net.safetensors is finished: test accuracy" in captured.err
    again = json.loads(captured.out)
    assert {key: again[key] for key in first} == {**first, "seconds": 0.0}
    for other in (["--seed", "1"], ["--epochs", "4"], ["--lr", "0.05"], ["--batch-size", "64"]):
        assert main([*words, *other]) == 2
        assert "exists: delete it" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main([*OPTIONS, "--out", str(tmp_path / "net")]) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_pretrain_that_was_killed_when_all_was_written_ends(tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    before = tmp_path / "net.safetensors.checkpoint"
    kept: list[bytes] = []
    unlink = Path.unlink

    def keep(self: Path, missing_ok: bool = False) -> None:
        if self == before:
            kept.append(self.read_bytes())
        unlink(self, missing_ok=missing_ok)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", keep)
        assert main([*OPTIONS, "--out", str(out)]) == 0
    written = out.read_bytes()
    before.write_bytes(kept[0])
    (tmp_path / ".net.json.0123456789abcdef.tmp").touch()
    assert main([*OPTIONS, "--out", str(out)]) == 0
    assert out.read_bytes() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.json", "net.safetensors"]


def test_a_second_pretrain_of_the_same_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "net.safetensors.lock", "it"):
        assert main([*OPTIONS, "--out", str(tmp_path / "net")]) == 2
    err = capsys.readouterr().err
    assert f"another run is at work on {tmp_path / 'net.safetensors'}: wait" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "net.safetensors"
    assert main([*OPTIONS, "--out", str(path)]) == 0
    return path


def test_weights_are_trained_on_as_slimmable_ones(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", "--weights", str(trained), "--epochs", "2", "--threads", "1", "--json"]
    slim = [*words, "--slimmable", "0.4", "--out", str(tmp_path / "slim")]
    assert main(slim) == 0
    result = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / "slim.json").read_text())
    assert record["arch"] == result["arch"] == "digits_resnet8_w4"
    assert record["slimmable"] == 0.4
    assert record["peak_lr"] == 0.05
    assert record["trained_on"] == "the train split; the search split is unseen"
    assert main([*words, "--out", str(tmp_path / "longer")]) == 0
    assert "slimmable" in json.loads((tmp_path / "longer.json").read_text())
    before, slimmed = weights(trained), weights(tmp_path / "slim.safetensors")
    longer = weights(tmp_path / "longer.safetensors")
    for one, other in ((before, slimmed), (before, longer), (longer, slimmed)):
        assert not torch.equal(one["conv1.weight"], other["conv1.weight"])
    capsys.readouterr()
    assert main(slim) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] == 0.0  # it is finished
    assert main([*slim, "--slimmable", "0.5"]) == 2
    assert "exists: delete it" in capsys.readouterr().err


def test_weights_are_trained_on_with_the_old_outputs_as_teacher(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", "--weights", str(trained), "--epochs", "1", "--threads", "1"]
    words += ["--slimmable", "0.4"]
    assert main([*words, "--out", str(tmp_path / "plain")]) == 0
    learned = [*words, "--distill", "0.5", "--out", str(tmp_path / "learned")]
    assert main(learned) == 0
    assert json.loads((tmp_path / "learned.json").read_text())["distill"] == 0.5
    plain, other = (
        weights(tmp_path / "plain.safetensors"),
        weights(tmp_path / "learned.safetensors"),
    )
    assert not torch.equal(plain["conv1.weight"], other["conv1.weight"])
    capsys.readouterr()
    assert main(learned) == 0
    assert "is finished" in capsys.readouterr().out
    assert main([*learned, "--distill", "0.6"]) == 2
    assert "exists: delete it" in capsys.readouterr().err


def test_how_images_are_read_goes_on_with_the_weights(tmp_path: Path) -> None:
    first = ["--epochs", "1", "--no-flip", "--out", str(tmp_path / "a")]
    assert main([*OPTIONS, *first]) == 0
    more = ["pretrain", "--weights", str(tmp_path / "a.safetensors"), "--epochs", "1"]
    more += ["--threads", "1", "--out", str(tmp_path / "b")]
    assert main(more) == 0
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["no_flip"] is True
    assert main([*more, "--no-flip"]) == 0  # it is finished


def test_weights_are_not_taken_for_the_file_to_write(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", "--weights", str(trained), "--out", str(trained)]) == 2
    assert "would take the place of --weights: give another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slimmable", "0.4"], "--slimmable makes a trained network slimmable: give its --wei"),
        (["--distill", "0.4"], "--distill learns from the outputs of a trained network: give its"),
        (["--distill", "1.5", "--weights", "W"], "distill=1.5 must lie in [0, 1]"),
        (["--slimmable", "1.5", "--weights", "W"], "slimmable=1.5 must lie in [0.001, 1]"),
        (["--slimmable", "0.002", "--weights", "W"], "keep_macs=0.002"),
        (["--weights", "W", "--arch", "digits_resnet"], "holds digits_resnet8_w4, not digits_res"),
        (["--weights", "nowhere.safetensors"], "no weights file nowhere.safetensors"),
        (["--weights", "W", "--split-seed", "3"], "trained on another cut"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    named = [str(trained) if word == "W" else word for word in words]
    assert main(["pretrain", *named, "--threads", "1", "--out", str(tmp_path / "net")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


FLATTENS = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(288, 10)

    def forward(self, images):
        x = self.conv(images).relu()
        return self.fc(x.view(x.size(0), -1))
"""


def test_a_network_that_flattens_by_view_is_trained_and_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flattening.py").write_text(FLATTENS)
    monkeypatch.chdir(tmp_path)
    named = ["--arch", "flattening:Net", "--dataset", "digits", "--threads", "1"]
    assert main(["pretrain", *named, "--epochs", "1", "--out", "net.safetensors"]) == 0
    words = ["--policy", "resnet-cifar", "--keep-macs", "0.5", "--finetune-epochs", "1"]
    weights = ["--weights", "net.safetensors", "--workers", "1", "--out", "run"]
    assert main(["apply", *named, *words, *weights]) == 0
    assert main(["verify", "run", "--arch", "flattening:Net", "--threads", "1"]) == 0


WRAPPED = """
from torch import nn

def body(channels, classes):
    pooled = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(pooled, nn.Linear(8, classes))

def wrapped(num_classes=10):
    return nn.DataParallel(body(1, num_classes))

def coloured(num_classes=10):
    return body(3, num_classes)
"""


def test_a_wrapped_network_reads_its_own_weights_and_one_of_other_images_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrapped_nets.py").write_text(WRAPPED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    words = ["pretrain", "--epochs", "1", "--threads", "1", "--arch"]
    assert main([*words, "wrapped_nets:wrapped", "--out", "w"]) == 0
    assert "1.weight" in weights(tmp_path / "w.safetensors")
    assert main(["inspect", "--arch", "wrapped_nets:wrapped", "--weights", "w.safetensors"]) == 0
    capsys.readouterr()
    assert main([*words, "wrapped_nets:coloured", "--out", "c"]) == 2
    error = capsys.readouterr().err
    assert "does not take an image of the data set, [1, 1, 8, 8]: " in error
    assert error.count("\n") == 1
