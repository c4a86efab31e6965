"""Images of the user's own in every command: ``--dataset package.module:function``."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from prunegraph.cli.main import main

MODULE = """
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Subset, TensorDataset

from prunegraph.data import Images


def shift(image):
    return image.roll(int(torch.randint(0, 2, (1,))), dims=-1)


def digits():
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    items = TensorDataset(images, torch.tensor(found.target))
    return Images(
        train=Subset(items, range(1300)), test=Subset(items, range(1300, 1797)), augment=shift
    )


def few():
    found = digits()
    return Images(train=Subset(found.train, range(60)), test=found.test)


def probable(num_classes=10):
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, num_classes), nn.Softmax(1))


def nothing():
    return None


def broken():
    raise RuntimeError("no disk")
"""
SMALL = (
    *("--seeds", "1", "--networks", "24", "--agent.update-size", "4", "--agent.subset", "64"),
    *("--agent.surrogate-steps", "2", "--agent.distill-steps", "1"),
    *("--calibration-images", "64", "--finetune-epochs", "1", "--threads", "1"),
)


@pytest.fixture
def module(write_module: Callable[[str], str]) -> str:
    return write_module(MODULE)


def test_every_command_reads_them(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{module}:digits"
    words = ["pretrain", "--arch", "digits_resnet8_w4", "--dataset", name]
    assert main([*words, "--epochs", "3", "--out", "net"]) == 0
    record = json.loads(Path("net.json").read_text())
    assert record["dataset"] == name
    assert record["test_accuracy"] > 0.2
    compare = ["compare", "--no-agent", "--weights", "net.safetensors", "--workers", "2"]
    compare += ["--methods", "cem", "l1/uniform"]
    assert main([*compare, *SMALL, "--out", "run"]) == 2  # the JSON alone names it
    assert f"trust it with --dataset {name}" in capsys.readouterr().err
    assert main([*compare, *SMALL, "--dataset", name, "--out", "run"]) == 0
    capsys.readouterr()
    assert main(["verify", "run", "--threads", "1"]) == 2
    assert f"trust it with --dataset {name}" in capsys.readouterr().err
    assert main(["verify", "run", "--threads", "1", "--dataset", name]) == 0
    assert main(["inspect", "--arch", "digits_resnet8_w4", "--dataset", name]) == 0


def test_few_images_and_a_softmax_are_warned_of(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("--arch", f"{module}:probable", "--dataset", f"{module}:few")
    assert main(["pretrain", *own, "--epochs", "1", "--out", "net"]) == 0
    compare = ["compare", "--no-agent", "--methods", "l1/uniform", "--weights", "net.safetensors"]
    assert main([*compare, *own, *SMALL, "--finetune-epochs", "0", "--out", "run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"warning: there are \d+ images to search on", said)
    assert f"warning: {module}:probable seems to end in a softmax" in said
    assert main(["verify", "run", "--threads", "1"]) == 2
    asked = f"trust it with --dataset {module}:few --arch {module}:probable"
    assert asked in " ".join(capsys.readouterr().err.split())


def test_a_file_of_options_does_not_run_them_by_itself(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = tmp_path / "options.yaml"
    options.write_text(f'dataset: "{module}:digits"\n')
    assert main(["train", "--config", str(options)]) == 2
    assert f"trust it with --dataset {module}:digits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "returned NoneType, not prunegraph.data.Images"),
        (["broken"], "failed: RuntimeError: no disk (/"),
        (
            ["absent"],
            "has no callable 'absent'; it has: shift, digits, few, probable, nothing, broken",
        ),
        (["digits", "--no-flip"], "reads and augments its images itself: leave no_flip away"),
        (["digits", "--data-dir", "."], "leave data_dir away"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    words: list[str], message: str, module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *more = words
    arguments = ["--arch", "digits_resnet8_w4", "--dataset", f"{module}:{name}", *more]
    assert main(["pretrain", *arguments, "--epochs", "1", "--out", "net"]) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1
