"""Bad input of the long commands: one line, exit code 2, and nothing left behind."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from prunegraph.cli.main import main


def check_refused(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    """Run a command and check that it is refused in one line, without a run folder."""
    capsys.readouterr()
    assert main([*words, "--out", str(folder), "--threads", "1"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("prunegraph: ")
    assert not folder.exists()
    return captured.err


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of two classes."""
    root = tmp_path / "images"
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            for number in range(4):
                write_image(root / split / name / f"{number}.png", number)
    return root


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --arch digits_resnet9", "depth 9 is not 6n + 2"),
        ("train --arch lenet", "unknown architecture 'lenet'"),
        ("train --arch resnet50", "did you mean 'torchvision:resnet50'?"),
        (
            "train --arch mobilenet_v2",
            "did you mean 'mobilenetv2', or 'torchvision:mobilenet_v2'?",
        ),
        ("train --arch ResNet20 --dataset cifar10 --data-dir nowhere", "did you mean 'resnet20'?"),
        (
            "train --arch resnet20 --weights none.pth --dataset cifar10 --data-dir nowhere",
            "no weights file none.pth",
        ),
        ("train --dataset mnist", "unknown data set 'mnist'"),
        ("train --dataset cifer10", "did you mean 'cifar10'?"),
        ("train --keep-macs 0", "keep_macs=0.0 must lie in (0, 1]"),
        ("train --keep-macs 50", "the share that remains; 50 % is 0.5"),
        ("train --keep-macs 0.0001", "the least that can is"),
        ("train --keep-macs 0.0001", "or more"),
        ("train --keep-params 0.0001", "the least that can is"),
        ("train --networks 16", "allows no update of the policy: give at least"),
        (
            "train --arch digits_resnet8_w4 digits_resnet14_w4 --agent.granularity group",
            "--agent.granularity group takes networks of one number of groups",
        ),
        ("train --budgets 0.5 0.5", "budgets=0.5 0.5 names one twice"),
        (
            "compare --arch digits_resnet110_w4 --methods l1/sensitivity --networks 40",
            "networks=40 is too few for l1/sensitivity, which runs",
        ),
        (
            "prune l1/uniform --networks 10",
            "--networks is for searches: l1/uniform does not",
        ),
        ("prune magnitude --sparsity 0.5 --networks 10", "--networks is for searches: magnitude"),
        ("prune cem --policy resnet-cifar", "--policy is for the agent: cem does not read it"),
        ("prune cem --agent.swaps 3", "--agent.* is for the agent: cem does not read it"),
        ("train --networks 3", "networks=3 allows no update of the policy: give at least 34"),
        ("train --arch resnet20 --weights a b", "1 networks but 2 weights files"),
        ("train --agent.learning-rate nan", "agent.learning_rate=nan must lie in"),
        ("train --seed 99999999999999999999", "seed is no number that can be used, or too large"),
        ("train --agent.constraint soft", "invalid choice 'soft'"),
        ("train --arch resnet20 --dataset cifar10 --data-dir nowhere", "nowhere"),
        ("compare --methods l3/uniform", "unknown method 'l3/uniform' (did you mean"),
        ("train --arch shop.patches", "your own code? write shop:patches"),
        ("compare --keep-macs 0.0001", "the least that can is"),
        ("apply --policy resnet-cifer", "did you mean 'resnet-cifar'?"),
        ("apply --policy nowhere", "that comes with the package: resnet-cifar"),
        ("train --policy nowhere", "no policy nowhere"),
        ("compare --policy nowhere", "no policy nowhere"),
        ("apply", "`prunegraph apply` needs --policy: resnet-cifar, which comes with"),
        ("pretrain --lr -1", "lr=-1.0 must be positive"),
    ],
)
def test_options_that_cannot_be(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = check_refused(words.split(), message, tmp_path / "run", capsys)
    assert "Traceback" not in error


def test_weights_of_another_network(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--weights", str(weights), "--arch", "resnet20"]
    check_refused(words, "holds digits_resnet8_w4, not resnet20", tmp_path / "run", capsys)
    alone = Path(shutil.copy(weights, tmp_path / "alone.safetensors"))
    words = ["train", "--weights", str(alone), "--arch", "digits_resnet8"]
    check_refused(words, "is of another network", tmp_path / "run", capsys)


def test_truncated_weights(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(weights.read_bytes()[:1000])
    words = ["train", "--weights", str(path), "--arch", "digits_resnet8_w4"]
    check_refused(words, "truncated", tmp_path / "run", capsys)


def test_a_pickle_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, witness = tmp_path / "model.pth", tmp_path / "witness"

    class Touch:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (witness,))

    path.write_bytes(pickle.dumps(Touch()))
    words = ["train", "--weights", str(path), "--arch", "digits_resnet8_w4"]
    check_refused(words, "pickled", tmp_path / "run", capsys)
    torch.save(nn.Linear(2, 2), path)
    check_refused(words, "pickled", tmp_path / "run", capsys)
    assert not witness.exists()


def test_weights_with_nan(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = safetensors.torch.load_file(weights)
    state["conv1.weight"][0, 0, 0, 0] = float("nan")
    path = tmp_path / "nan.safetensors"
    safetensors.torch.save_file(state, path)
    words = ["train", "--weights", str(path), "--arch", "digits_resnet8_w4"]
    check_refused(words, "conv1.weight holds NaN", tmp_path / "run", capsys)


def test_weights_of_another_cut_of_the_train_images(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--weights", str(weights), "--split-seed", "1"]
    check_refused(words, "give --split-seed 0", tmp_path / "run", capsys)


def test_a_folder_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
    words = ["train", "--arch", "resnet20", "--dataset", "folder"]
    words += ["--data-dir", str(tmp_path / "images"), "--pretrain-epochs", "1"]
    check_refused(words, str(tmp_path / "images"), tmp_path / "run", capsys)


def test_a_broken_image(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = images / "val" / "cat" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    words = ["train", "--arch", "resnet20", "--dataset", "folder"]
    words += ["--data-dir", str(images), "--pretrain-epochs", "1"]
    check_refused(words, str(broken), tmp_path / "run", capsys)


def test_a_class_only_in_test(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(images / "test" / "bird" / "0.png", 0)
    words = ["train", "--arch", "resnet20", "--dataset", "folder"]
    words += ["--data-dir", str(images), "--pretrain-epochs", "1"]
    check_refused(words, "bird", tmp_path / "run", capsys)


def test_a_network_without_weights(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--arch", "resnet20", "--dataset", "folder", "--data-dir", str(images)]
    check_refused(words, "has no weights: give --weights", tmp_path / "run", capsys)


def test_a_damaged_policy(quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("policy.safetensors", "policy.json"):
        shutil.copy(quick / name, tmp_path / name)
    content = bytearray((tmp_path / "policy.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "policy.safetensors").write_bytes(content)
    words = ["apply", "--policy", str(tmp_path)]
    check_refused(words, "policy.safetensors", tmp_path / "run", capsys)


AUXILIARY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.stem, self.body = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head, self.auxiliary = nn.Linear(8, 10), nn.Linear(8, 10)
        self.norm = nn.BatchNorm1d(10)  # it cannot train on the one image of the analysis

    def forward(self, x):
        x = self.stem(x).relu()
        first = x.mean((2, 3))
        logits = self.norm(self.head(self.body(x).relu().mean((2, 3))))
        if not self.training:
            return logits
        beside = self.auxiliary(first.view(-1, 8))
        return (logits, beside) if self.kind == "tuple" else logits + beside

def tuple_net():
    return Net("tuple")

def unseen_net():
    return Net("unseen")
"""


@pytest.mark.parametrize("command", ["train", "compare", "apply"])
@pytest.mark.parametrize(
    ("factory", "message"),
    [("tuple_net", "logits [images, classes] in training mode"), ("unseen_net", "pruned, fails (")],
)
def test_a_forward_that_differs_in_training_mode_is_found_before_the_search(
    factory: str,
    message: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "auxiliary_nets.py").write_text(AUXILIARY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    policy = ["--policy", "resnet-cifar"] if command == "apply" else []
    words = [command, "--arch", f"auxiliary_nets:{factory}", "--dataset", "digits", *policy]
    check_refused(words, message, tmp_path / "run", capsys)
